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

from sendvae_fast.engine.background_saver import BackgroundSaver
from sendvae_fast.engine.checkpoint import Checkpointer
from sendvae_fast.engine.distributed import init_distributed, says_as_first_rank
from sendvae_fast.engine.metrics import MetricsLogger
from sendvae_fast.engine.run import RunDirectory
from sendvae_fast.engine.settings import OptimizerConfig
from sendvae_fast.engine.signals import StopOnSignal
from sendvae_fast.engine.snapshot import Snapshot
from sendvae_fast.errors import UserError
from sendvae_fast.files import save_tensors


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


def every_rank_flushes_its_own_files(_, folder: Path) -> None:
    """Flushing is for the machine that wrote a file, and would cost another one a pass over it."""
    ranks, flushed = init_distributed("cpu"), []
    fsync = os.fsync

    def seen(descriptor: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def write(directory: Path) -> None:
        save_tensors(directory / f"rank{ranks.rank}.safetensors", {"value": torch.ones(3)})

    os.fsync = seen
    try:
        path = Checkpointer(folder, ranks).save(1, write)
    finally:
        os.fsync = fsync
    names = [f"rank{ranks.rank}.safetensors", *(["manifest.json"] if ranks.is_main else [])]
    written = [other for other in flushed if ".safetensors" in other.name or "manifest" in other.name]
    assert len(written) == len(names), flushed
    assert all(name in other.name for name, other in zip(names, written, strict=True)), flushed
    assert sorted(file.name for file in path.iterdir()) == [
        "manifest.json", "rank0.safetensors", "rank1.safetensors"
    ]  # fmt: skip


def saves_beside_the_steps(_, folder: Path) -> None:
    """Ranks write at different speeds while they train on; an error of one surfaces on all at the same step."""
    ranks = init_distributed("cpu")

    def take(step: int, error: Exception | None = None):
        def take_step(snapshot: Snapshot):
            value = snapshot.copy("value", torch.full((3,), float(step)))

            def write(directory: Path) -> None:
                time.sleep(0.1 + 0.2 * ranks.rank)
                if error is not None and ranks.rank == 1:
                    raise error
                save_tensors(directory / f"rank{ranks.rank}.safetensors", {"value": value})

            return write

        return take_step

    with ranks.beside() as writers:
        saver = BackgroundSaver(Checkpointer(folder, writers, keep=1), ranks)
        made = 0

        def steps_beside() -> None:
            nonlocal made
            while saver.is_writing:
                made += 1
                assert ranks.all_reduce_sum(torch.tensor(made)).item() == 2 * made  # and nobody else's number
                time.sleep(0.002)
                saver.settle()

        for step, error in ((1, None), (2, OSError(28, "No space left on device"))):
            saver.begin(step, take(step, error))
            steps_beside()
        assert made > 10, "nothing ran beside the writers"
        saver.begin(3, take(3, ValueError("a bug")))
        with pytest.raises(ValueError if ranks.rank == 1 else RuntimeError, match="a bug"):
            steps_beside()
        assert not saver.is_writing and ranks.gather_objects(made) == [made] * 2
    assert [directory.name for directory in folder.iterdir()] == ["step_00000001"]


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


def what_all_ranks_say_is_said_once(_, folder: Path) -> None:
    ranks = init_distributed("cpu")
    assert says_as_first_rank("the weights are broken") == (ranks.rank == 1)
    ranks.barrier()
    assert not says_as_first_rank(f"rank {ranks.rank} has lost its disk")


RANK_CASES = [
    what_all_ranks_say_is_said_once,
    checkpoint_of_two_ranks,
    every_rank_flushes_its_own_files,
    saves_beside_the_steps,
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
