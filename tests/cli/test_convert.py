"""`sendvae convert` as a user meets it."""

import json
import os
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from sendvae_fast import hub as hub_module
from sendvae_fast.cli.main import main
from sendvae_fast.evaluation.result import Result, WeightsOrigin, append_results
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.autoencoder.autoencoder_config import AutoencoderConfig
from sendvae_fast.models.autoencoder.storage import load_autoencoder, save_autoencoder
from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.models.sit.sizes import SiTConfig
from sendvae_fast.models.sit.storage import load_sit, save_sit

pytestmark = pytest.mark.slow

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
        ours, rounded = load_autoencoder(folder).autoencoder(x), theirs(x).sample
        truth = theirs.double()(x.double()).sample
    # The same network to rounding, whose size differs from processor to processor: theirs is the measure.
    assert (ours - truth).abs().max() < 4 * (rounded - truth).abs().max() < 1e-4
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n") and "2 times smaller, 3 latent" in card
    assert "`ours`" in card and str(tmp_path) not in card


class FakeHub:
    """Stands in for HfApi: keeps what it was asked to do."""

    calls, error = [], None

    def create_repo(self, repo, private, exist_ok):
        self.calls.append((repo, private, exist_ok))

    def upload_folder(self, repo_id, folder_path, commit_message):
        if self.error is not None:
            raise self.error
        self.calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))
        return f"https://hub/{repo_id}"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(FakeHub, "calls", [])
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    return FakeHub


def test_pushes_only_when_asked(folder, tmp_path, capsys, hub):
    assert convert(capsys, folder, "diffusers", tmp_path / "kept")[0] == 0 and hub.calls == []
    code, out, _ = convert(capsys, folder, "diffusers", tmp_path / "out", "--push=me/send-vae")
    files = ["README.md", "config.json", "diffusion_pytorch_model.safetensors"]
    assert hub.calls == [("me/send-vae", True, True), ("me/send-vae", files)]
    assert code == 0 and out.endswith("pushed: https://hub/me/send-vae\n")
    assert 'from_pretrained("me/send-vae")' in (tmp_path / "out" / "README.md").read_text()
    assert 'from_pretrained("kept")' in (tmp_path / "kept" / "README.md").read_text()


@pytest.mark.parametrize(
    "to, repo, words",
    [
        ("ldm", "me/vae", "--push is for --to=diffusers"),
        ("diffusers", "vae", "--push=vae is no repository: give USER/NAME"),
        ("diffusers", "me/two words", "--push=me/two words is no repository"),
        ("diffusers", "me/a/b", "--push=me/a/b is no repository"),
    ],
)
def test_push_that_cannot_work_is_refused_before_anything_is_written(folder, tmp_path, capsys, hub, to, repo, words):
    code, _, err = convert(capsys, folder, to, tmp_path / "out", f"--push={repo}")
    assert code == 2 and words in err and len(err.strip().splitlines()) == 1
    assert hub.calls == [] and not (tmp_path / "out").exists()


def test_push_without_login_or_library(folder, tmp_path, capsys, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    code, _, err = convert(capsys, folder, "diffusers", tmp_path / "out", "--push=me/vae")
    assert code == 2 and "--push needs a login: run `hf auth login`" in err
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    code, _, err = convert(capsys, folder, "diffusers", tmp_path / "out", "--push=me/vae")
    assert code == 2 and "needs huggingface_hub" in err and "sendvae_fast[train]" in err
    assert not (tmp_path / "out").exists()


def test_push_finds_the_library_in_a_fresh_process():
    """Whose parts are loaded lazily: here others have loaded them."""
    code = "from sendvae_fast.hub import check_push; check_push('me/vae')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env={**os.environ, "HF_TOKEN": "token"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_refused_push_leaves_the_folder(folder, tmp_path, capsys, hub, monkeypatch):
    monkeypatch.setattr(hub, "error", OSError("403 Forbidden: no write access\nrequest id 7"))
    code, _, err = convert(capsys, folder, "diffusers", tmp_path / "out", "--push=me/vae")
    assert code == 2 and "not pushed to me/vae: 403 Forbidden: no write access. Try again with `hf upload" in err
    assert len(err.strip().splitlines()) == 1
    assert AutoencoderKL.from_pretrained(tmp_path / "out").config.latent_channels == 3


def as_checkpoint_of_a_run(folder, tmp_path):
    """The run, and its checkpoint after 20 steps, which the folder becomes."""
    run = tmp_path / "runs" / "send"
    checkpoint = run / "checkpoints" / "step_00000020"
    checkpoint.parent.mkdir(parents=True)
    folder.rename(checkpoint)
    (checkpoint / "manifest.json").write_text('{"step": 20}')
    return run, checkpoint


def test_the_card_has_the_facts_of_a_run(folder, tmp_path, capsys):
    run, checkpoint = as_checkpoint_of_a_run(folder, tmp_path)
    (run / "config.yaml").write_text(
        "init_from: /secret/place/vavae\ndata: {global_batch: 1024, image_size: 256}\n"
        "alignment: {method: send, weight: null, foundation: {name: dinov2-vit-b}}\n"
    )
    entries = [{"step": 10, "align": 0.5, "kl": 7.0}, {"step": 20, "align": 0.25}, {"step": 30, "align": 9.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"st')
    assert convert(capsys, checkpoint, "diffusers", tmp_path / "hf")[0] == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "from `step_00000020`.\n\n- trained by: " in card
    assert "20 steps of 1024 pictures of 256 x 256" in card and "- started from: vavae\n" in card
    assert "- aligned with: dinov2-vit-b, method send, weight 1.0\n- losses in training: kl 7, align 0.25\n" in card
    assert "secret" not in card


def test_the_card_has_licence_base_model_metrics_picture_and_citation(folder, tmp_path, capsys):
    run, checkpoint = as_checkpoint_of_a_run(folder, tmp_path)
    (run / "config.yaml").write_text(
        "init_from: pretrained/vavae-f16d32\ndata: {root: /secret/imagenet, global_batch: 1024, image_size: 256}\n"
        "alignment: {method: send, weight: null, foundation: {name: dinov2-vit-b}}\n"
    )
    (run / "samples").mkdir()
    for step in (10, 20, 30):
        Image.new("RGB", (4, 4), (step, 0, 0)).save(run / "samples" / f"reconstruction_{step:08d}.png")
    results = [
        Result(
            metric=metric, value=value, protocol="lightningdit", interval=(value - 1, value + 1),
            counts={"samples": 50},
            weights={"autoencoder": WeightsOrigin(path="x", sha256="y", step=step)},
        )
        for metric, value, step in (("psnr", 20.0, 20), ("psnr", 27.5, 20), ("psnr", 99.0, 30), ("<b>|x", 1.0, 20))
    ]  # fmt: skip
    append_results(run / "evaluation.jsonl", results)
    assert convert(capsys, checkpoint, "diffusers", tmp_path / "hf", "--licence=mit")[0] == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    head = card.split("---")[1]
    assert "license: mit\n" in head and "base_model: hustvl/vavae-imagenet256-f16d32-dinov2\n" in head
    assert "| psnr | 27.5 [26.5, 28.5] | lightningdit; 50 samples |" in card
    assert "99" not in card and "<b>" not in card and "secret" not in card and "- pictures: imagenet\n" in card
    assert "](reconstructions.png)" in card and "@article{sendvae," in card
    with Image.open(tmp_path / "hf" / "reconstructions.png") as picture:
        assert picture.getpixel((0, 0)) == (20, 0, 0)
    assert convert(capsys, checkpoint, "diffusers", tmp_path / "other", "--licence=a b")[0] == 2


def test_the_card_of_a_generator(tmp_path, capsys):
    run = tmp_path / "runs" / "xl"
    checkpoint = run / "checkpoints" / "step_00000020"
    sizes = SiTConfig(patch_size=1, width=32, depth=2, num_heads=2, latent_size=8, latent_channels=3, num_classes=7)
    state = SiT(sizes).state_dict()
    save_sit(checkpoint, sizes, state, state, MEAN, STD)
    (run / "config.yaml").write_text(
        "init_from: null\nlatents: /secret/latents/send\ndata: {global_batch: 256}\noptimizer: {ema_decay: 0.9999}\n"
        "repa: {weight: 0.5, block: 8, foundation: {name: dinov2-vit-b}}\n"
    )
    (run / "samples").mkdir()
    for step in (10, 20, 30):
        Image.new("RGB", (4, 4), (step, 0, 0)).save(run / "samples" / f"samples_{step:08d}.png")
    weights = {
        step: {name: WeightsOrigin(path="x", sha256="y", step=step) for name in ("generator", "autoencoder")}
        for step in (20, 30)
    }
    decoder = {"autoencoder": WeightsOrigin(path="x", sha256="y", step=20)}
    results = [
        Result(metric=metric, value=value, protocol="adm", counts={"samples": 50}, weights=origins)
        for metric, value, origins in (("fid", 8.5, weights[20]), ("fid", 99.0, weights[30]), ("psnr", 1.0, decoder))
    ]
    append_results(run / "evaluation.jsonl", results)
    code, _, err = convert(capsys, checkpoint, "generator", tmp_path / "out", "--licence=mit")
    assert code == 0, err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit\n" in card and "# Generator of 2 blocks of width 32, 7 classes\n" in card
    parameters = sum(value.numel() for value in SiT(sizes).parameters()) / 1e6
    assert f"A flow transformer of {parameters:.1f}M parameters in float32 on latents of 3 x 8 x 8" in card
    assert "20 steps of 256 latents\n- latents: send\n- started from: random weights\n" in card
    assert "- aligned with: dinov2-vit-b after block 8 (REPA), weight 0.5\n" in card
    assert "| fid | 8.5 | adm; 50 samples |" in card and "| 99" not in card and "psnr" not in card
    assert "](samples.png)" in card and "@article{sendvae," in card and "secret" not in card
    with Image.open(tmp_path / "out" / "samples.png") as picture:
        assert picture.getpixel((0, 0)) == (20, 0, 0)
    assert load_sit(tmp_path / "out").sit.config == sizes
    assert convert(capsys, tmp_path / "out", "generator", tmp_path / "again")[0] == 0  # weights of no run
    assert "trained by" not in (tmp_path / "again" / "README.md").read_text()


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
    code, _, err = convert(capsys, folder, "diffusers", tmp_path / "out" / "mine.txt" / "in_a_file")
    assert code == 2 and "in_a_file (Not a directory): choose another place" in err


@pytest.fixture
def snapshots(folder, monkeypatch):
    """What huggingface_hub was asked to fetch; it gives `folder`."""
    asked = []

    def snapshot_download(repository, **options):
        asked.append((repository, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setenv(hub_module.ALLOWED, "0")
    hub_module.fetched_folder.cache_clear()
    yield asked
    hub_module.fetched_folder.cache_clear()


def test_a_repository_of_the_hub_in_the_place_of_a_folder(folder, tmp_path, capsys, snapshots):
    code, _, err = convert(capsys, "hf:me/vae@v1", "diffusers", tmp_path / "hub", "--allow_network")
    assert code == 0, err
    convert(capsys, folder, "diffusers", tmp_path / "own")
    file = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "hub" / file).read_bytes() == (tmp_path / "own" / file).read_bytes()
    options = {"revision": "v1", "allow_patterns": ["*.json", "*.safetensors"], "local_files_only": False}
    assert snapshots == [("me/vae", options)]


def test_what_is_in_the_hubs_cache_needs_no_network(tmp_path, capsys, snapshots):
    assert convert(capsys, "hf:me/vae", "diffusers", tmp_path / "out")[0] == 0
    ((_, options),) = snapshots
    assert options["local_files_only"] and options["revision"] is None


@pytest.mark.parametrize(
    "source, words",
    [
        (
            "hf:nobody-at-all/nothing",
            "not in the hub's cache here, and the network is not allowed: give --allow_network",
        ),
        ("hf:vae", "hf:vae is no repository of the hub: give hf:USER/NAME"),
        ("hf:a b/c", "hf:a b/c is no repository of the hub"),
        ("nobody-at-all/nothing", "does not exist; give a weight file or folder"),
    ],
)
def test_a_repository_that_cannot_be_fetched(tmp_path, capsys, monkeypatch, source, words):
    """By the hub's own library."""
    monkeypatch.setenv(hub_module.ALLOWED, "0")
    code, _, err = convert(capsys, source, "diffusers", tmp_path / "out")
    assert code == 2 and words in err and len(err.strip().splitlines()) == 1


def test_a_hub_that_does_not_answer(tmp_path, capsys, snapshots, monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    code, _, err = convert(capsys, "hf:me/vae", "diffusers", tmp_path / "out", "--allow_network")
    assert code == 2 and "hf:me/vae could not be fetched: no route to host" in err and len(err.splitlines()) == 1
