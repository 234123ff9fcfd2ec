"""Every engine against a plain PyTorch loop, on one rank here and on two ranks in processes of their own."""

import json
from pathlib import Path

import engine_cases
import pytest
from engine_cases import CASES, ENGINES
from two_ranks import run_on_two_ranks

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("two_rank_worker.py")


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_one_rank(case, kind, one_rank, tmp_path):
    case(kind, tmp_path)


@pytest.fixture(scope="module")
def two_ranks(one_rank, tmp_path_factory):
    """Outcome per case of one pair of ranks that runs them all, and the folder they saved in."""
    folder = tmp_path_factory.mktemp("two_ranks")
    for kind in ENGINES:
        (folder / f"by_1_{kind}").mkdir()
        engine_cases.save_for_others(kind, folder / f"by_1_{kind}")
    finished = run_on_two_ranks(WORKER, folder)
    assert finished.returncode == 0, finished.stderr[-4000:]
    # Nothing of DeepSpeed's may reach a command's output.
    assert finished.stdout == ""
    return json.loads((folder / "outcomes.json").read_text()), folder


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("case", [*(case.__name__ for case in CASES), "load_from_one_rank"])
def test_two_ranks(case, kind, two_ranks):
    outcomes, _ = two_ranks
    assert outcomes[f"{case}-{kind}"] == "passed", outcomes[f"{case}-{kind}"]


@pytest.mark.parametrize(
    "case",
    [
        "what_all_ranks_say_is_said_once",
        "checkpoint_of_two_ranks",
        "every_rank_flushes_its_own_files",
        "saves_beside_the_steps",
        "signal_to_one_rank",
        "run_directory_of_two_ranks",
    ],
)
def test_parts_on_two_ranks(case, two_ranks):
    outcome = two_ranks[0][f"{case}-ranks"]
    assert outcome == "passed", outcome


@pytest.mark.parametrize("loader", ENGINES)
@pytest.mark.parametrize("saver", ENGINES)
def test_one_rank_loads_what_two_ranks_saved(saver, loader, two_ranks):
    engine_cases.load_from_others(loader, two_ranks[1] / f"by_2_{saver}")
