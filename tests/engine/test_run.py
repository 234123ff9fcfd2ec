import dataclasses
import enum
import json
import os
from pathlib import Path

import pytest
import yaml

from sendvae_fast.config import plain
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.run import RunDirectory, config_hash
from sendvae_fast.errors import UserError


class Kind(enum.Enum):
    SMALL = "small"


@dataclasses.dataclass(kw_only=True)
class Model:
    width: int = 8
    kind: Kind = Kind.SMALL
    multipliers: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(kw_only=True)
class Config:
    model: Model = dataclasses.field(default_factory=Model)
    data: Path = Path("photos")
    num_steps: int = 10


def finish_a_checkpoint(run):
    directory = run.checkpoints / "step_00000001"
    directory.mkdir()
    (directory / "manifest.json").write_text("{}")


def test_writes_what_was_asked_and_where_it_ran(tmp_path):
    run = RunDirectory(tmp_path / "runs" / "a", Config(), Distributed())
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == {
        "model": {"width": 8, "kind": "small", "multipliers": [1, 2]},
        "data": "photos",
        "num_steps": 10,
    }
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["packages"]["torch"] and environment["command"] and environment["cpu_cores"] >= 1
    assert run.checkpoints.is_dir() and run.samples.is_dir()


def test_every_start_is_kept(tmp_path, monkeypatch, capsys):
    for command in ("first", "second", "third"):
        monkeypatch.setattr("sys.argv", [command])
        RunDirectory(tmp_path, Config(), Distributed())
    facts = json.loads((tmp_path / "environment.json").read_text())
    assert facts["command"] == "third" and facts["started"]
    assert [start["command"] for start in facts["earlier_starts"]] == ["first", "second"]
    assert all(start["packages"]["torch"] and "earlier_starts" not in start for start in facts["earlier_starts"])
    (tmp_path / "environment.json").write_text("[1")
    RunDirectory(tmp_path, Config(), Distributed())
    assert json.loads((tmp_path / "environment.json").read_text())["earlier_starts"] == []
    assert "environment.json is damaged" in capsys.readouterr().err


def test_settings_may_change_until_there_is_a_checkpoint(tmp_path):
    RunDirectory(tmp_path, Config(), Distributed())
    run = RunDirectory(tmp_path, Config(num_steps=20), Distributed())
    assert yaml.safe_load((run.path / "config.yaml").read_text())["num_steps"] == 20


def test_other_settings_are_refused_by_name_afterwards(tmp_path):
    finish_a_checkpoint(RunDirectory(tmp_path, Config(), Distributed()))
    RunDirectory(tmp_path, Config(), Distributed())
    with pytest.raises(UserError, match=r"model\.width was 8, now 16.*config\.yaml.*new run directory"):
        RunDirectory(tmp_path, Config(model=Model(width=16)), Distributed(), may_change=["num_steps"])
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]["width"] == 8


def test_what_may_change_may(tmp_path):
    first = RunDirectory(tmp_path, Config(), Distributed(), may_change=["num_steps", "model"])
    finish_a_checkpoint(first)
    second = RunDirectory(
        tmp_path, Config(num_steps=99, model=Model(width=1)), Distributed(), may_change=["num_steps", "model"]
    )
    assert second.config_hash == first.config_hash
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["num_steps"] == 99


def test_hash_follows_every_setting():
    hashes = {
        config_hash(Config()),
        config_hash(Config(num_steps=1)),
        config_hash(Config(model=Model(width=1))),
        config_hash(Config(data=Path("x"))),
    }
    assert len(hashes) == 4
    assert config_hash(Config()) == config_hash(Config())
    assert plain(Config())["model"]["kind"] == "small"


def test_unusable_directory_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot use run directory .*file/run"):
        RunDirectory(tmp_path / "file" / "run", Config(), Distributed())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_directory_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        RunDirectory(tmp_path / "run", Config(), Distributed())


def test_spoiled_config_is_one_line(tmp_path):
    finish_a_checkpoint(RunDirectory(tmp_path, Config(), Distributed()))
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not valid YAML"):
        RunDirectory(tmp_path, Config(), Distributed())
