"""Runs that are killed, stopped, starved and moved: counts of what is survived; in full by `make reliability`."""

import json
import os
from itertools import product
from pathlib import Path

import forks
import pytest
from reliability_counts import counting, full_counts, record
from time_limits import HANG_S

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
FULL = full_counts()
IN_FULL = pytest.mark.skipif(not FULL, reason="make reliability")
CHAOS_S = os.environ.get("SENDVAE_CHAOS_S", "180")
CHAOS_SEED = os.environ.get("SENDVAE_CHAOS_SEED", "0")
KILLS = 100 if FULL else 4
POINTS = 12 if FULL else 1
KINDS = ("ddp", "zero1", "zero2", "zero3")
FAULTS = (
    "an exception", "exit", "SIGKILL", "SIGABRT", "SIGSEGV", "SIGSTOP", "a rank that never comes to the collective",
    "SIGTERM", "a slow rank", "NaN in one rank's batch", "a full disk", "a clock that jumps by ten days",
)  # fmt: skip
SAMPLES = {"scenarios.random_kills": f"{KILLS},0", "scenarios.named_points": "ddp,2,when the oldest is set aside"}

IMPORTS = (*forks.TRAINING, *(("torch._dynamo", "torch.utils.tensorboard") if FULL else ()))
"""What is there when a scenario begins: once for all of the full counts, which are many."""


def run(folder, scenarios):
    """The outcomes of scenarios with their arguments, which run in turn in a process of their own."""
    words = [f"{name}={argument}" for name, argument in scenarios.items()]
    env = {**os.environ, "PYTHONPATH": str(TESTS / "engine"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = Path(__file__).with_name("ranks.py")
    arguments = [script, folder, "yes" if FULL else "no", *words]
    done = forks.run(arguments, env=env, timeout=4 * HANG_S, imports=IMPORTS)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: list(map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())) for name in scenarios}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Outcomes of the thin sample, of one process; none where all is counted."""
    return {} if FULL else run(tmp_path_factory.mktemp("samples"), SAMPLES)


@pytest.fixture
def outcomes(samples, tmp_path):
    """Outcomes of a scenario by its name and argument. Each of the full counts is a test of minutes at the most."""
    return lambda name, argument: samples.get(name) or run(tmp_path, {name: argument})[name]


def count(promise, what, outcomes):
    with counting(promise, what) as trials:
        for outcome in outcomes:
            with trials.trial(outcome["trial"]):
                assert outcome["error"] is None, outcome["error"]


@pytest.mark.parametrize("seed", range(10) if FULL else [0])
def test_kills_at_random_instants(outcomes, seed):
    found = outcomes("scenarios.random_kills", f"{KILLS},{seed}")
    assert len(found) == KILLS
    count("checkpoint-kill", "kill -9 at random instants of a tight loop of saves", found)


@pytest.mark.parametrize(("kind", "size"), list(product(KINDS, (1, 2))) if FULL else [("ddp", 2)])
def test_kills_at_named_points(outcomes, kind, size):
    found = outcomes("scenarios.named_points", f"{kind},{size}")
    assert len(found) == POINTS
    count("checkpoint-kill", "kill -9 at named points of a save, then the run to its end", found)


@IN_FULL
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_rank(outcomes, fault):
    found = outcomes("faults.at_a_step", fault)
    assert len(found) == 4
    what = "a fault of the first or last of two ranks, started again by hand or torchrun, to the same weights"
    count("fault", what, found)


@IN_FULL
@pytest.mark.parametrize("kind", KINDS)
def test_other_numbers_of_ranks(outcomes, kind):
    found = outcomes("scenarios.elastic", kind)
    assert len(found) == 3
    count("elastic", "checkpoints of 4 ranks loaded by 1, 2 and 8, and back, bit for bit", found)


@IN_FULL
def test_chaos(outcomes):
    found = outcomes("faults.chaos", f"{CHAOS_S},{CHAOS_SEED}")
    faults = [[what for what in run["trial"].split(": ")[1].split(", ") if "late" not in what] for run in found]
    num_faults = sum(map(len, faults))
    survived = sum(len(met) for met, run in zip(faults, found, strict=True) if run["error"] is None)
    print(f"{len(found)} runs on two ranks came through {survived} of {num_faults} faults: {faults}")
    record("chaos", f"signals within {CHAOS_S} s on two ranks", tried=num_faults, survived=survived)
    assert [run for run in found if run["error"]] == []
