"""LPIPS from local files: structure with random weights, published numbers with the real ones."""

import os
import socket
from pathlib import Path

import lpips
import pytest
import torch
import torchvision
from everything import in_turn
from torch.testing import assert_close

from sendvae_fast.errors import UserError
from sendvae_fast.losses.perceptual import Perceptual
from sendvae_fast.losses.settings import PerceptualConfig

pytestmark = pytest.mark.slow

FEATURES = {
    "alex": lambda: torchvision.models.alexnet(weights=None).features,
    "squeeze": lambda: torchvision.models.squeezenet1_1(weights=None).features,
    "vgg": lambda: torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"]),
}
HEADS = Path(lpips.__file__).parent / "weights" / "v0.1"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("LPIPS reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def backbone_files(tmp_path_factory):
    """Random backbones in torchvision's layout, their huge classifiers cut down to one number."""
    folder = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    for net, build in FEATURES.items():
        state = {f"features.{key}": value for key, value in build().state_dict().items()}
        state["classifier.1.weight"] = torch.zeros(1)
        torch.save(state, folder / f"{net}.pth")
    return folder


def pairs(size=64):
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(2, 3, size, size, generator=generator) * 2 - 1 for _ in range(2))


def plain_lpips(features, heads, taps, x, y):
    """Zhang et al.: scaled input, unit-normalised features at each tap, squared difference, 1x1 weights, mean."""
    shift = torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1)
    total = 0
    a, b = (x - shift) / scale, (y - shift) / scale
    for index, layer in enumerate(features):
        a, b = layer(a), layer(b)
        if index in taps:
            weight = heads[f"lin{taps.index(index)}.model.1.weight"].reshape(1, -1, 1, 1)
            units = [h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10) for h in (a, b)]
            total = total + ((units[0] - units[1]).square() * weight).sum(1).mean((1, 2))
    return total


@pytest.mark.parametrize(
    "net, taps",
    [("alex", (1, 4, 7, 9, 11)), ("vgg", (3, 8, 15, 22, 29)), ("squeeze", (1, 4, 7, 9, 10, 11, 12))],
)
def test_equals_a_plain_version(backbone_files, net, taps):
    perceptual = Perceptual(PerceptualConfig(net=net, weights=str(backbone_files / f"{net}.pth")))
    state = torch.load(backbone_files / f"{net}.pth", weights_only=True)
    features = FEATURES[net]()
    features.load_state_dict({k.removeprefix("features."): v for k, v in state.items() if "features" in k})
    heads = torch.load(HEADS / f"{net}.pth", weights_only=True, map_location="cpu")
    x, y = pairs()
    with torch.no_grad():
        expected = plain_lpips(features.eval(), heads, taps, x, y)
        assert_close(perceptual(x, y), expected, rtol=1e-4, atol=1e-6)
        assert perceptual(x, x).eq(0).all()


@pytest.mark.parametrize(("net", "memory_format"), [
    (net, memory_format)
    for number, net in enumerate(("alex", "vgg", "squeeze"))
    for memory_format in in_turn((torch.contiguous_format, torch.channels_last), number)
], ids=str)  # fmt: skip
def test_value_and_gradient_are_the_packages_own(backbone_files, net, memory_format):
    perceptual = Perceptual(PerceptualConfig(net=net, weights=str(backbone_files / f"{net}.pth")))
    x, y = (image.contiguous(memory_format=memory_format) for image in pairs())
    y.requires_grad_()
    distances = perceptual(x, y), perceptual.lpips(x, y).flatten()
    assert_close(*distances, rtol=1e-5, atol=0)
    grad, expected = (torch.autograd.grad(distance.sum(), y)[0] for distance in distances)
    assert_close(grad, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_is_frozen_but_passes_gradients_to_the_image(backbone_files):
    perceptual = Perceptual(PerceptualConfig(net="squeeze", weights=str(backbone_files / "squeeze.pth")))
    holder = torch.nn.ModuleList([perceptual]).train()
    assert not any(module.training for module in holder[0].modules())
    assert not any(parameter.requires_grad for parameter in perceptual.parameters())
    x, y = pairs()
    x.requires_grad_()  # in vain: the features of the real picture keep no graph
    y.requires_grad_()
    distance = perceptual(x, y)
    assert distance.shape == (2,)
    distance.mean().backward()
    assert x.grad is None
    assert y.grad.abs().max() > 0 and all(parameter.grad is None for parameter in perceptual.parameters())


def test_wrong_files_get_one_clear_line(backbone_files, tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    cases = [
        (dict(net="squeeze", weights="nowhere.pth"), "nowhere.pth does not exist"),
        (dict(net="squeeze", weights=str(tmp_path / "other.pth")), "squeezenet1_1-b8a52dc0.pth"),
        (dict(net="squeeze", weights=str(backbone_files / "alex.pth")), "does not fit"),
        (dict(net="squeeze", weights=str(backbone_files / "squeeze.pth"), heads=str(HEADS / "alex.pth")), "2 missing"),
        (dict(net="resnet", weights="x"), "vgg, alex or squeeze"),
    ]
    for options, words in cases:
        with pytest.raises(UserError, match=words) as error:
            Perceptual(PerceptualConfig(**options))
        assert "\n" not in str(error.value)


@pytest.mark.skipif("SENDVAE_TEST_DATA" not in os.environ, reason="SENDVAE_TEST_DATA is not set")
@pytest.mark.parametrize("packaged_heads", [True, False])
def test_real_weights_give_the_published_distances(packaged_heads):
    from PIL import Image

    root = Path(os.environ["SENDVAE_TEST_DATA"]) / "weights"
    backbone = root / "lpips_squeeze/image_likeness/models/squeeze.backbone.pth"
    heads = None if packaged_heads else str(root / "lpips_heads/lpips/weights/v0.1/squeeze.pth")
    perceptual = Perceptual(PerceptualConfig(net="squeeze", weights=str(backbone), heads=heads))
    # torchmetrics' documented example.
    generator = torch.Generator().manual_seed(42)
    x, y = (torch.rand(2, 3, 100, 100, generator=generator) * 2 - 1 for _ in range(2))
    assert perceptual(x, y).tolist() == pytest.approx([0.1024, 0.0938], abs=5e-5)
    # The LPIPS repository's own example pictures.
    pictures = {}
    for name in ("ref", "p0", "p1"):
        picture = Image.open(root / f"lpips_heads/imgs/ex_{name}.png").convert("RGB")
        pictures[name] = torchvision.transforms.functional.pil_to_tensor(picture)[None] / 127.5 - 1
    assert perceptual(pictures["ref"], pictures["p0"]).item() == pytest.approx(0.7110, abs=5e-5)
    assert perceptual(pictures["ref"], pictures["p1"]).item() == pytest.approx(0.1479, abs=5e-5)
