"""`sendvae runs`: what runs are doing, seen from outside."""

import json
import subprocess
import sys
import time

import pytest

from sendvae_fast.cli.main import main
from sendvae_fast.engine import run_facts

HOLDER = """
import sys, time
from pathlib import Path
from sendvae_fast.engine.run_lock import lock_run
lock_run(Path(sys.argv[1]))
print("taken", flush=True)
time.sleep(60)
"""


def make_run(folder, saved=(), logged=(), **settings):
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps({"loop": {"num_steps": 100}, **settings}))
    for step in saved:
        checkpoint = folder / "checkpoints" / f"step_{step:08d}"
        checkpoint.mkdir()
        (checkpoint / "manifest.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    return folder


def listed(capsys, folder):
    assert main(["runs", str(folder), "--json"]) == 0
    return {entry["run"].rpartition("/")[2]: entry for entry in json.loads(capsys.readouterr().out)}


def test_states_steps_and_losses(tmp_path, capsys):
    make_run(tmp_path / "a" / "done", [50, 100], [{"step": 100, "loss": 0.25, "time_s": 10.0, "step_ms": 2.0}])
    lines = [
        {"step": 70, "loss": 0.5, "time_s": 20.0, "step_ms": 2.0},
        {"step": 70, "time_s": 21.0, "evaluation/fid": 9.0},
    ]
    make_run(tmp_path / "a" / "halfway", [60], lines, latents="x")
    make_run(tmp_path / "new", [], [], generator={})
    (make_run(tmp_path / "odd") / "config.yaml").write_text("a: [")
    (tmp_path / "no_run").mkdir()
    found = listed(capsys, tmp_path)
    assert {name: entry["state"] for name, entry in found.items()} == {
        "done": "finished", "halfway": "stopped", "new": "not saved", "odd": "damaged",
    }  # fmt: skip
    assert found["done"]["step"] == 100 and found["done"]["loss"] == 0.25
    assert found["halfway"]["step"] == 60 and found["halfway"]["loss"] == 0.5 and found["halfway"]["ends_s"] is None
    stages = {name: entry["stage"] for name, entry in found.items()}
    assert stages == {"done": "train vae", "halfway": "train sit", "new": "train e2e", "odd": "unknown"}
    sizes = [path.stat().st_size for path in (tmp_path / "a" / "done").rglob("*") if path.is_file()]
    assert found["done"]["bytes"] == sum(sizes)
    assert next(iter(found)) == "halfway", "the last written first"


def test_a_run_that_is_locked_is_running_and_says_when_it_ends(tmp_path, capsys):
    lines = [{"step": 40, "loss": 0.5, "time_s": 1000.0, "step_ms": 500.0}]
    make_run(tmp_path / "busy", [20], lines)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "busy"], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "taken\n"
        found = listed(capsys, tmp_path)["busy"]
    finally:
        holder.kill()
        holder.wait()
    assert found["state"] == "running" and found["step"] == 40
    assert found["ends_s"] == pytest.approx(1000 + 60 * 0.5)
    assert listed(capsys, tmp_path)["busy"]["state"] == "stopped"


def test_the_table_has_a_line_for_each(tmp_path, capsys):
    make_run(tmp_path / "[red]one", [100], [{"step": 100, "loss": 0.25, "time_s": time.time(), "step_ms": 2.0}])
    make_run(tmp_path / "two")
    assert main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "100/100" in lines[1] and "[red]one" in lines[1] and "finished" in lines[1]


def test_no_runs_and_no_folder(tmp_path, capsys):
    assert main(["runs", str(tmp_path)]) == 0
    assert main(["runs", str(tmp_path / "nowhere")]) == 2
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["1e400", "NaN", '"7"', "true", "[1]", "1" + "0" * 400, "-5"])
def test_odd_numbers_are_no_facts(value, tmp_path):
    folder = make_run(tmp_path / "run", [20])
    (folder / "metrics.jsonl").write_text(
        f'{{"step": {value}, "loss": {value}, "time_s": {value}, "step_ms": {value}}}\n'
    )
    facts = run_facts.run_facts(folder)
    assert facts.step == 20 and facts.ends_s is None
    assert facts.loss is None or facts.loss == -5.0
