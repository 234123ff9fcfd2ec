import pytest
import torch
import torch.nn.functional as F

from bench.random_inception import random_inception
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.feature_config import FeaturesConfig
from sendvae_fast.evaluation.inception import SHA256, InceptionFeatures

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("inception")]


@pytest.fixture(scope="module")
def published_layout(tmp_path_factory):
    """torch-fidelity's network with random weights, and their file."""
    network, file = random_inception(), tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), file)
    return network, file


@pytest.fixture(scope="module")
def images():
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(pixels, size=64, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def assert_same(ours, theirs):
    """To float32's rounding through 94 layers, in which batch norms are folded into convolutions."""
    assert theirs.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_features_are_torch_fidelitys(published_layout, images):
    theirs, file = published_layout
    spatial = []
    hook = theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: spatial.append(output))
    pooled, logits = theirs(images)
    hook.remove()
    ours = InceptionFeatures(file)(images)
    assert_same(ours.pooled, pooled)
    assert_same(ours.logits, logits)
    rows, columns, channel = 3, 11, 6  # of the 17 x 17 x 7 that are flattened in this order
    assert ours.spatial.shape == (2, 17 * 17 * 7)
    assert_same(ours.spatial.reshape(2, 17, 17, 7).movedim(3, 1), spatial[0][:, :7])
    assert_same(ours.spatial[:, (rows * 17 + columns) * 7 + channel], spatial[0][:, channel, rows, columns])


def test_resizing_of_pytorch_fid(published_layout, images):
    """Bilinear by PyTorch and x / 127.5 - 1, then the same layers: the children in their order, without the last."""
    theirs, file = published_layout
    resized = F.interpolate(images / 255, size=(299, 299), mode="bilinear", align_corners=False)
    expected = torch.nn.Sequential(*list(theirs.children())[:-1])(2 * resized - 1).flatten(1)
    ours = InceptionFeatures(file, resizing="pytorch-fid")
    assert_same(ours(images).pooled, expected)
    assert ours.protocol == "pytorch-fid"


def test_only_the_published_weights_give_a_fid(published_layout, monkeypatch):
    _, file = published_layout
    network = InceptionFeatures(file)
    assert network.metric("frechet").startswith("frechet_inception_") and "no FID" in network.remarks[0]
    monkeypatch.setattr("sendvae_fast.evaluation.inception.SHA256", network.origin.sha256)
    network = InceptionFeatures(file)
    names = [network.metric(name) for name in ("frechet", "spatial_frechet", "rfrechet", "kid", "inception_score")]
    assert names == ["fid", "sfid", "rfid", "kid", "inception_score"] and network.remarks == ()


def test_weights_that_are_not_there_or_not_inceptions_are_named(published_layout, tmp_path):
    for weights in (None, str(tmp_path / "none.pth")):
        with pytest.raises(UserError, match=f"sha256 {SHA256}.*torch-fidelity"):
            FeaturesConfig(weights=weights).check()
    state = published_layout[0].state_dict()
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    torch.save(state | {"fc.bias": state["fc.bias"] * torch.nan}, tmp_path / "nan.pth")
    with pytest.raises(UserError, match="other.pth does not hold FID's Inception"):
        InceptionFeatures(tmp_path / "other.pth")
    with pytest.raises(UserError, match="NaN or inf in 1 weights .fc.bias"):
        InceptionFeatures(tmp_path / "nan.pth")
