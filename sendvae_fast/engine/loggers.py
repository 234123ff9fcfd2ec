"""Where a run's numbers, pictures and settings go besides its own files: TensorBoard, Weights & Biases, trackio."""

from __future__ import annotations

import sqlite3
import sys
import uuid
from collections.abc import Mapping
from contextlib import closing, redirect_stdout
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml
from PIL import Image

from sendvae_fast.engine.run import RunDirectory
from sendvae_fast.engine.settings import LOGGERS, LoggingConfig
from sendvae_fast.errors import UserError, needs_extra
from sendvae_fast.files import write_atomic

ID_FILE = "logging_id"
"""In a run directory: the name under which wandb and trackio keep the run, so that it goes on when it is resumed."""
GROUPS = {
    "optimizer": ("grad_norm", "learning_rate", "gan_weight"),
    "speed": ("img_per_s", "step_ms", "data_share", "mfu"),
    "memory": ("peak_memory_gib",),
}
"""Tags by group; values of none of them are losses. A name with a slash, "evaluation/psnr", has its group already."""


class Logger(Protocol):
    """The interface of a logger. What its methods raise is a warning; see `metrics.MetricsLogger`."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name, "align", at a step."""

    def picture(self, step: int, tag: str, path: Path) -> None:
        """A PNG file at a step."""

    def close(self) -> None:
        """Write what is still to be written."""


class TensorBoard:
    """Event files in the run's folder `tensorboard/`."""

    def __init__(self, run: RunDirectory, config: LoggingConfig, last_step: int) -> None:
        with needs_extra("logging", "logging.to=[tensorboard]"):
            from torch.utils.tensorboard import SummaryWriter  # here, because it takes a second to import

        self._writer = SummaryWriter(str(run.tensorboard), purge_step=last_step + 1)
        settings = yaml.safe_dump(run.config, sort_keys=False)
        self._writer.add_text("config", "".join(f"    {line}\n" for line in settings.splitlines()), last_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in tagged(values).items():
            self._writer.add_scalar(tag, value, step)

    def picture(self, step: int, tag: str, path: Path) -> None:
        with Image.open(path, formats=("PNG",)) as picture:
            self._writer.add_image(tag, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, online or in the run's folder `wandb/`."""

    def __init__(self, run: RunDirectory, config: LoggingConfig, last_step: int) -> None:
        with needs_extra("logging", "logging.to=[wandb]"):
            import wandb  # pyright: ignore[reportMissingImports] - of an extra

        if config.wandb_mode == "online" and wandb.api.api_key is None:  # it would ask on the terminal, and wait
            raise UserError("no account is known: run `wandb login`, or set logging.wandb_mode=offline")
        self._picture = wandb.Image
        self._run: Any = wandb.init(
            project=config.project,
            name=run.path.resolve().name,
            id=_run_id(run),
            resume="allow",
            dir=str(run.path),
            config=run.config,
            mode=config.wandb_mode,
            settings=wandb.Settings(silent=True),
        )
        # wandb's own step may not go back, as ours does where a resumed run repeats steps.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **tagged(values)})

    def picture(self, step: int, tag: str, path: Path) -> None:
        self._run.log({"step": step, tag: self._picture(str(path))})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio: a local database that `trackio show` opens, without an account."""

    def __init__(self, run: RunDirectory, config: LoggingConfig, last_step: int) -> None:
        with needs_extra("logging", "logging.to=[trackio]"):
            import trackio  # pyright: ignore[reportMissingImports] - of an extra

        self._trackio: Any = trackio
        is_known = (run.path / ID_FILE).exists()
        name = f"{run.path.resolve().name}-{_run_id(run)}"
        if is_known:
            _forget_steps(config.project, name, last_step)
        with redirect_stdout(sys.stderr):
            self._run: Any = trackio.init(
                project=config.project,
                name=name,
                config=run.config,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(tagged(values), step=step)

    def picture(self, step: int, tag: str, path: Path) -> None:
        self._run.log({tag: self._trackio.Image(path)}, step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._run.finish()
        current = self._trackio.context_vars.current_run
        if current.get() is self._run:
            current.set(None)  # trackio would end it once more with Python, and say so again


def _forget_steps(project: str, run_name: str, last_step: int) -> None:
    """Remove what trackio has of an interrupted run's steps after `last_step`, which are made again.

    It has no function for that. On a network drive, where it keeps its rows in files until somebody looks at them, and
    on a server such steps stay, and are there twice.
    """
    from trackio.sqlite_storage import SQLiteStorage  # pyright: ignore[reportMissingImports] - of an extra

    database = SQLiteStorage.get_project_db_path(project)
    if not database.is_file():
        return
    try:
        with closing(sqlite3.connect(database, timeout=30)) as connection, connection:
            connection.execute("DELETE FROM metrics WHERE run_name = ? AND step > ?", (run_name, last_step))
    except sqlite3.Error as error:
        print(f"warning: trackio will show steps after {last_step:,} twice ({error})", file=sys.stderr)


CLASSES: dict[str, type[TensorBoard | Wandb | Trackio]] = dict(zip(LOGGERS, (TensorBoard, Wandb, Trackio), strict=True))
"""Loggers by name."""


def tagged(values: Mapping[str, float]) -> dict[str, float]:
    """The values by tags, which begin with their group: "loss/align" for "align"."""
    groups = {name: group for group, names in GROUPS.items() for name in names}
    return {name if "/" in name else f"{groups.get(name, 'loss')}/{name}": value for name, value in values.items()}


def _run_id(run: RunDirectory) -> str:
    path = run.path / ID_FILE
    if not path.exists():
        write_atomic(path, uuid.uuid4().hex[:8])
    return path.read_text(encoding="utf-8").strip()
