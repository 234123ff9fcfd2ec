"""A finished run says so before torch is imported; everything else goes the long way."""

import json
import subprocess
import sys

import pytest
import yaml

from sendvae_fast.cli.finished import words_of_finished_run

CONFIG = {
    "run": "RUN", "data": {"root": "photos", "global_batch": 8}, "init_from": None,
    "optimizer": {"learning_rate": 3e-4, "betas": [0.9, 0.99]},
    "loop": {"num_steps": 20}, "engine": {"compile": False},
}  # fmt: skip


@pytest.fixture
def finished(tmp_path):
    """A finished run, as a run directory and a checkpointer leave it."""
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step_00000020"
    checkpoint.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "run": str(run)}))
    (checkpoint / "weights").write_text("abc")
    manifest = {"step": 20, "files": {"weights": {"bytes": 3, "sha256": "?"}}}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    return run


def words(run, *overrides):
    return words_of_finished_run("train vae", [], [f"--run={run}", *overrides])


def test_the_same_command_is_finished(finished, tmp_path):
    same = ["--data.root", "photos", "--optimizer.learning_rate=3e-4", "--loop.num_steps=20", "--init_from=null"]
    said = words(finished, *same, "--optimizer.betas=[0.9, 0.99]", "--engine.compile=false")
    assert said is not None and "finished, at step 20" in said and str(finished) in said
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"optimizer": {"learning_rate": 3e-4}}))
    assert words_of_finished_run("train vae", [tmp_path / "own.yaml"], [f"--run={finished}"]) == said


@pytest.mark.parametrize(
    "other",
    [
        "--loop.num_steps=30",
        "--optimizer.learning_rate=1e-4",
        "--data.rot=x",
        "--engine.compile=true",
        "--seed=1",
        "--help",
    ],
)
def test_another_command_goes_the_long_way(other, finished):
    assert words(finished, other) is None


@pytest.mark.parametrize(
    "damage", ["no checkpoint", "a shorter file", "a missing file", "no manifest", "no JSON", "no YAML"]
)
def test_a_damaged_run_goes_the_long_way(damage, finished):
    checkpoint = finished / "checkpoints" / "step_00000020"
    if damage == "no checkpoint":
        checkpoint.rename(finished / "checkpoints" / "step_00000010")
    elif damage == "a shorter file":
        (checkpoint / "weights").write_text("ab")
    elif damage == "a missing file":
        (checkpoint / "weights").unlink()
    elif damage == "no manifest":
        (checkpoint / "manifest.json").unlink()
    elif damage == "no JSON":
        (checkpoint / "manifest.json").write_text("[1")
    else:
        (finished / "config.yaml").write_text("a: [")
    assert words(finished) is None


def test_torch_is_not_imported(finished):
    code = "import sys; from sendvae_fast.cli.main import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, "train", "vae", f"--run={finished}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["0", "False"] and "is finished, at step 20" in done.stderr
