"""The directory of a run: its configuration, its environment and its results."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from sendvae_fast.checks import ADDED_LATER
from sendvae_fast.config import plain
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.run_lock import lock_run
from sendvae_fast.errors import UserError
from sendvae_fast.files import write_atomic
from sendvae_fast.reading import read_json, read_yaml, reading
from sendvae_fast.version import __version__, package_commit

PACKAGES = ("torch", "torchvision", "triton", "deepspeed", "timm", "numpy", "pillow", "safetensors")
NUM_CHANGES_SHOWN = 3


class RunDirectory:
    """`runs/<name>`: made on first use, resumed when given again with the same configuration. Collective.

        config.yaml  environment.json  run.lock  metrics.jsonl  tensorboard/  samples/  checkpoints/

    Args:
        path: the directory.
        config: the resolved configuration, a dataclass of plain values and further dataclasses.
        distributed: the ranks of the run.
        may_change: dotted keys (or whole sections) that may differ when resuming, such as "num_steps" or "engine":
            settings of how or how long to compute rather than of what.
        writes: False: only look at a run that is there, which another job may be writing into.
        training_pictures: how many there are, for environment.json: epochs are counted by it.

    Raises:
        UserError: the directory holds checkpoints of another configuration, another job is writing into it, or it
            cannot be written.
    """

    def __init__(
        self,
        path: Path | str,
        config: Any,
        distributed: Distributed,
        may_change: Collection[str] = (),
        *,
        writes: bool = True,
        training_pictures: int | None = None,
    ) -> None:
        self.path = Path(path)
        self.checkpoints, self.samples = self.path / "checkpoints", self.path / "samples"
        self.metrics, self.tensorboard = self.path / "metrics.jsonl", self.path / "tensorboard"
        self.config = plain(config)
        self.config_hash = config_hash(config, may_change)
        may_change = {*may_change, *_later_defaults(config)}  # a run begun before such a field does not have it
        problem = None
        if distributed.is_main:
            facts = {"world_size": distributed.world_size, "training_pictures": training_pictures}
            problem = self._prepare(may_change, facts) if writes else self._look(may_change)
        problem = distributed.broadcast_object(problem)
        if problem is not None:
            raise UserError(problem)

    def _prepare(self, may_change: Collection[str], facts: dict[str, int | None]) -> str | None:
        """Rank 0: make and fill the directory; returns an error for the user, if any."""
        try:
            for directory in (self.checkpoints, self.samples):
                directory.mkdir(parents=True, exist_ok=True)
            lock_run(self.path)
            recorded = self.path / "config.yaml"
            if recorded.exists() and any(self.checkpoints.glob("step_*/manifest.json")):
                self._check_settings(recorded, may_change)
            write_atomic(recorded, yaml.safe_dump(self.config, sort_keys=False))
            self._record_start({**environment(), **facts})
        except UserError as error:
            return str(error)
        except OSError as error:
            return f"cannot use run directory {self.path} ({error.strerror}): choose another place"
        return None

    def _look(self, may_change: Collection[str]) -> str | None:
        """Rank 0: compare settings with those of the run that is there; returns an error for the user, if any."""
        recorded = self.path / "config.yaml"
        if not recorded.exists():
            return f"there is no run in {self.path} (no {recorded.name}): give the directory of one"
        try:
            self._check_settings(recorded, may_change)
        except UserError as error:
            return str(error)
        return None

    def _check_settings(self, recorded: Path, may_change: Collection[str]) -> None:
        """Raise a UserError where the recorded settings are others than may have changed."""
        changes = recorded_changes(recorded, self.config, may_change, "repair it, or start a new run directory")
        if changes:
            raise UserError(
                f"{self.path} was started with other settings ({changes}): repeat the settings in {recorded}, or start "
                "a new run directory"
            )

    def _record_start(self, facts: dict[str, Any]) -> None:
        """Write the facts of this start into environment.json, with those of earlier starts behind them."""
        path = self.path / "environment.json"
        earlier: list[Any] = []
        if path.exists():
            try:
                last = read_json(path, "remove it")
                earlier = [*last.pop("earlier_starts", []), last]
            except (UserError, TypeError):
                print(f"warning: {path} is damaged; what it said of earlier starts is lost", file=sys.stderr)
        facts = {"started": time.strftime("%FT%T%z"), **facts, "earlier_starts": earlier}
        write_atomic(path, json.dumps(facts, indent=1) + "\n")


def config_hash(config: Any, may_change: Collection[str] = ()) -> str:
    """Sixteen hex digits, a hash of the configuration without the `may_change` keys and sections.

    Nor do fields count that are `checks.ADDED_LATER` and have their default: runs begun before them go on.
    """
    left_out = {*may_change, *_later_defaults(config)}
    kept = {key: value for key, value in flat(plain(config)).items() if not _covers(left_out, key)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def _later_defaults(config: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of fields that were added later and have their default."""
    if not dataclasses.is_dataclass(config):
        return
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.metadata.get(ADDED_LATER) and value == field.default:
            yield prefix + field.name
        yield from _later_defaults(value, f"{prefix}{field.name}.")


def describe_changes(old: Any, new: dict[str, Any], may_change: Collection[str] = ()) -> str:
    """The differences of two configurations of plain values, for the user: "seed was 0, now 1"; "" if there is none."""
    changes = _changes(old, new, may_change)
    shown = [f"{key} was {before}, now {after}" for key, (before, after) in list(changes.items())[:NUM_CHANGES_SHOWN]]
    more = len(changes) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more > 0 else "")


def recorded_changes(path: Path, new: dict[str, Any], may_change: Collection[str], remedy: str) -> str:
    """`describe_changes` from the settings in a YAML file to `new`. UserError, with `remedy`, if it is broken."""
    before = read_yaml(path, remedy)
    with reading(path, remedy):
        return describe_changes(before, new, may_change)


def environment() -> dict[str, Any]:
    """The facts besides the configuration that a result depends on: versions, machine, devices, code, command."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "sendvae_fast": __version__,
        "git_commit": package_commit(),
        "command": shlex.join(sys.argv),
        "python": platform.python_version(),
        "packages": versions,
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "platform": platform.platform(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
    }


def flat(tree: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots: {"a": {"b": 1}} as {"a.b": 1}."""
    found = {}
    for key, value in tree.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found


def _covers(keys: Collection[str], key: str) -> bool:
    return any(key == covered or key.startswith(covered + ".") for covered in keys)


def _changes(old: Any, new: dict[str, Any], may_change: Collection[str]) -> dict[str, tuple[Any, Any]]:
    flat_old, flat_new = flat(old if isinstance(old, dict) else {}), flat(new)
    return {
        key: (flat_old.get(key), flat_new.get(key))
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key) != flat_new.get(key) and not _covers(may_change, key)
    }
