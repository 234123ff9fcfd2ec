"""`sendvae convert` as a user meets it."""

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch.testing import assert_close

from sendvae_fast.cli.main import main
from sendvae_fast.models.autoencoder import Autoencoder, AutoencoderConfig
from sendvae_fast.models.autoencoder_io import load_autoencoder, save_autoencoder

SIZES = dict(base_channels=32, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(128,))
MEAN, STD = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.3, 2.0, 4.0])


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    save_autoencoder(tmp_path / "ours", Autoencoder(AutoencoderConfig(**SIZES, latent_channels=3)), MEAN, STD)
    return tmp_path / "ours"


def convert(capsys, source, to, out, *options):
    """Exit code, stdout and stderr."""
    code = main(["convert", str(source), f"--to={to}", f"--out={out}", *options])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_there_and_back_through_every_layout(folder, tmp_path, capsys):
    source = folder
    for number, to in enumerate(["diffusers", "ldm", "diffusers", "sendvae"]):
        code, out, err = convert(capsys, source, to, tmp_path / f"{number}")
        assert (code, err) == (0, "") and f"f2d3 autoencoder, {to} layout; latent statistics from" in out
        source = tmp_path / f"{number}" / ("vae.pt" if to == "ldm" else "")
    before, after = load_file(folder / "model.safetensors"), load_file(source / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    saved = load_autoencoder(source)
    assert saved.autoencoder.config == AutoencoderConfig(**SIZES, latent_channels=3)
    assert torch.equal(saved.latent_mean, MEAN)
    assert_close(saved.latent_std, STD, rtol=1.2e-7, atol=0)  # the LDM file has 1 / std
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3", "ours"]


def test_diffusers_opens_the_folder(folder, tmp_path, capsys):
    assert convert(capsys, folder, "diffusers", tmp_path / "hf")[0] == 0
    theirs = AutoencoderKL.from_pretrained(tmp_path / "hf").eval()
    assert theirs.config.latents_mean == MEAN.tolist() and theirs.config.latents_std == STD.tolist()
    assert theirs.config.scaling_factor == 1.0
    x = torch.rand(2, 3, 32, 64) * 2 - 1
    with torch.no_grad():
        assert_close(load_autoencoder(folder).autoencoder(x), theirs(x).sample, rtol=1e-5, atol=1e-5)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n") and "2 times smaller, 3 latent" in card
    assert "`ours`" in card and str(tmp_path) not in card


def test_statistics_by_option(folder, tmp_path, capsys):
    (folder / "latent_stats.safetensors").rename(tmp_path / "stats.safetensors")
    bare = folder / "model.safetensors"
    code, _, err = convert(capsys, bare, "sendvae", tmp_path / "out")
    assert code == 2 and "no latent statistics" in err and "--stats=FILE" in err
    assert convert(capsys, bare, "sendvae", tmp_path / "out", f"--stats={tmp_path}/stats.safetensors")[0] == 0
    assert torch.equal(load_autoencoder(tmp_path / "out").latent_std, STD)
    assert convert(capsys, bare, "sendvae", tmp_path / "out2", "--scaling_factor=0.5")[0] == 0
    assert load_autoencoder(tmp_path / "out2").latent_std.tolist() == [2.0] * 3


@pytest.mark.parametrize(
    "source, to, options, words",
    [
        ("nowhere", "diffusers", (), "nowhere does not exist"),
        (".", "diffusers", (), "neither a weight folder"),
        ("noise.pt", "ldm", (), "noise.pt is broken"),
        ("ours", "onnx", (), "onnx"),
        ("ours", "diffusers", ("--scaling_factor=-1",), "scaling_factor is -1.0: it must be above 0"),
        ("ours", "diffusers", ("--stats=none.pt",), "none.pt does not exist"),
        ("few groups", "ldm", (), "num_groups=8 has no LDM equivalent"),
        ("wide first", "diffusers", (), "no diffusers equivalent"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(folder, tmp_path, capsys, monkeypatch, source, to, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "noise.pt").write_bytes(b"noise")
    for name, changes in [("few groups", dict(num_groups=8)), ("wide first", dict(channel_multipliers=(2, 2)))]:
        save_autoencoder(tmp_path / name, Autoencoder(AutoencoderConfig(**SIZES | changes)), *torch.ones(2, 32))
    before = sorted(tmp_path.iterdir())
    code, _, err = convert(capsys, source, to, tmp_path / "out", *options)
    assert code == 2 and words in err and len(err.strip().splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_never_overwrites(folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    code, _, err = convert(capsys, folder, "diffusers", tmp_path / "out")
    assert code == 2 and "out exists already" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
