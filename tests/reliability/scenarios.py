"""What is done to runs of forked ranks. Each scenario notes a line per trial; `full` asks for all of its trials."""

import ctypes
import errno
import json
import math
import mmap
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import torch
from engine_cases import ENGINES
from ranks import Outcomes, Stage, assert_same, run_to_the_end, start, tensors, train, wait
from safetensors.torch import load_file

from sendvae_fast import files
from sendvae_fast.engine import checkpoint, watchdog
from sendvae_fast.engine.background_saver import BackgroundSaver
from sendvae_fast.engine.checkpoint import Checkpointer
from sendvae_fast.engine.distributed import Distributed, init_distributed
from sendvae_fast.engine.signals import EXIT_REQUEUE
from sendvae_fast.engine.watchdog import EXIT_STUCK

STEPS, FAULT_STEP = 6, 4
"""Steps of a run that is saved at every second, and the one at which something happens to it."""
KINDS = [kind for kind in ENGINES if kind != "zero0"]


def die() -> None:
    """What no process can prevent."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_fault_step(victim, harm, ranks, step, batch):
    """A `fault` of `train`: harm done by one rank before one step, which may give another batch."""
    if step == FAULT_STEP and ranks.rank == victim:
        return harm(batch) or batch
    return batch


# -- kills at random instants ------------------------------------------------------------------------------------------


def random_kills(folder: Path, outcomes: Outcomes, count: str) -> None:
    """A loop of saves, killed at random instants and begun again from what is there, in one and the same folder."""
    confirmed = mmap.mmap(-1, 8)
    checkpoints, draw = folder / "checkpoints", random.Random(0)

    def save_for_ever() -> None:
        checkpointer = Checkpointer(checkpoints, Distributed(), keep=2)
        found = checkpointer.load_latest()
        step = found[0] if found else 0
        saver = BackgroundSaver(checkpointer, Distributed())
        while True:
            step += 1

            def take(snapshot, step=step):
                value = snapshot.copy("value", torch.full((20_000,), float(step)))

                def write(directory):
                    for name in ("model", "ema"):
                        files.save_tensors(directory / f"{name}.safetensors", {"value": value})

                return write

            saver.begin(step, take)
            saver.finish()
            confirmed[:] = step.to_bytes(8, "little")

    def check() -> None:
        known = int.from_bytes(confirmed[:], "little")
        found = Checkpointer(checkpoints, Distributed()).load_latest()
        assert found is not None or known == 0, "nothing to go on from"
        if found is not None:
            step, directory = found
            assert step >= known, f"step {known} was saved, and step {step} is the newest there is"
            for name in ("model", "ema"):
                value = load_file(directory / f"{name}.safetensors")["value"]
                assert torch.equal(value, torch.full((20_000,), float(step))), "another step's content"

    begun = time.monotonic()
    (pid,) = start(1, save_for_ever, folder / "log.txt")
    while int.from_bytes(confirmed[:], "little") < 5:
        time.sleep(0.01)
    per_save = (time.monotonic() - begun) / 5
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    for number in range(int(count)):
        (pid,) = start(1, save_for_ever, folder / "log.txt")
        time.sleep(draw.uniform(0, 4 * per_save))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        outcomes.trial(f"kill {number}", check)
    (pid,) = start(1, save_for_ever, folder / "log.txt")
    last = int.from_bytes(confirmed[:], "little")
    while int.from_bytes(confirmed[:], "little") == last:
        time.sleep(0.001)
    os.kill(pid, signal.SIGSTOP)
    left = {path.name.partition(".tmp-")[0] for path in checkpoints.glob("step_*.tmp-*")}
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    # The newest that was confirmed, whatever kills left unconfirmed before it; what is being written now, or removed.
    now = int.from_bytes(confirmed[:], "little")
    assert left <= {f"step_{now + n:08d}" for n in (-2, -1, 0, 1)}, f"debris of earlier kills stays: {left}"


# -- kills at named points ---------------------------------------------------------------------------------------------


def deadly(owner, name, matches=lambda *args: True, *, after=False):
    """Make a function die before (or after) its first call whose arguments match."""
    function = getattr(owner, name)

    def dies(*args, **kwargs):
        if not matches(*args):
            return function(*args, **kwargs)
        if after:
            function(*args, **kwargs)
        return die()

    setattr(owner, name, dies)


def staging(path, *_):
    return ".tmp-" in path.name


def to_weights(source, target):
    return str(target).endswith(".safetensors")


def to_manifest(source, target):
    return str(target).endswith(checkpoint.MANIFEST)


def to_final_name(source, target):
    return checkpoint.FINAL_NAME.fullmatch(Path(target).name) is not None


def set_aside(source, target):
    return ".tmp-" in Path(target).name


OF_ANY_RANK = {
    "before the staging directory": partial(deadly, Path, "mkdir", staging),
    "after the staging directory": partial(deadly, Path, "mkdir", staging, after=True),
    "before a file is flushed": partial(deadly, os, "fsync"),
    "after a file is flushed": partial(deadly, os, "fsync", after=True),
    "before a file has its name": partial(deadly, os, "replace", to_weights),
    "after a file has its name": partial(deadly, os, "replace", to_weights, after=True),
}
OF_THE_FIRST_RANK = {
    "before the manifest": partial(deadly, checkpoint, "write_manifest"),
    "before the manifest has its name": partial(deadly, os, "replace", to_manifest),
    "after the manifest has its name": partial(deadly, checkpoint, "write_manifest", after=True),
    "before the directory has its name": partial(deadly, os, "rename", to_final_name),
    "after the directory has its name": partial(deadly, os, "rename", to_final_name, after=True),
    "when the oldest is set aside": partial(deadly, os, "rename", set_aside, after=True),
}
POINTS = {**OF_ANY_RANK, **OF_THE_FIRST_RANK}


def named_points(folder: Path, outcomes: Outcomes, full: str) -> None:
    """A kill at each point of a save, of the last rank where it comes there; then the run is begun again to its end."""
    cases = [(kind, size) for kind in KINDS for size in (1, 2)] if full else [("ddp", 2)]
    names = list(POINTS) if full else ["when the oldest is set aside"]
    for kind, size in cases:
        truth, log = folder / f"truth-{kind}-{size}", folder / "log.txt"
        run_to_the_end(size, partial(train, truth, kind, STEPS, keep_checkpoints=1), log)
        for number, name in enumerate(names):
            run = folder / f"{kind}-{size}-{number}"
            trial = partial(_killed_in_a_save, run, truth, kind, size, name, log)
            outcomes.trial(f"{name}, {kind}, {size} ranks", trial)
            shutil.rmtree(run, ignore_errors=True)


def _killed_in_a_save(run, truth, kind, size, name, log):
    victim = size - 1 if name in OF_ANY_RANK else 0
    fault = partial(at_fault_step, victim, lambda batch: POINTS[name]())
    codes = wait(start(size, partial(train, run, kind, STEPS, fault, keep_checkpoints=1), log))
    assert codes[victim] == -signal.SIGKILL, f"it never came to that point: {codes}"
    run_to_the_end(size, partial(train, run, kind, STEPS, keep_checkpoints=1), log)
    assert_same(tensors(run, STEPS), tensors(truth, STEPS))
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == [f"step_{STEPS:08d}"], f"left over: {left}"


# -- faults ------------------------------------------------------------------------------------------------------------


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
    "NaN in one rank's batch": (_nan, 0),
    "a full disk": (_full_disk, 0),
    "a clock that jumps by ten days": (_jump, 0),
}


def faults(folder: Path, outcomes: Outcomes, full: str) -> None:
    """Each fault on the first and on the last of two ranks, which are started again as torchrun would, to the end."""
    watchdog.BEAT_S, watchdog.SILENT_S = 0.2, 2.0
    truth, log = folder / "truth", folder / "log.txt"
    kind = "zero1" if full else "ddp"
    run_to_the_end(2, partial(train, truth, kind, STEPS), log)
    kinds = FAULTS if full else {name: FAULTS[name] for name in ("SIGKILL", "NaN in one rank's batch")}
    for name, (harm, expected) in kinds.items():
        for victim in (0, 1) if full else (1,):
            run = folder / f"{list(FAULTS).index(name)}-{victim}"
            trial = partial(_struck, run, truth, kind, name, harm, expected, victim, folder)
            outcomes.trial(f"{name}, rank {victim}", trial)


def _struck(run, truth, kind, name, harm, expected, victim, folder):
    log = folder / f"{run.name}.log"
    fault = partial(at_fault_step, victim, harm)
    codes = wait(start(2, partial(train, run, kind, STEPS, fault, step_timeout_s=10.0), log))
    said = log.read_text(errors="replace")
    if expected is None:
        assert all(code != 0 for code in codes), f"a rank ended well: {codes}"
    elif expected == EXIT_STUCK:
        assert EXIT_STUCK in codes and 0 not in codes, f"exit codes {codes}"
        assert name != "SIGSTOP" or f"rank {victim} does not answer" in said, said[-500:]
    else:
        assert codes == [expected] * 2, f"exit codes {codes}: {said[-1000:]}"
    if any(codes):
        run_to_the_end(2, partial(train, run, kind, STEPS), log)
    if name != "NaN in one rank's batch":
        assert_same(tensors(run, STEPS), tensors(truth, STEPS))
        return
    directory = run / "checkpoints" / f"step_{STEPS:08d}"
    counts = json.loads((directory / "engine" / "state.json").read_text())
    assert counts["num_skipped"] == 1 and counts["num_updates"] == STEPS - 1, counts
    assert "step 4 was skipped" in said and f"on rank {victim} (samples 0, 1, 2, 3)" in said, said[-1000:]
    assert all(value.isfinite().all() for value in tensors(run, STEPS).values())


# -- other numbers of ranks --------------------------------------------------------------------------------------------


def elastic(folder: Path, outcomes: Outcomes, full: str) -> None:
    """What 4 ranks saved is loaded by 1, 2 and 8, saved by those, and loaded by 4 again: bit for bit."""
    log = folder / "log.txt"
    for kind in KINDS if full else ["ddp"]:
        of_four = folder / f"{kind}-4"
        run_to_the_end(4, partial(train, of_four, kind, 2), log)
        for size in (1, 2, 8) if full else (2,):
            trial = partial(_there_and_back, of_four, folder / f"{kind}-{size}", kind, size, log)
            outcomes.trial(f"{kind}, 4 to {size} ranks and back", trial)


def _there_and_back(of_four, run, kind, size, log):
    run_to_the_end(size, partial(_load_and_save, of_four / "checkpoints/step_00000002", run, kind), log)
    assert_same(tensors(run, 2), tensors(of_four, 2))
    back = run.with_name(run.name + "-back")
    run_to_the_end(4, partial(_load_and_save, run / "checkpoints/step_00000002", back, kind), log)
    assert_same(tensors(back, 2), tensors(of_four, 2))
    losses = [json.loads((path / "loss.json").read_text()) for path in (run, back)]
    assert math.isclose(*losses, rel_tol=1e-6), f"losses of the next step {losses}"


def _load_and_save(source, run, kind):
    ranks = init_distributed("cpu")
    stage = Stage(kind, ranks)
    stage.load(source)
    with ranks.beside() as writers:
        saver = BackgroundSaver(Checkpointer(run / "checkpoints", writers), ranks)
        saver.begin(2, stage.snapshot)
        loss = ranks.all_reduce_mean(stage.train_step(2, next(stage.batches(2)))["loss"].double()).item()
        assert saver.finish() is not None
    if ranks.is_main:
        (run / "loss.json").write_text(json.dumps(loss))


# -- chaos -------------------------------------------------------------------------------------------------------------

CHAOS_STEPS = 120


def chaos(folder: Path, outcomes: Outcomes, seconds_and_seed: str) -> None:
    """Random faults at random times for so many seconds; each run ends with the weights of one without faults."""
    watchdog.BEAT_S, watchdog.SILENT_S = 0.2, 2.0
    seconds, seed = map(float, seconds_and_seed.split(","))
    kind = "ddp" if seconds < 60 else "zero1"
    draw, until, log = random.Random(int(seed)), time.monotonic() + seconds, folder / "log.txt"
    settings = {"save_every": 10, "step_timeout_s": 10.0}
    begun = time.monotonic()
    run_to_the_end(2, partial(train, folder / "truth", kind, CHAOS_STEPS, **settings), log)
    whole_run_s, number = time.monotonic() - begun, 0
    while number == 0 or time.monotonic() < until:
        number += 1
        run, suffered = folder / f"run{number}", []
        while True:
            pids = start(2, partial(train, run, kind, CHAOS_STEPS, **settings), log)
            if time.monotonic() < until and len(suffered) < 8:
                time.sleep(draw.uniform(0, whole_run_s))
                suffered.append(_harm(draw, pids))
            codes = wait(pids)
            if codes == [0, 0]:
                break
            assert suffered, f"exit codes {codes} without a fault: {log.read_text(errors='replace')[-1500:]}"
            if len(suffered) > 40:
                raise AssertionError("the run does not come to its end")
        outcomes.trial(
            f"run {number}: {', '.join(suffered) or 'nothing'}",
            lambda run=run: assert_same(tensors(run, CHAOS_STEPS), tensors(folder / "truth", CHAOS_STEPS)),
        )
        shutil.rmtree(run)


def _harm(draw, pids):
    what = draw.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGTERM", "SIGSTOP", "SIGABRT", "SIGKILL of both"])
    for pid in pids if what.endswith("both") else [draw.choice(pids)]:
        try:
            os.kill(pid, getattr(signal, what.split()[0]))
        except ProcessLookupError:
            return what + " too late"
    return what
