"""Runs that are killed, stopped, starved and moved: counts of what is survived; in full by `make reliability`."""

import json
import os
from pathlib import Path

import forks
import pytest
from reliability_counts import counting, full_counts
from time_limits import HANG_S

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
FULL = full_counts()
IN_FULL = pytest.mark.skipif(not FULL, reason="make reliability")
CHAOS_S = os.environ.get("SENDVAE_CHAOS_S", "180")
CHAOS_SEED = os.environ.get("SENDVAE_CHAOS_SEED", "0")
ARGUMENTS = {
    "random_kills": "1000" if FULL else "4",
    "named_points": "full" if FULL else "",
    "faults": "full",
    "elastic": "full",
    "chaos": f"{CHAOS_S},{CHAOS_SEED}",
}


def run(folder, *names):
    """The outcomes of scenarios, which run in turn in a process of their own, by their names."""
    words = [f"{name}={ARGUMENTS[name]}" for name in names]
    env = {**os.environ, "PYTHONPATH": str(TESTS / "engine"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = Path(__file__).with_name("ranks.py")
    arguments = [script, folder, "yes" if FULL else "no", *words]
    done = forks.run(arguments, env=env, timeout=4 * HANG_S)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: list(map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())) for name in names}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Outcomes of a scenario by its name: samples come from one process, full counts from one each."""
    samples = {} if FULL else run(tmp_path_factory.mktemp("samples"), "random_kills", "named_points")
    return lambda name: samples.get(name) or run(tmp_path_factory.mktemp(name), name)[name]


def count(promise, what, outcomes):
    with counting(promise, what) as trials:
        for outcome in outcomes:
            with trials.trial(outcome["trial"]):
                assert outcome["error"] is None, outcome["error"]


def test_kills_at_random_instants(outcomes):
    found = outcomes("random_kills")
    assert len(found) == int(ARGUMENTS["random_kills"])
    count("checkpoint-kill", "kill -9 at random instants of a tight loop of saves", found)


def test_kills_at_named_points(outcomes):
    found = outcomes("named_points")
    assert len(found) == (12 * 2 * 4 if FULL else 1)
    what = "kill -9 at 12 named points of a save, 1 and 2 ranks, DDP and ZeRO 1 to 3, then the run to its end"
    count("checkpoint-kill", what, found)


@IN_FULL
def test_faults_of_a_rank(outcomes):
    found = outcomes("faults")
    assert len(found) == 24
    count("fault", "12 faults of the first and of the last of two ranks, started again, to the same weights", found)


@IN_FULL
def test_other_numbers_of_ranks(outcomes):
    found = outcomes("elastic")
    assert len(found) == 3 * 4
    count("elastic", "checkpoints of 4 ranks loaded by 1, 2 and 8, and back, bit for bit", found)


@IN_FULL
def test_chaos(outcomes):
    found = outcomes("chaos")
    faults = sum(0 if outcome["trial"].endswith("nothing") else outcome["trial"].count(",") + 1 for outcome in found)
    print(f"{len(found)} runs on two ranks came through {faults} faults: {[outcome['trial'] for outcome in found]}")
    count("chaos", f"runs of 120 steps on two ranks under random signals, begun within {CHAOS_S} s", found)
