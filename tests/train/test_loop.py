"""The loop that both stages share, with a stage that does nothing."""

import errno
import gzip
import itertools
import json
import math
import os
import signal
from typing import NamedTuple

import pytest
import torch

from sendvae_fast.engine.distributed import Distributed, init_distributed
from sendvae_fast.engine.run import RunDirectory
from sendvae_fast.engine.settings import OptimizerConfig
from sendvae_fast.errors import UserError
from sendvae_fast.train.loop import fit
from sendvae_fast.train.memory_advice import advice
from sendvae_fast.train.settings import LoopConfig
from sendvae_fast.train.skipped_steps import MAX_SKIPPED_STEPS


class Batch(NamedTuple):
    ids: torch.Tensor


class IdleStage:
    title, dtype, learning_rate, flops_by_part = "idle", torch.float32, 1e-4, {"idling": 1000}

    def facts(self):
        return {"pictures": "none"}

    def next_command(self):
        return "sendvae sample"

    def __init__(self, grad_norm):
        self.grad_norm, self.steps = grad_norm, []

    def batches(self, start_step):
        return (Batch(torch.tensor([step, step + 1])) for step in itertools.count(start_step))

    def train_step(self, step, batch):
        self.steps.append(step)
        return {"loss": 1.0, "grad_norm": self.grad_norm(step)}

    def snapshot(self, snapshot):
        return lambda directory: (directory / "weights").touch()

    def load(self, directory):
        pass

    def preview(self, step, directory):
        pass


def train(stage, run, num_steps, **settings):
    config, ranks = LoopConfig(num_steps=num_steps, save_every=50, **settings), init_distributed("cpu")
    return fit(stage, config, RunDirectory(run, OptimizerConfig(), ranks), 1, ranks)


def test_milestones_are_saved_whatever_save_every_says(tmp_path):
    """save_every is 50 here: 30, 60 and 90 are saved for themselves, and stay."""
    assert train(IdleStage(lambda step: 1.0), tmp_path / "run", 110, keep_every=30, keep_checkpoints=1) == 0
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [f"step_{step:08d}" for step in (30, 60, 90, 110)]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_run_that_only_skips_is_stopped(broken, tmp_path):
    stage = IdleStage(lambda step: broken if step >= 60 else 1.0)
    with pytest.raises(UserError, match=f"gradients of 100 steps in a row, up to step {60 + MAX_SKIPPED_STEPS}"):
        train(stage, tmp_path / "run", 1000)
    assert stage.steps[-1] + 1 == 60 + MAX_SKIPPED_STEPS
    assert (tmp_path / "run" / "checkpoints" / "step_00000150" / "manifest.json").exists()


@pytest.mark.parametrize("ending", ["the last step", "a signal"])
def test_a_full_disk_at_the_end_is_an_error(ending, tmp_path, capsys):
    class FullDisk(IdleStage):
        def snapshot(self, snapshot):
            def write(directory):
                raise OSError(errno.ENOSPC, "No space left on device")

            return write

        def train_step(self, step, batch):
            if ending == "a signal" and step == 70:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().train_step(step, batch)

    assert train(IdleStage(lambda step: 1.0), tmp_path / "run", 50) == 0
    with pytest.raises(UserError, match=r"could not be written.*newest checkpoint is step_00000050.*make room"):
        train(FullDisk(lambda step: 1.0), tmp_path / "run", 80)
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000050"]


@pytest.mark.parametrize(("first", "num_made"), [(50, 150), (60, 161)])
def test_norms_on_the_device_are_read_a_step_late_but_before_a_checkpoint(first, num_made, tmp_path):
    stage = IdleStage(lambda step: torch.tensor(math.nan if step >= first else 1.0))
    with pytest.raises(UserError, match=f"gradients of 100 steps in a row, up to step {first + MAX_SKIPPED_STEPS},"):
        train(stage, tmp_path / "run", 1000)
    assert len(stage.steps) == num_made
    saved = max(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == ("step_00000100" if first == 50 else "step_00000150")


def test_single_skipped_steps_stop_nothing(tmp_path):
    stage = IdleStage(lambda step: 1.0 if step % MAX_SKIPPED_STEPS == 0 else math.nan)
    assert train(stage, tmp_path / "run", 3 * MAX_SKIPPED_STEPS) == 0


def test_a_window_of_steps_is_profiled(tmp_path, capsys):
    class Multiplying(IdleStage):
        def train_step(self, step, batch):
            torch.ones(8, 8) @ torch.ones(8, 8)
            return super().train_step(step, batch)

    assert train(Multiplying(lambda step: 1.0), tmp_path / "run", 15, profile_steps=3) == 0
    rows = [line.split() for line in (tmp_path / "run" / "profile" / "summary.txt").read_text().splitlines()]
    (product,) = (row for row in rows if row and row[0] == "aten::mm")
    assert product[-1] == "3"  # calls: one a step
    with gzip.open(tmp_path / "run" / "profile" / "trace.json.gz") as trace:
        assert json.load(trace)["traceEvents"]
    assert [path.name for path in (tmp_path / "run" / "profile").iterdir() if path.name.startswith(".")] == []
    assert "summary.txt" in capsys.readouterr().err


def test_a_profile_that_cannot_be_written_stops_nothing(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").touch()
    assert train(IdleStage(lambda step: 1.0), tmp_path / "run", 15, profile_steps=3) == 0
    assert "profile was not written" in capsys.readouterr().err


def test_out_of_memory_says_which_settings_need_less(tmp_path):
    def no_memory(step):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(UserError, match=r"rank 0 has no memory left on cpu: try, .*newest checkpoint"):
        train(IdleStage(no_memory), tmp_path / "run", 5)


@pytest.mark.parametrize(
    ("engine", "world_size", "ways"),
    [
        (
            {"name": "ddp", "precision": "fp32"},
            1,
            ["accumulation_steps=2 (then 16 ", "recompute", "bf16", "global_batch"],
        ),
        ({"name": "ddp", "accumulation_steps": 32, "recompute": True}, 1, ["smaller data.global_batch (now 32"]),
        (
            {"name": "deepspeed", "zero_stage": 1},
            4,
            ["accumulation_steps=2 (then 4 ", "recompute", "zero_stage=2", "batch"],
        ),
        ({"name": "deepspeed", "zero_stage": 3}, 4, ["accumulation_steps=2", "global_batch"]),
        ({"name": "ddp"}, 32, ["recompute", "engine.name=deepspeed engine.zero_stage=1", "global_batch"]),
    ],
)
def test_advice_names_only_what_is_left_to_do(engine, world_size, ways):
    words = advice({"engine": engine, "data": {"global_batch": 32}}, Distributed(world_size=world_size))
    parts = words.removeprefix("try, in this order, ").split("; ")
    assert len([part for part in parts if part != "another run)"]) == len(ways), parts
    assert all(way in part for way, part in zip(ways, parts, strict=False)), parts
