"""Runs of forked ranks that are killed in a save, and begun again or moved. A scenario notes a line for each trial."""

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
from sendvae_fast.engine import checkpoint, checkpoint_files
from sendvae_fast.engine.background_saver import BackgroundSaver
from sendvae_fast.engine.checkpoint import Checkpointer
from sendvae_fast.engine.distributed import Distributed, init_distributed

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


def random_kills(folder: Path, outcomes: Outcomes, count_and_seed: str) -> None:
    """A loop of saves, killed at random instants and begun again from what is there, in one and the same folder."""
    count, seed = map(int, count_and_seed.split(","))
    confirmed = mmap.mmap(-1, 8)
    checkpoints, draw = folder / "checkpoints", random.Random(seed)

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
    for number in range(count):
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
    return str(target).endswith(checkpoint_files.MANIFEST)


def to_final_name(source, target):
    return checkpoint_files.FINAL_NAME.fullmatch(Path(target).name) is not None


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


def named_points(folder: Path, outcomes: Outcomes, case: str) -> None:
    """`KIND,SIZE[,POINT]`: kills at each point of a save, of the last rank if it comes there; then on to the end."""
    kind, size, *names = case.split(",")
    size, names = int(size), names or list(POINTS)
    truth, log = folder / "truth", folder / "log.txt"
    run_to_the_end(size, partial(train, truth, kind, STEPS, keep_checkpoints=1), log)
    for number, name in enumerate(names):
        run = folder / str(number)
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


# -- other numbers of ranks --------------------------------------------------------------------------------------------


def elastic(folder: Path, outcomes: Outcomes, kind: str) -> None:
    """What 4 ranks saved is loaded by 1, 2 and 8, saved by those, and loaded by 4 again: bit for bit."""
    log, of_four = folder / "log.txt", folder / "4"
    run_to_the_end(4, partial(train, of_four, kind, 2), log)
    for size in (1, 2, 8):
        trial = partial(_there_and_back, of_four, folder / str(size), kind, size, log)
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
