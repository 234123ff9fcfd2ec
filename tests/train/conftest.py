import pytest
import torch
import torchvision
from tiny_runs import NUM_IMAGES

from sendvae_fast.data.scenes.scene_folder import synth_scenes
from sendvae_fast.engine.distributed import init_distributed


@pytest.fixture(scope="session", autouse=True)
def one_rank():
    """A process group of one, for all tests of this process: DeepSpeed cannot be given a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield init_distributed("cpu")
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A small ImageFolder of scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    synth_scenes(folder, NUM_IMAGES, size=32, seed=0)
    return folder


@pytest.fixture(scope="session")
def few_images(images, tmp_path_factory):
    """Eight of them, to overfit."""
    folder = tmp_path_factory.mktemp("few")
    (folder / "a").mkdir()
    for number, file in enumerate(sorted(images.rglob("*.jpg"))[:8]):
        (folder / "a" / f"{number}.jpg").write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="session")
def perceptual(tmp_path_factory):
    """Settings of LPIPS with a random SqueezeNet."""
    path = tmp_path_factory.mktemp("lpips") / "squeeze.pth"
    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1(weights=None).features.state_dict(), path)
    return {"net": "squeeze", "weights": str(path)}
