"""Run on two ranks by test_engine.py: all cases in one pair of processes."""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import engine_cases
import pytest
import torch
from engine_cases import CASES, ENGINES

from sendvae_fast.engine import checkpoint
from sendvae_fast.engine.checkpoint import Checkpointer
from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.engine.metrics import MetricsLogger
from sendvae_fast.engine.optimizer import OptimizerConfig
from sendvae_fast.engine.run import RunDirectory
from sendvae_fast.engine.signals import StopOnSignal
from sendvae_fast.errors import UserError


def checkpoint_of_two_ranks(_, folder: Path) -> None:
    """Every rank's file is in the checkpoint; one rank's trouble is everybody's."""
    ranks = init_distributed("cpu")
    checkpointer = Checkpointer(folder, ranks, keep=1)

    def write(directory: Path) -> None:
        (directory / f"rank{ranks.rank}").write_text(str(ranks.rank))

    path = checkpointer.save(1, write)
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "rank0", "rank1"]

    def fail_on_rank_1(error: Exception):
        def write_or_fail(directory: Path) -> None:
            write(directory)
            if ranks.rank == 1:
                raise error

        return write_or_fail

    assert checkpointer.save(2, fail_on_rank_1(OSError(28, "No space left on device"))) is None
    with pytest.raises(ValueError if ranks.rank == 1 else RuntimeError, match="a bug"):
        checkpointer.save(2, fail_on_rank_1(ValueError("a bug")))
    assert checkpointer.load_latest() == (1, path)
    assert checkpointer.save(3, write) is not None
    assert [directory.name for directory in folder.iterdir()] == ["step_00000003"]

    with pytest.raises(UserError, match="other settings"):
        Checkpointer(folder, ranks, config_hash="other").load_latest()


def checkpoint_while_another_rank_renames(_, folder: Path) -> None:
    """A temporary file of one rank that is gone before another rank flushes it costs no checkpoint."""
    ranks, flush = init_distributed("cpu"), checkpoint.fsync_path

    def write(directory: Path) -> None:
        if ranks.rank == 0:
            (directory / "rank0.tmp").write_text("0")
            time.sleep(0.4)
            (directory / "rank0.tmp").rename(directory / "rank0")
        else:
            time.sleep(0.2)  # so that the temporary file is there when this rank has written its own
            (directory / "rank1").write_text("1")

    def flush_late(path: Path) -> None:
        time.sleep(0.4)
        flush(path)

    checkpoint.fsync_path = flush_late if ranks.rank == 1 else flush
    try:
        path = Checkpointer(folder, ranks).save(1, write)
    finally:
        checkpoint.fsync_path = flush
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "rank0", "rank1"]


def signal_to_one_rank(_, folder: Path) -> None:
    """Whoever gets it, all stop at the same step."""
    ranks = init_distributed("cpu")
    with StopOnSignal(ranks) as stop:
        for step in range(5):
            if step == 3 and ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if stop.requested():
                break
    assert ranks.gather_objects(step) == [3, 3]


def run_directory_of_two_ranks(_, folder: Path) -> None:
    ranks = init_distributed("cpu")
    run = RunDirectory(folder, OptimizerConfig(), ranks)
    logger = MetricsLogger(run, ranks)
    logger.log(1, {"loss": 1.0})
    logger.close()
    ranks.barrier()
    assert len(run.metrics.read_text().splitlines()) == 1


RANK_CASES = [
    checkpoint_of_two_ranks,
    checkpoint_while_another_rank_renames,
    signal_to_one_rank,
    run_directory_of_two_ranks,
]


def main() -> None:
    torch.set_num_threads(1)
    ranks, folder = init_distributed("cpu", timeout_s=300), Path(sys.argv[1])

    def load_from_one_rank(kind, _):
        # Each engine loads the save of another one.
        saver = list(ENGINES)[(list(ENGINES).index(kind) + 1) % len(ENGINES)]
        engine_cases.load_from_others(kind, folder / f"by_1_{saver}")

    outcomes = {}
    for kind in [*ENGINES, "ranks"]:
        for case in RANK_CASES if kind == "ranks" else [*CASES, load_from_one_rank]:
            scratch = folder / f"{case.__name__}-{kind}"
            scratch.mkdir(exist_ok=True)
            try:
                case(kind, scratch)
                outcome = "passed"
            except Exception:
                outcome = f"rank {ranks.rank}: {traceback.format_exc()}"
                # Also here: if the other rank now waits in a collective, it never gets to report.
                print(outcome, file=sys.stderr, flush=True)
            failed = [other for other in ranks.gather_objects(outcome) if other != "passed"]
            outcomes[scratch.name] = "\n".join(failed) or "passed"
    for kind in ENGINES:
        (folder / f"by_2_{kind}").mkdir(exist_ok=True)
        engine_cases.save_for_others(kind, folder / f"by_2_{kind}")
    if ranks.is_main:
        (folder / "outcomes.json").write_text(json.dumps(outcomes))
    ranks.close()


main()
