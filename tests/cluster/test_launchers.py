"""Jobs on two hosts under torchrun and DeepSpeed's launcher; a host is cut off, a worker killed. See `two_hosts.py`.

Minutes of processor time: they run with SENDVAE_CLUSTER=1, `make cluster`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tiny_jobs import NUM_STEPS, PYTHON, ROOT, WAIT_S, last_checkpoint, marks, steps_of, train, wait_for
from two_hosts import HOSTS

TORCHRUN = (PYTHON, "-m", "torch.distributed.run")
LIMIT_S = 120.0
"""Seconds in which ranks notice: the step's timeout or 20 steps, then at most 20 s of looking who is silent; gloo's
own timeout is 1800 s."""

pytestmark = marks


@pytest.fixture(scope="module")
def straight(photos):
    """The last checkpoint of the same run on two ranks of one machine, which nothing stopped."""
    command = (
        *TORCHRUN,
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "--",
        "sendvae_fast",
        *train(photos, photos / "straight"),
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*map(str, command)], check=True, cwd=ROOT, env=environment, capture_output=True, timeout=WAIT_S)
    return last_checkpoint(photos / "straight")


def static(host):
    """torchrun with ranks by hand: a failure ends both hosts, and somebody runs the same command again."""
    rank = list(HOSTS).index(host)
    return (*TORCHRUN, "--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=1", "--master-addr=node-a",
            "--master-port=29400", "-m", "--", "sendvae_fast")  # fmt: skip


def elastic(_):
    """torchrun with a rendezvous (c10d): the same command on both hosts, and it starts its workers again by itself."""
    return (*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=node-a:29402",
            "--rdzv-id=job", "--max-restarts=3", "-m", "--", "sendvae_fast")  # fmt: skip


class Agent:
    """A launcher on a host, and what it and its worker have said so far."""

    def __init__(self, hosts, host, command, log):
        self.log = log
        with open(log, "w") as file:
            self.process = hosts.start(host, *command, stdout=file, stderr=subprocess.STDOUT)

    @property
    def worker(self):
        """The process id of the rank on this host, None where there is none."""
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        pids = listed.read_text().split() if listed.exists() else []
        ranks = [pid for pid in pids if b"sendvae_fast" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return int(ranks[0]) if ranks else None

    def errors(self):
        """The lines that are the engine's, of those that end a rank."""
        return re.findall(r"^(?:\[\w+\]:)?((?:rank \d: )?error: .*)$", self.log.read_text(), flags=re.MULTILINE)

    def wait(self):
        return self.process.wait(WAIT_S)


@pytest.fixture
def agents(hosts, photos, tmp_path):
    """Starts launchers of a run on both hosts, or on those named."""

    def start(launcher, run, *names):
        command = train(photos, tmp_path / run)
        logs = {host: tmp_path / f"{run}-{host}-{len(list(tmp_path.glob('*.log')))}.log" for host in names or HOSTS}
        return {host: Agent(hosts, host, [*launcher(host), *command], log) for host, log in logs.items()}

    return start


def has_ended(pid):
    """Also where nobody has taken note: torchrun on a host that is cut off waits for the other's store."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def is_cut_off_while_training(hosts, agents, run):
    """Pull node-b's cable in the middle of a run; seconds until each rank has ended."""
    wait_for(lambda: len(steps_of(run)) > 15, "the ranks do not train")
    workers = {host: agent.worker for host, agent in agents.items()}
    assert all(workers.values())
    began, ended = time.monotonic(), {}
    hosts.cut("node-b")

    def all_ended():
        for host, worker in workers.items():
            if host not in ended and has_ended(worker):
                ended[host] = time.monotonic() - began
        return len(ended) == len(workers)

    wait_for(all_ended, "a rank waits for one that is gone")
    return ended


def assert_each_host_said_one_line(agents):
    (of_a,), (of_b,) = agents["node-a"].errors(), agents["node-b"].errors()
    assert "rank 1 does not answer; look after that machine and run the same command again" in of_a, of_a
    assert "rank 0 does not answer" in of_b, of_b


def test_a_host_that_is_cut_off_ends_both_in_one_line_and_the_same_command_goes_on(hosts, agents, straight, tmp_path):
    first = agents(static, "cut")
    seconds = is_cut_off_while_training(hosts, first, tmp_path / "cut")
    assert max(seconds.values()) < LIMIT_S, seconds
    assert all(agent.wait() != 0 for agent in first.values())
    assert_each_host_said_one_line(first)
    hosts.mend("node-b")
    again = agents(static, "cut")
    assert [agent.wait() for agent in again.values()] == [0, 0], again["node-a"].log.read_text()
    assert "goes on after step" in again["node-a"].log.read_text()
    assert last_checkpoint(tmp_path / "cut") == straight != {}


def test_a_host_that_was_cut_off_comes_back_to_the_rendezvous(hosts, agents, straight, tmp_path):
    """Both torchruns outlive it, and go on when they hear of each other again; nobody does anything."""
    both = agents(elastic, "back")
    seconds = is_cut_off_while_training(hosts, both, tmp_path / "back")
    assert max(seconds.values()) < LIMIT_S, seconds
    assert_each_host_said_one_line(both)
    assert [agent.process.poll() for agent in both.values()] == [None, None]
    hosts.mend("node-b")
    assert [agent.wait() for agent in both.values()] == [0, 0], both["node-a"].log.read_text()
    assert last_checkpoint(tmp_path / "back") == straight != {}


@pytest.mark.parametrize("victim", ["node-a", "node-b"])
def test_torchrun_starts_a_killed_worker_again(agents, straight, tmp_path, victim):
    """kill -9 on one host: --max-restarts starts the ranks of both hosts again, from the newest checkpoint."""
    both = agents(elastic, "killed")
    wait_for(lambda: len(steps_of(tmp_path / "killed")) > 15, "the ranks do not train")
    os.kill(both[victim].worker, signal.SIGKILL)
    assert [agent.wait() for agent in both.values()] == [0, 0], both["node-a"].log.read_text()
    assert last_checkpoint(tmp_path / "killed") == straight != {}
    facts = json.loads((tmp_path / "killed" / "environment.json").read_text())
    assert len(facts["earlier_starts"]) == 1 and facts["world_size"] == 2
    assert steps_of(tmp_path / "killed") == list(range(1, NUM_STEPS + 1))


def deepspeed(hosts, photos, run, *options):
    """The launcher of DeepSpeed, as a user starts it."""
    listed = hosts.folder / "hostfile"
    listed.write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    command = (PYTHON, "-m", "deepspeed.launcher.runner", f"--hostfile={listed}", *options, "--module", "sendvae_fast")
    return [*command, *train(photos, run, "--loop.num_steps=4")]


@pytest.mark.parametrize(
    "way", ["--no_ssh", pytest.param("pdsh", marks=pytest.mark.skipif(not shutil.which("pdsh"), reason="no pdsh"))]
)
def test_the_launcher_of_deepspeed_on_two_hosts(hosts, photos, tmp_path, way):
    """Started on both hosts by hand, or on one, which starts the other by pdsh and a stand-in for ssh."""
    at = ("--master_addr=10.231.0.1", "--master_port=29401")
    options = (
        [(f"--node_rank={rank}", "--no_ssh", *at) for rank in range(2)]
        if way == "--no_ssh"
        else [("--master_port=29401",)]
    )
    environment = {"DS_ACCELERATOR": "cpu", "PATH": hosts.path_with_ssh()}
    started = [
        hosts.start(host, *deepspeed(hosts, photos, tmp_path / "run", *words), stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT, env=environment)
        for host, words in zip(HOSTS, options, strict=False)
    ]  # fmt: skip
    said = [launcher.communicate(timeout=WAIT_S)[0] for launcher in started]
    assert [launcher.returncode for launcher in started] == [0] * len(options), said
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["world_size"] == 2
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]
