"""Jobs on two hosts, with a real Slurm, torchrun and DeepSpeed's launcher: see `two_hosts.py` for what the hosts are.

Minutes of processor time: they run with SENDVAE_CLUSTER=1, `make cluster`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from two_hosts import TwoHosts, missing

ROOT = Path(__file__).parents[2]
PYTHON = sys.executable
TORCHRUN = (PYTHON, "-m", "torch.distributed.run")
NUM_STEPS = 60
WAIT_S = 600.0
NOTHING = (
    "set SENDVAE_CLUSTER=1 for jobs on two hosts, which take minutes" if "SENDVAE_CLUSTER" not in os.environ else None
)

pytestmark = [pytest.mark.slow, pytest.mark.skipif((problem := NOTHING or missing()) is not None, reason=problem or "")]
needs_slurm = pytest.mark.skipif((lacking := missing(slurm=True)) is not None, reason=lacking or "")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A picture of each of 24 classes, and the config of a tiny autoencoder in training on them."""
    sys.path.append(str(ROOT / "tests" / "train"))
    from tiny_runs import VAE

    folder = tmp_path_factory.mktemp("photos")
    for name in range(24):
        (folder / "train" / f"{name:02}").mkdir(parents=True)
        pixels = np.random.default_rng(name).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "train" / f"{name:02}" / "a.png")
    settings = {**VAE, "loop": {**VAE["loop"], "num_steps": NUM_STEPS, "save_every": 10, "step_timeout_s": 10.0}}
    settings["data"] = {**VAE["data"], "root": str(folder / "train")}
    settings["logging"] = {"to": []}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name, value in {"OMP_NUM_THREADS": "1", "SENDVAE_PYTHON": PYTHON, "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PYTEST_CURRENT_TEST", raising=False)
    with TwoHosts(tmp_path / "hosts") as both:
        yield both


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name, value in {"OMP_NUM_THREADS": "1", "SENDVAE_PYTHON": PYTHON, "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    with TwoHosts(tmp_path / "hosts", slurm=True) as both:
        yield both


def train(photos, run, *more):
    return ["train", "vae", "--config", photos / "tiny.yaml", f"--run={run}", *more]


def steps_of(run):
    """The steps in a run's metrics."""
    path = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def text_of(path):
    return path.read_text() if path.exists() else ""


def wait_for(is_so, what):
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.3)


def last_checkpoint(run):
    """Every file of the last step's checkpoint, but the one with the moment and the folder in it."""
    folder = run / "checkpoints" / f"step_{NUM_STEPS:08d}"
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}


@needs_slurm
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


@needs_slurm
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


@needs_slurm
def test_variables_that_contradict_are_said_by_every_task(slurm, photos, tmp_path):
    command = ["srun", "--nodes=2", "--ntasks=2", "env", "RANK=0", "WORLD_SIZE=1", PYTHON, "-m", "sendvae_fast"]
    done = slurm.run("node-a", *command, *train(photos, tmp_path / "run"))
    assert done.returncode == 2
    assert {task for task in "01" if f"this is task {task} of 2: unset RANK and WORLD_SIZE" in done.stderr} == {
        "0",
        "1",
    }


def torchrun(host, rank, *more):
    return (*TORCHRUN, "--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=1", "--master-addr=node-a",
            "--master-port=29400", *more, "-m", "sendvae_fast")  # fmt: skip


def test_torchrun_on_two_hosts_one_is_cut_off_and_the_same_command_goes_on(hosts, photos, tmp_path):
    def start(name):
        command = train(photos, tmp_path / name)
        return [
            hosts.start(host, *torchrun(host, rank), *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for rank, host in enumerate(("node-a", "node-b"))
        ]

    ranks = start("cut")
    wait_for(lambda: len(steps_of(tmp_path / "cut")) > 25, "the ranks do not train")
    hosts.cut("node-b")
    said = [rank.communicate(timeout=WAIT_S)[0] for rank in ranks]
    assert all(rank.returncode != 0 for rank in ranks)
    assert re.search(r"rank 1 .*(does not answer|silent)|no answer from rank 1", said[0]), said[0]
    hosts.mend("node-b")
    again = start("cut")
    said = [rank.communicate(timeout=WAIT_S)[0] for rank in again]
    assert [rank.returncode for rank in again] == [0, 0], said
    straight = start("straight")
    assert [rank.communicate(timeout=WAIT_S) and rank.returncode for rank in straight] == [0, 0]
    assert last_checkpoint(tmp_path / "cut") == last_checkpoint(tmp_path / "straight") != {}


def test_the_launcher_of_deepspeed_on_two_hosts(hosts, photos, tmp_path):
    """As its runner starts it on every host, after ssh: the hosts have no ssh server."""
    world = {"node-a": [0], "node-b": [0]}
    import base64

    encoded = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    ranks = [
        hosts.start(host, PYTHON, "-m", "deepspeed.launcher.launch", f"--world_info={encoded}", f"--node_rank={rank}",
                    "--master_addr=10.231.0.1", "--master_port=29401", "--module", "sendvae_fast",
                    *train(photos, tmp_path / "run", "--loop.num_steps=4"),
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={"DS_ACCELERATOR": "cpu"})
        for rank, host in enumerate(world)
    ]  # fmt: skip
    said = [rank.communicate(timeout=WAIT_S)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["world_size"] == 2
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]
