"""Jobs on two hosts under a real Slurm: see `two_hosts.py` for what the hosts are.

Minutes of processor time: they run with SENDVAE_CLUSTER=1, `make cluster`.
"""

from __future__ import annotations

import json
import subprocess

import pytest
from tiny_jobs import NUM_STEPS, PYTHON, last_checkpoint, marks, steps_of, text_of, train, wait_for
from two_hosts import missing

from sendvae_fast.data.scenes.scene_folder import synth_scenes
from sendvae_fast.evaluation.result import read_results

needs_slurm = pytest.mark.skipif((lacking := missing(slurm=True)) is not None, reason=lacking or "")
pytestmark = [*marks, needs_slurm]


def test_a_job_that_is_preempted_goes_on_to_the_same_weights(slurm, photos, tmp_path):
    log = tmp_path / "log"
    options = ("--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={log}")
    batch = [*options, "scripts/slurm/run.sbatch", *train(photos, tmp_path / "stopped")]
    job = slurm.run("node-a", "sbatch", *batch).stdout.strip()
    wait_for(lambda: len(steps_of(tmp_path / "stopped")) > 5 or "ended with" in text_of(log), "the job does not train")
    slurm.run("node-a", "scancel", "--signal=USR1", job)
    wait_for(lambda: "ended with 75" in text_of(log), "the job does not stop")
    wait_for(lambda: "ended with 0" in text_of(log), "the job is not started again")
    words = log.read_text()
    assert "start 1," in words and "start 2," in words and "start 3," not in words
    assert steps_of(tmp_path / "stopped") == list(range(1, NUM_STEPS + 1))
    straight = slurm.run("node-a", "srun", "--nodes=2", "--ntasks=2", PYTHON, "-m", "sendvae_fast",
                         *train(photos, tmp_path / "straight"))  # fmt: skip
    assert straight.returncode == 0, straight.stderr
    assert last_checkpoint(tmp_path / "stopped") == last_checkpoint(tmp_path / "straight") != {}
    facts = json.loads((tmp_path / "stopped" / "environment.json").read_text())
    assert facts["world_size"] == 2 and len(facts["earlier_starts"]) == 1


def test_the_chain_of_all_verbs_ends_with_a_measurement(slurm, tmp_path):
    """scripts/slurm/chain.sh with the demo's networks, both stages on two hosts."""
    for name, seed in (("train", 0), ("val", 1)):
        synth_scenes(tmp_path / "scenes" / name, 64, size=32, seed=seed)
    out = tmp_path / "chain"
    chain = ("scripts/slurm/chain.sh", tmp_path / "scenes", "demo", out, "--ntasks-per-node=1")
    submitted = slurm.run("node-a", *chain, env={"NODES": "2"})
    assert submitted.returncode == 0, submitted.stderr
    jobs = [line.rpartition(" ")[2] for line in submitted.stdout.splitlines()]

    def state(job):
        return slurm.run("node-a", "squeue", "--noheader", "--states=all", f"--job={job}", "--format=%T %r").stdout

    for job in jobs:  # one after the other, each with a job's time
        wait_for(lambda job=job: "NeverSatisfied" in state(job) or state(job).startswith(("COMPLETED", "FAILED")), job)
    logs = {path.name: path.read_text() for path in out.glob("*.log")}
    assert all(state(job).startswith("COMPLETED") for job in jobs) and len(jobs) == len(logs) == 5, logs
    for run in ("vae", "sit"):
        assert json.loads((out / run / "environment.json").read_text())["world_size"] == 2
        assert steps_of(out / run)[-1] == 10
    (result,) = [
        result for result in read_results(out / "sit" / "evaluation.jsonl") if result.metric == "frechet_judge"
    ]
    assert result.value > 0 and set(result.counts.values()) == {64}


def test_another_job_in_the_run_is_refused_and_every_task_ends(slurm, photos, tmp_path):
    code = "import sys; from pathlib import Path; from sendvae_fast.engine.run_lock import lock_run; "
    code += "lock_run(Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    (tmp_path / "run").mkdir()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    holder = slurm.start("node-b", PYTHON, "-c", code, tmp_path / "run", **pipes)
    assert holder.stdout.readline() == "locked\n"
    command = ["srun", "--nodes=2", "--ntasks=2", PYTHON, "-m", "sendvae_fast", *train(photos, tmp_path / "run")]
    refused = slurm.run("node-a", *command)
    holder.communicate()
    assert refused.returncode == 2 and "in use by process" in refused.stderr, refused.stderr
    assert "on node-b" in refused.stderr and refused.stderr.count("Exited with exit code 2") == 2


def test_variables_that_contradict_are_said_by_every_task(slurm, photos, tmp_path):
    command = ["srun", "--nodes=2", "--ntasks=2", "env", "RANK=0", "WORLD_SIZE=1", PYTHON, "-m", "sendvae_fast"]
    done = slurm.run("node-a", *command, *train(photos, tmp_path / "run"))
    assert done.returncode == 2
    assert {task for task in "01" if f"this is task {task} of 2: unset RANK and WORLD_SIZE" in done.stderr} == {
        "0",
        "1",
    }
