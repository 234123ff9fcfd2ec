"""Paths that are not what they should be: names whose bytes are no text, far too long, of things that are no files."""

import os

import pytest

from sendvae_fast.cli.main import main
from sendvae_fast.data.catalog import Catalog

NOT_TEXT = os.fsdecode(b"n\xff x")


@pytest.fixture
def odd(tmp_path):
    folder = tmp_path / NOT_TEXT
    folder.mkdir()
    return folder


@pytest.mark.slow
def test_pictures_may_lie_in_a_folder_whose_name_is_no_text(odd, capsys):
    assert main(["data", "synth", f"{odd}/pictures", "--num_images=24", "--size=16"]) == 0
    catalog = f"{odd}/pictures.catalog.parquet"
    assert main(["data", "index", f"{odd}/pictures", "--num_workers=1"]) == 0
    assert main(["data", "check", catalog]) == 0
    assert main(["data", "pack", catalog, f"--out={odd}/packed", "--num_workers=1"]) == 0
    assert "n\\udcff x/packed: 24 samples" in capsys.readouterr().out
    indexed, packed = Catalog.open(catalog), Catalog.open(odd / "packed")
    assert [packed.read(i) for i in range(24)] == [indexed.read(i) for i in range(24)]


WRITES = {
    "train vae": ["train", "vae", "--run={odd}/run", "--data.root=pictures"],
    "train sit": ["train", "sit", "--run={odd}/run", "--latents=latents"],
    "cache-latents": ["cache-latents", "--out={odd}/latents", "--autoencoder=a", "--data=pictures"],
    "sample": ["sample", "--out={odd}/samples", "--generator=g", "--autoencoder=a"],
    "demo": ["demo", "--run={odd}/demo"],
}


@pytest.mark.parametrize("verb", WRITES)
def test_tensors_are_not_written_where_safetensors_would_not_read_them(verb, odd, capsys):
    assert main([argument.format(odd=odd) for argument in WRITES[verb]]) == 2
    error = capsys.readouterr().err
    assert "must be a path in UTF-8" in error and error.count("\n") == 1
    assert not list(odd.iterdir())


def test_weights_there_are_refused_by_their_path(odd, capsys):
    (odd / "model.safetensors").write_bytes(b"")
    assert main(["convert", f"--source={odd}/model.safetensors", f"--out={odd.parent}/out", "--to=diffusers"]) == 2
    error = capsys.readouterr().err
    assert "is not UTF-8" in error and error.count("\n") == 1


PATHS = {
    "a name of 5,000 letters": "x" * 5000,
    "a NUL in the name": "a\0b",
    "a folder in a file": "{file}/x",
    "a file of the system": "/proc/self/mem",
    "a pipe": "{pipe}",
    "an empty name": "",
    "10^11 shards": "{tmp}/t-{{000..99999999999}}.tar",
    "10^12 shards": "{tmp}/{{0..999999}}{{0..999999}}.tar",
    "forty braces": "{{a,b}}" * 40,
}
READERS = {
    "data check": ["data", "check", "{path}"],
    "data index": ["data", "index", "{path}", "--out={tmp}/c.parquet"],
    "data pack": ["data", "pack", "{path}", "--out={tmp}/packed"],
    "report": ["report", "{path}"],
    "train vae": ["train", "vae", "--run={tmp}/run", "--data.root={path}"],
    "config": ["train", "vae", "--config={path}"],
    "convert": ["convert", "--source={path}", "--out={tmp}/out", "--to=diffusers"],
    "evaluate": ["evaluate", "reconstruction", "--autoencoder={path}", "--data={path}"],
}


ALL_KINDS = ("data check", "report", "config", "convert")
"""Verbs that are tried with every kind; the others, which take seconds each, with three."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "kind"),
    [(verb, kind) for verb in READERS for kind in (PATHS if verb in ALL_KINDS else [*PATHS][:1] + [*PATHS][4:7:2])],
)
def test_an_odd_path_is_one_line(verb, kind, tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.parquet")
    places = {"tmp": tmp_path, "file": tmp_path / "file", "pipe": tmp_path / "pipe.parquet"}
    path = PATHS[kind].format(**places)
    code = main([argument.format(path=path, tmp=tmp_path) for argument in READERS[verb]])
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and "unexpected" not in error
