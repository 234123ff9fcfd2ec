"""The list of published files: all that configs name, hashes and licences only where they are published."""

import re
from pathlib import Path

import pytest

from sendvae_fast.cli.main import main
from sendvae_fast.config import packaged_configs, read_config
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.inception_file import FILE, SHA256
from sendvae_fast.models.foundation.recipes import RECIPES
from sendvae_fast.weights.catalog import catalog, needed_by, weights_in
from sendvae_fast.weights.fetching import check_hash, commands, conversion_options
from sendvae_fast.weights.needs import files_of


def test_every_file_that_a_packaged_config_names_is_in_the_list():
    named = {path for path in packaged_configs().values() for path in weights_in(read_config(path)).values()}
    assert named <= set(catalog())
    assert len(named) > 10


def test_every_foundation_model_has_a_file_as_timm_publishes_it():
    for name in RECIPES:
        files = [file for file in catalog().values() if file.what == f"foundation model {name}"]
        assert len(files) == 1 and (files[0].hub or files[0].url), name
    dinov2 = catalog()["pretrained/dinov2-vit-b.safetensors"]
    assert dinov2.hub == "timm/vit_base_patch14_dinov2.lvd142m" and dinov2.licence == "apache-2.0"
    assert catalog()["pretrained/IN1K-vit.h.14-300e.pth.tar"].url.startswith("https://dl.fbaipublicfiles.com/ijepa/")


def test_hashes_are_those_in_the_files_names():
    """PyTorch names its files by the first digits of their sha256."""
    for file in catalog().values():
        digits = re.search(r"-([0-9a-f]{8})\.pth$", file.path)
        assert (file.sha256 is None) == (digits is None), file.path
        assert digits is None or file.sha256.startswith(digits[1])
    assert catalog()[f"pretrained/{FILE}"].sha256 == SHA256 and len(SHA256) == 64


def test_who_needs_what():
    needed = needed_by()
    assert "vae/send_vae_f16d32" in needed["pretrained/vavae-f16d32"]
    assert "vae/sd_vae" not in needed["pretrained/vavae-f16d32"]
    assert needed[f"pretrained/{FILE}"] == ("evaluate",)
    assert "sit/xl_1" in needed["pretrained/dinov2-vit-b.safetensors"]


def test_the_commands_end_at_the_path_that_configs_name():
    for path, file in catalog().items():
        lines = commands(file)
        assert lines and lines[-1].split()[-1 if file.url is None else -2].removeprefix("--out=") == path, lines
    (send,) = [file for file in files_of(["vae/send_vae_f16d32"]) if file.path == "pretrained/vavae-f16d32"]
    options = conversion_options(send)
    assert options == {
        "source": "downloads/vavae-f16d32/vavae-imagenet256-f16d32-dinov2.pt",
        "stats": "downloads/vavae-f16d32/latents_stats.pt",
        "to": "sendvae",
        "out": "pretrained/vavae-f16d32",
    }


def test_the_page_on_stage_1_gives_the_commands_that_fetch_prints():
    page = (Path(__file__).parents[2] / "docs" / "stage1.md").read_text()
    section = page.partition("## 2. Weights")[2].partition("## 3.")[0].replace("\\\n", "")
    shown = {
        " ".join(line.split())
        for line in section.splitlines()
        if re.match("    (hf|curl|mkdir|cp|sendvae convert) ", line)
    }
    printed = {" ".join(line.split()) for file in catalog().values() for line in commands(file)}
    assert shown <= printed, shown - printed
    needed = {line for file in files_of(["vae/send_vae_f16d32"]) for line in commands(file)}
    assert needed <= shown, needed - shown


def test_another_file_than_the_published_one_is_refused(tmp_path):
    (tmp_path / "vgg.pth").write_bytes(b"something else")
    with pytest.raises(UserError, match="is not the published file: its sha256 is [0-9a-f]{64}, not 397923af"):
        check_hash(catalog()["pretrained/vgg16-397923af.pth"], tmp_path / "vgg.pth")


def test_list_and_fetch_print(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["weights", "list", "vae/send_vae_f16d32"]) == 0
    out = capsys.readouterr().out
    assert out.count("(not here)") == 4 and "licence apache-2.0" in out and "sha256 unknown" in out
    assert main(["weights", "fetch", "vae/send_vae_f16d32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "curl -L --create-dirs -o pretrained/vgg16-397923af.pth" in "\n".join(lines)
    assert sum(line.startswith("hf download") for line in lines) == 3
    assert not list(tmp_path.iterdir())


def test_check_looks_at_all_at_once(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained" / "vgg16-397923af.pth").write_bytes(b"something else")
    (tmp_path / "pretrained" / "dinov2-vit-b.safetensors").write_bytes(b"\0" * 20)
    assert main(["weights", "check", "train", "vae", "--config", "vae/send_vae_f16d32"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.startswith("missing or damaged") for line in lines)
    text = "\n".join(lines)
    assert "init_from: pretrained/vavae-f16d32 is not there; fetch it: hf download hustvl/" in text
    assert "is damaged, or no file of its kind" in text and "not the published file" in text


def test_a_download_that_fails_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def no_network(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_network)
    assert main(["weights", "fetch", "vae/in_vae_scratch", "--download"]) == 2
    err = capsys.readouterr().err
    assert "could not be fetched from https://download.pytorch.org" in err and len(err.strip().splitlines()) == 1


def test_a_download_is_checked_and_put_in_its_place(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = b"the published weights"

    def fetched(repository, name, local_dir):
        path = tmp_path / local_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
    (tmp_path / "own.yaml").write_text("repa: {foundation: {weights: pretrained/mae-vit-l.safetensors}}")
    assert main(["weights", "fetch", "own.yaml", "--download"]) == 0
    assert (tmp_path / "pretrained" / "mae-vit-l.safetensors").read_bytes() == content
