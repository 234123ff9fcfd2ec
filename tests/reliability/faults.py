"""What befalls a rank of a run: faults at one step, after which it is started again, and signals at random."""

import ctypes
import errno
import json
import math
import mmap
import os
import random
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

from process_state import is_running
from ranks import Outcomes, assert_same, run_to_the_end, start, tensors, train, wait
from scenarios import FAULT_STEP, STEPS, at_fault_step, die
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sendvae_fast.engine import watchdog
from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.engine.signals import EXIT_REQUEUE
from sendvae_fast.engine.watchdog import EXIT_STUCK


def _nan(batch):
    return batch._replace(x=batch.x * math.nan)


def _raise(batch):
    raise RuntimeError("planted")


def _full_disk(batch):
    replace = os.replace

    def fails_once(*args):
        os.replace = replace
        raise OSError(errno.ENOSPC, "No space left on device")

    os.replace = fails_once


def _jump(batch):
    now = time.time
    time.time = lambda: now() + 10 * 86400 if os.getpid() % 2 else now() - 10 * 86400


KIND, SAVED = "zero1", 2
STEP_TIMEOUT_S = 10.0
NAN = "NaN in one rank's batch"
FAULTS = {
    "an exception": (_raise, None),
    "exit": (lambda batch: os._exit(3), None),
    "SIGKILL": (lambda batch: die(), None),
    "SIGABRT": (lambda batch: os.abort(), None),
    "SIGSEGV": (lambda batch: ctypes.string_at(0), None),
    "SIGSTOP": (lambda batch: os.kill(os.getpid(), signal.SIGSTOP), EXIT_STUCK),
    "a rank that never comes to the collective": (lambda batch: time.sleep(1e6), EXIT_STUCK),
    "SIGTERM": (lambda batch: os.kill(os.getpid(), signal.SIGTERM), EXIT_REQUEUE),
    "a slow rank": (lambda batch: time.sleep(1), 0),
    NAN: (_nan, 0),
    "a full disk": (_full_disk, 0),
    "a clock that jumps by ten days": (_jump, 0),
}
"""What befalls a rank, by name: the harm, and the exit code of both ranks: None for any but 0."""


def at_a_step(folder: Path, outcomes: Outcomes, name: str) -> None:
    """A fault on the first and on the last of two ranks, started again by hand and by torchrun, to the end."""
    watchdog.BEAT_S, watchdog.SILENT_S = 0.2, 2.0
    truth, (harm, expected) = folder / "truth", FAULTS[name]
    run_to_the_end(2, partial(train, truth, KIND, STEPS), folder / "log.txt")
    for victim in (0, 1):
        for way, trial in (("started again", _struck), ("under torchrun", _struck_under_torchrun)):
            run = folder / f"{trial.__name__}{victim}"
            work = partial(trial, run, truth, name, harm, expected, victim)
            outcomes.trial(f"{name}, rank {victim}, {way}", work)


def _once_saved(run, victim, harm, ranks, step, batch):
    """`at_fault_step`, with a checkpoint to go on from: it is written beside the steps."""
    while step == FAULT_STEP and ranks.rank == victim and not (run / f"checkpoints/step_{SAVED:08d}").is_dir():
        time.sleep(0.01)
    return at_fault_step(victim, harm, ranks, step, batch)


def _struck(run, truth, name, harm, expected, victim):
    log = run.with_suffix(".log")
    fault = partial(_once_saved, run, victim, harm)
    pids = start(2, partial(train, run, KIND, STEPS, fault, step_timeout_s=STEP_TIMEOUT_S), log)
    codes = wait(pids, together=expected != EXIT_REQUEUE)  # where each is to end by itself
    said = log.read_text(errors="replace")
    if expected is None:
        assert all(code != 0 for code in codes), f"a rank ended well: {codes}"
    elif expected == EXIT_STUCK:
        assert EXIT_STUCK in codes and 0 not in codes, f"exit codes {codes}"
        assert name != "SIGSTOP" or f"rank {victim} does not answer" in said, said[-500:]
    else:
        assert codes == [expected] * 2, f"exit codes {codes}: {said[-1000:]}"
    if any(codes):
        run_to_the_end(2, partial(train, run, KIND, STEPS), log)
        _assert_goes_on(log)
    _assert_as_without(run, truth, name, victim, said)


def _struck_under_torchrun(run, truth, name, harm, expected, victim):
    """The fault befalls the first start alone; torchrun sees by itself whether there must be another."""
    log = run.with_suffix(".log")

    def fault(ranks, step, batch):
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        return _once_saved(run, victim, harm, ranks, step, batch) if first else batch

    work = partial(train, run, KIND, STEPS, fault, step_timeout_s=STEP_TIMEOUT_S)
    run_to_the_end(1, partial(_torchrun, work, run.with_suffix(".torchrun")), log)
    if expected != 0:
        _assert_goes_on(log)
    starts = len(json.loads((run / "environment.json").read_text())["earlier_starts"])
    assert starts == (0 if expected == 0 else 1), f"{starts} starts came to nothing"
    _assert_as_without(run, truth, name, victim, log.read_text(errors="replace"))


def _torchrun(work, folder):
    """What `torchrun --standalone --nproc-per-node=2 --max-restarts=1` does, by its own agent, with forks for ranks."""
    logs = DefaultLogsSpecs(log_dir=str(folder))
    launch = LaunchConfig(
        1, 1, nproc_per_node=2, max_restarts=1, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="run",
        local_addr="127.0.0.1", start_method="fork", shutdown_timeout=5, logs_specs=logs,
    )  # fmt: skip
    elastic_launch(launch, _rank)(work)


def _rank(work):
    code = work()
    init_distributed("cpu").close()
    if code:
        sys.exit(code)


def _assert_goes_on(log):
    """From a checkpoint: that at SAVED, or that of the fault's own step where a signal asks for it."""
    said = log.read_text(errors="replace")
    assert any(f"goes on after step {step}" in said for step in (SAVED, FAULT_STEP)), said[-1000:]


def _assert_as_without(run, truth, name, victim, said):
    """The run ended as one that nothing befell; but for the step that NaN costs, which is told."""
    if name != NAN:
        assert_same(tensors(run, STEPS), tensors(truth, STEPS))
        return
    directory = run / "checkpoints" / f"step_{STEPS:08d}"
    counts = json.loads((directory / "engine" / "state.json").read_text())
    assert counts["num_skipped"] == 1 and counts["num_updates"] == STEPS - 1, counts
    assert "step 4 was skipped" in said and f"on rank {victim} (samples 0, 1, 2, 3)" in said, said[-1000:]
    assert all(value.isfinite().all() for value in tensors(run, STEPS).values())


# -- chaos -------------------------------------------------------------------------------------------------------------

CHAOS_STEPS = 120
FEWEST_FAULTS = 8
"""However slow the machine, chaos goes on until so many signals have met a run; one run gets no more."""
TOO_LATE = " too late"


def chaos(folder: Path, outcomes: Outcomes, seconds_and_seed: str) -> None:
    """Signals at random moments for so many seconds; each run ends with the weights of one without faults.

    A moment is told by steps, up to 30 after a start, and by a fraction of a second more: whatever a step takes on this
    machine, some come while ranks meet, some in a step, some in a save.
    """
    watchdog.BEAT_S, watchdog.SILENT_S = 0.2, 2.0
    seconds, seed = map(float, seconds_and_seed.split(","))
    draw, until, log = random.Random(int(seed)), time.monotonic() + seconds, folder / "log.txt"
    settings = {"save_every": 10, "step_timeout_s": STEP_TIMEOUT_S}
    run_to_the_end(2, partial(train, folder / "truth", KIND, CHAOS_STEPS, **settings), log)
    number = num_faults = 0
    progress = mmap.mmap(-1, 8)

    def note(ranks, step, batch):
        if ranks.is_main:
            progress[:] = (int.from_bytes(progress[:], "little") + 1).to_bytes(8, "little")
        return batch

    while num_faults < FEWEST_FAULTS or time.monotonic() < until:
        number += 1
        run, suffered = folder / f"run{number}", []
        while True:
            progress[:] = bytes(8)
            pids = start(2, partial(train, run, KIND, CHAOS_STEPS, note, **settings), log)
            harmed = len(suffered) < FEWEST_FAULTS
            if harmed:
                _wait_for_steps(draw.choice([0, draw.randrange(1, 30)]), progress, pids)
                time.sleep(draw.uniform(0, 0.3))
                suffered.append(_harm(draw, pids))
            codes = wait(pids)
            if codes == [0, 0]:
                break
            assert harmed, f"exit codes {codes} without a fault: {log.read_text(errors='replace')[-1500:]}"
        num_faults += sum(not what.endswith(TOO_LATE) for what in suffered)
        outcomes.trial(
            f"run {number}: {', '.join(suffered)}",
            lambda run=run: assert_same(tensors(run, CHAOS_STEPS), tensors(folder / "truth", CHAOS_STEPS)),
        )
        shutil.rmtree(run)


def _wait_for_steps(count, progress, pids):
    """Wait until a run has begun so many steps, or has ended."""
    while int.from_bytes(progress[:], "little") < count and any(map(is_running, pids)):
        time.sleep(0.005)


def _harm(draw, pids):
    """Send a signal to one rank or both; what was sent, and whether it came too late."""
    what = draw.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGTERM", "SIGSTOP", "SIGABRT", "SIGKILL of both"])
    victims = pids if what.endswith("both") else [draw.choice(pids)]
    alive = [pid for pid in victims if is_running(pid)]
    for pid in alive:
        os.kill(pid, getattr(signal, what.split()[0]))
    return what if alive else what + TOO_LATE
