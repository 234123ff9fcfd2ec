"""Configs: strict keys, base files, overrides."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from sendvae_fast.config import (
    build_config,
    find_config,
    flag_keys,
    load_config,
    packaged_configs,
    parse_overrides,
    plain,
    read_config,
    read_files,
)
from sendvae_fast.errors import UserError


@dataclass(kw_only=True)
class Inner:
    """Inner things."""

    size: int = 4
    """A size."""
    kind: Literal["l1", "l2"] = "l1"
    """A kind."""
    sizes: tuple[int, ...] = (1, 2)
    """Sizes."""

    def __post_init__(self):
        if self.size < 0:
            raise UserError("inner.size must be positive")


@dataclass(kw_only=True)
class Named:
    """A thing with a name."""

    name: str
    """Its name."""
    size: int = 4
    """Its size."""


@dataclass(kw_only=True)
class Outer:
    """Outer things."""

    run: str
    """A run."""
    inner: Inner = field(default_factory=Inner)
    """Inner."""
    maybe: Inner | None = None
    """Maybe."""
    named: Named | None = None
    """Maybe, with a name."""
    number: float | None = None
    """A number."""
    quick: bool = False
    """A flag."""
    parts: tuple[Inner, ...] = ()
    """Several."""


def load(*arguments: str, files: list[Path] | None = None) -> Outer:
    return load_config(Outer, files or [], parse_overrides(list(arguments), flag_keys(Outer)))


def test_overrides_reach_nested_fields_and_are_typed():
    config = load("--run=x", "--inner.size", "7", "--inner.sizes=[3, 4]", "--maybe.kind=l2", "--quick")
    assert config == Outer(run="x", inner=Inner(size=7, sizes=(3, 4)), maybe=Inner(kind="l2"), quick=True)


def test_files_merge_over_their_base_and_overrides_win(tmp_path):
    (tmp_path / "base.yaml").write_text("run: b\ninner: {size: 1, kind: l2}\n")
    (tmp_path / "top.yaml").write_text("base: base.yaml\ninner: {size: 2}\n")
    assert load(files=[tmp_path / "top.yaml"]).inner == Inner(size=2, kind="l2")
    assert load("--inner.size=3", files=[tmp_path / "top.yaml"]).inner == Inner(size=3, kind="l2")


def test_a_config_survives_the_round_trip():
    config = load("--run=x", "--maybe.size=9")
    assert build_config(Outer, plain(config)) == config


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--run=x", "--inner.sise=3"], "unknown key inner.sise; did you mean inner.size"),
        (["--runn=x"], "unknown key runn; did you mean run"),
        (["--inner.size=3"], "run"),
        (["--run=x", "--inner.size=big"], "inner.size"),
        (["--run=x", "--inner.kind=l3"], "l3"),
        (["--run=x", "--inner.size=-3"], "inner.size must be positive"),
        (["--run=x", "--maybe.size=-3"], "inner.size must be positive"),
        (["--run=x", "--maybe.size=big"], 'key "maybe": '),
        (["--run=x", "--maybe.kind=l3"], 'key "maybe": '),
        (["--run=x", "--named.size=3"], 'key "named": the following arguments are required: name'),
        (["--run=x", "--number=ten"], "key \"number\": Expected a <class 'float'>. Got value: ten"),
        (["--run=x", "--inner.sizes=3,4"], 'key "inner.sizes": Expected a list in brackets, as [1,2]. Got value: 3,4'),
        (["--run"], "--run needs a value"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(arguments, words):
    with pytest.raises(UserError) as caught:
        load(*arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert "Union" not in str(caught.value) and "Namespace" not in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ("[{sise: 3}]", r"unknown key parts\[0\].sise; did you mean parts\[0\].size"),
        ("[{size: 3}, large]", r"parts\[1\] is 'large'; give it keys of size, "),
    ],
)
def test_mistakes_in_a_list_of_settings_name_their_place(tmp_path, parts, words):
    file = tmp_path / "top.yaml"
    file.write_text(f"run: x\nparts: {parts}\n")
    with pytest.raises(UserError, match=words):
        load(files=[file])
    content = {"run": "x", "parts": [{"size": 3}]}
    for _ in range(2):  # which leaves what it was given as it was
        assert build_config(Outer, content).parts[0].size == 3


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "latin.yaml").write_bytes("run: café\n".encode("latin-1"))
    (tmp_path / "lost.yaml").write_text("base: gone.yaml\n")
    wrong = {"broken": "not valid YAML", "list": "key: value", "latin": "not UTF-8 text at byte 8", "lost": "gone"}
    for name, words in {"missing": "cannot read", **wrong}.items():
        with pytest.raises(UserError, match=words):
            read_config(tmp_path / f"{name}.yaml")


def test_a_packaged_config_is_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_name = find_config("vae/f16d16")
    assert by_name == find_config("vae/f16d16.yaml") == packaged_configs()["vae/f16d16"] and by_name.is_absolute()
    assert read_files([Path("demo/vae_send"), Path("demo/sit")])["data"]["global_batch"] == 24
    (tmp_path / "own.yaml").write_text("base: vae/f16d16\nseed: 3\n")
    own = read_files([Path("own.yaml")])
    assert own["seed"] == 3 and own["init_from"] == read_config(by_name)["init_from"]


def test_a_file_that_exists_wins_over_a_packaged_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    for name in ("vae.yaml", "vae"):
        (tmp_path / "demo" / name).write_text("run: mine\n")
        assert read_files([Path("demo") / name]) == {"run": "mine"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vea/f16d16", "did you mean vae/f16d16"),
        ("configs/vae/f16d16.yaml", "did you mean vae/f16d16"),
        ("send_vae_f16d32", "did you mean vae/send_vae_f16d32"),
        ("qqqqqqqq", "`sendvae config list`"),
    ],
)
def test_an_unknown_name_gets_the_nearest(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="neither a file nor a packaged config") as caught:
        find_config(name)
    assert words in str(caught.value) and name in str(caught.value)
