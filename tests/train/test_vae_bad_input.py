"""What does not fit together is one clear line before the first step of stage 1, and nothing in a file is run."""

import pickle
import shutil

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from tiny_runs import VAE, vae_config

from sendvae_fast.engine.distributed import Distributed, init_distributed
from sendvae_fast.engine.snapshot import Snapshot
from sendvae_fast.engine.streams import HostMemory
from sendvae_fast.errors import UserError
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.autoencoder.autoencoder_config import AutoencoderConfig
from sendvae_fast.models.autoencoder.export import write_diffusers
from sendvae_fast.models.autoencoder.storage import SavedAutoencoder, save_autoencoder
from sendvae_fast.models.discriminator import Discriminator
from sendvae_fast.models.discriminator_config import DiscriminatorConfig
from sendvae_fast.train.vae import networks as vae_networks
from sendvae_fast.train.vae.stage import VAEStage, train_vae

pytestmark = pytest.mark.slow

FINE_TUNED = {"init_from": "vae", "discriminator_from": "discriminator.pt"}


class Payload:
    """Unpickling an instance leaves a trace."""

    ran = False

    def __reduce__(self):
        return (setattr, (Payload, "ran", True))


@pytest.fixture(scope="module")
def good_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    sizes = {key: tuple(value) if isinstance(value, list) else value for key, value in VAE["autoencoder"].items()}
    autoencoder = Autoencoder(AutoencoderConfig(**sizes))
    statistics = torch.zeros(4), torch.ones(4)
    save_autoencoder(folder / "vae", autoencoder, *statistics)
    (folder / "hf").mkdir()
    write_diffusers(folder / "hf", SavedAutoencoder(autoencoder, *statistics, "zeros and ones"), "test")
    ldm = AutoencoderConfig(base_channels=32, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=())
    torch.save(Autoencoder(ldm).state_dict(), folder / "ldm.pt")
    torch.save(Discriminator(DiscriminatorConfig(**VAE["discriminator"])).state_dict(), folder / "discriminator.pt")
    torch.save(torchvision.models.squeezenet1_1(weights=None).features.state_dict(), folder / "squeeze.pth")
    return folder


@pytest.fixture
def files(good_files, tmp_path, monkeypatch):
    """A copy of the good files to spoil, which is the working directory; training in it is an error."""
    monkeypatch.setattr(VAEStage, "train_step", lambda *_: pytest.fail("training started"))
    shutil.copytree(good_files, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def nan_in(path, name):
    def spoil():
        read, write = (load_file, save_file) if path.endswith(".safetensors") else (torch.load, torch.save)
        state = read(path)
        state[name].view(-1)[-1] = float("nan")
        write(state, path)

    return spoil


def changed(path, **tensors):
    return lambda: save_file(load_file(path) | tensors, path)


def cut(path):
    def spoil():
        with open(path, "r+b") as file:
            file.truncate(file.seek(0, 2) // 2)

    return spoil


def replaced(path, content):
    def spoil():
        with open(path, "wb") as file:
            file.write(content)

    return spoil


def code_in(path):
    return replaced(path, pickle.dumps({"main.0.weight": Payload()}, protocol=2))


def nothing():
    pass


WEIGHTS = "vae/model.safetensors"
SQUEEZENET = {"alignment": {"foundation": {"name": "squeezenet", "weights": "squeeze.pth", "grid_size": 8}}}
LPIPS = {"loss": {"perceptual": {"net": "squeeze", "weights": "squeeze.pth"}}}
NO_GAN = {"loss": {"gan_weight": 0.0}}
CASES = {
    "NaN in the autoencoder": (
        nan_in(WEIGHTS, "decoder.conv_out.bias"),
        {},
        r"vae/model.safetensors has NaN or inf in 1 weights \(decoder.conv_out.bias\)",
    ),
    "NaN in diffusers' layout": (
        nan_in("hf/diffusion_pytorch_model.safetensors", "decoder.conv_norm_out.bias"),
        {"init_from": "hf"},
        r"diffusion_pytorch_model.safetensors has NaN or inf in 1 weights \(decoder.norm_out.bias\)",
    ),
    "NaN in the discriminator": (
        nan_in("discriminator.pt", "main.2.weight"),
        {},
        r"discriminator.pt has NaN or inf in 1 weights \(main.2.weight",
    ),
    "NaN in the foundation model": (
        nan_in("squeeze.pth", "3.squeeze.bias"),
        SQUEEZENET,
        r"squeeze.pth has NaN or inf in 1 weights \(3.squeeze.bias",
    ),
    "NaN in LPIPS": (
        nan_in("squeeze.pth", "3.squeeze.bias"),
        LPIPS,
        r"squeeze.pth has NaN or inf in 1 weights \(slice2.3.squeeze.bias\)",
    ),
    "NaN in the statistics": (
        changed("vae/latent_stats.safetensors", latent_mean=torch.full((4,), float("nan"))),
        {},
        "hold NaN",
    ),
    "statistics of other channels": (
        changed("vae/latent_stats.safetensors", latent_mean=torch.zeros(5), latent_std=torch.ones(5)),
        {},
        "5 means and 5 deviations, but the latents have 4 channels",
    ),
    "pictures of four channels": (
        changed(WEIGHTS, **{"encoder.conv_in.weight": torch.zeros(8, 4, 3, 3)}),
        {},
        "encoder.conv_in.weight 8x4x3x3 instead of 8x3x3x3",
    ),
    "other latent channels": (nothing, {"autoencoder": {"latent_channels": 5}}, "latent_channels 4 instead of 5"),
    "another discriminator": (nothing, {"discriminator": {"base_channels": 16}}, "8x3x4x4 instead of 16x3x4x4"),
    "an autoencoder for a discriminator": (nothing, {"discriminator_from": WEIGHTS}, "holds no discriminator"),
    "no discriminator": (nothing, {"discriminator_from": None}, "discriminator_from is missing: fine-tuning vae"),
    "a run without a discriminator": (nothing, {"discriminator_from": "vae"}, "vae/discriminator.safetensors does not"),
    "no statistics to fix": (
        nothing,
        {"init_from": None, "alignment": {"latent_norm": "fixed"}},
        "latent_norm=fixed needs init_from",
    ),
    "no statistics": (
        nothing,
        {"init_from": "ldm.pt"},
        "ldm.pt has no latent statistics: .*--stats=FILE, or --scaling_factor",
    ),
    "cut off": (cut(WEIGHTS), {}, "model.safetensors is broken"),
    "cut off checkpoint": (cut("discriminator.pt"), {}, "discriminator.pt is broken"),
    "a picture": (replaced("discriminator.pt", b"\x89PNG\r\n\x1a\n" + bytes(64)), {}, "discriminator.pt is broken"),
    "a picture as safetensors": (replaced(WEIGHTS, b"\x89PNG\r\n\x1a\n" + bytes(64)), {}, "safetensors is broken"),
    "code in the discriminator": (code_in("discriminator.pt"), {}, "discriminator.pt is broken or holds more than"),
    "code in the foundation model": (code_in("squeeze.pth"), SQUEEZENET, "squeeze.pth is broken or holds more than"),
    "code in LPIPS": (code_in("squeeze.pth"), LPIPS, "squeeze.pth is broken or holds more than"),
    "pictures that do not divide": (
        nothing,
        {"data": {"image_size": 34}, "alignment": {"method": "none"}},
        "image_size=34 must be a multiple of .* 4",
    ),
    "pictures too small to judge": (
        nothing,
        {"discriminator": {"num_layers": 4}},
        "num_layers=4 .* at least 48 pixels",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_starts_that_cannot_work(files, images, case):
    spoil, settings, words = CASES[case]
    spoil()
    with pytest.raises(UserError, match=words) as caught:
        train_vae(vae_config(files / "run", images, **FINE_TUNED | {"engine": {"name": "ddp"}} | settings))
    assert "\n" not in str(caught.value) and not Payload.ran


def test_a_cold_discriminator_must_be_asked_for_or_eased_in(images):
    fine_tuned = {"init_from": "vae"}
    for allowed in (
        {"cold_discriminator": True},
        {"discriminator_from": "d.pt"},
        NO_GAN,
        {"loss": {"gan_warmup_steps": 100}},
        {"loss": {"gan_start_step": 100, "discriminator_start_step": 0}},
        {"init_from": None},
    ):
        vae_config(images, images, **fine_tuned | allowed)
    for refused in ({}, {"loss": {"gan_start_step": 100}}, {"loss": {"gan_warmup_steps": 1}}):
        with pytest.raises(UserError, match="cold_discriminator=true"):
            vae_config(images, images, **fine_tuned | refused)


def test_a_mapper_of_other_sizes_is_refused(files, images):
    stages = [
        VAEStage(
            vae_config(files / "run", images, alignment={"send": {"width": width}}, engine={"name": "ddp"}),
            None,
            init_distributed("cpu"),
        )
        for width in (32, 64)
    ]
    stages[0].snapshot(Snapshot(HostMemory()))(files / "checkpoint")
    with pytest.raises(UserError, match="weight mapper.* has shape .* and the model wants"):
        stages[1].load(files / "checkpoint")


def test_batch_norm_is_synchronised_on_gpus_alone(images):
    settings = {"norm": "batch", "sync_batch_norm": True}
    with pytest.raises(UserError, match="sync_batch_norm is for norm=batch"):
        DiscriminatorConfig(norm="group", sync_batch_norm=True)

    def build(world_size, device):
        ranks = Distributed(0, world_size, 0, torch.device(device))
        return vae_networks.build_discriminator(vae_config(images, images, discriminator=settings), ranks)

    alone, together = build(1, "cpu"), build(2, "cuda")
    assert alone.state_dict().keys() == together.state_dict().keys()  # the published layout stays
    norms = [[type(part) for part in network.modules() if "BatchNorm" in type(part).__name__]
             for network in (alone, together)]  # fmt: skip
    assert norms == [[torch.nn.BatchNorm2d] * 2, [torch.nn.SyncBatchNorm] * 2]
    with pytest.raises(UserError, match="works on GPUs, and 2 ranks are on cpu: .*norm=group"):
        build(2, "cpu")
