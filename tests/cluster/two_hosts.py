"""Two hosts, node-a and node-b: network namespaces of this machine with a cable between them; Slurm on both if asked.

    python tests/cluster/two_hosts.py [--slurm] FOLDER COMMAND...

runs COMMAND on node-a, as root, with what it needs in FOLDER, and removes everything afterwards. Each host has its own
name, loopback and address (10.231.0.1 and .2, which nothing outside sees) and shares the file system. Slurm's daemons
are Debian's: apt install slurmctld slurmd slurm-client munge iproute2.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

HOSTS = {"node-a": "10.231.0.1", "node-b": "10.231.0.2"}
SLURM_TOOLS = ("slurmctld", "slurmd", "srun", "sbatch", "scontrol", "munged", "mungekey")
START_S = 120.0


SSH = """#!/bin/sh
# In place of ssh: runs a command on the other host, as root; of the caller's environment it has HOME and PATH alone.
while :; do
    case $1 in
    -o | -l | -p | -i | -F) shift 2 ;;
    -*) shift ;;
    *) break ;;
    esac
done
host=$1
shift
exec env -i HOME="$HOME" PATH="$PATH" nsenter --net=/run/netns/TAG-"$host" unshare --uts --mount \\
    sh -c 'hostname "$1" && mount --bind HOSTS /etc/hosts && shift && exec sh -c "$*"' sh "$host" "$@"
"""


def missing(slurm: bool = False) -> str | None:
    """What keeps this machine from being two hosts, for a skipped test; None where nothing does."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    lacking = [
        tool for tool in ("ip", "nsenter", "unshare", *(SLURM_TOOLS if slurm else ())) if shutil.which(tool) is None
    ]
    if lacking:
        return f"not installed: {', '.join(lacking)}"
    probe = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "true"], check=False, capture_output=True, text=True
    )
    return None if probe.returncode == 0 else f"no network namespaces here ({probe.stderr.strip()})"


class TwoHosts:
    """The two hosts, from entering the context to leaving it, which ends all processes on them."""

    def __init__(self, folder: Path, slurm: bool = False) -> None:
        self.folder, self.slurm = folder.resolve(), slurm
        self.tag = f"sv{os.getpid()}"
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in HOSTS.items())
        )
        try:
            for host in HOSTS:
                _ip("netns", "add", self._namespace(host))
            ends = [f"{self.tag}{letter}" for letter in "ab"]
            _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for (host, address), end in zip(HOSTS.items(), ends, strict=True):
                inside = ("-n", self._namespace(host))
                _ip("link", "set", end, "netns", self._namespace(host), "name", "eth0")
                _ip(*inside, "addr", "add", f"{address}/24", "dev", "eth0")
                _ip(*inside, "link", "set", "lo", "up")
                _ip(*inside, "link", "set", "eth0", "up")
            if self.slurm:
                self._start_slurm()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in HOSTS:
            listed = subprocess.run(
                ["ip", "netns", "pids", self._namespace(host)], check=False, capture_output=True, text=True
            )
            for pid in listed.stdout.split():
                subprocess.run(["kill", "-KILL", pid], check=False, capture_output=True)
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", self._namespace(host)], check=False, capture_output=True)

    def cut(self, host: str) -> None:
        """Pull the cable out of a host."""
        _ip("-n", self._namespace(host), "link", "set", "eth0", "down")

    def mend(self, host: str) -> None:
        """Put the cable back."""
        _ip("-n", self._namespace(host), "link", "set", "eth0", "up")

    def path_with_ssh(self) -> str:
        """PATH with an `ssh` before all else that goes from host to host; the hosts have no ssh server."""
        ssh = self.folder / "bin" / "ssh"
        ssh.parent.mkdir(exist_ok=True)
        ssh.write_text(SSH.replace("TAG", self.tag).replace("HOSTS", str(self.folder / "hosts")))
        ssh.chmod(0o755)
        return f"{ssh.parent}:{os.environ['PATH']}"

    def start(self, host: str, *command: object, **options) -> subprocess.Popen:
        """Start a command on a host; options as those of Popen. The process is the command itself, not a shell."""
        environment = {**os.environ, **options.pop("env", {}), "SLURM_CONF": str(self.folder / "slurm.conf")}
        setup = f'hostname {host} && mount --bind {self.folder / "hosts"} /etc/hosts && exec "$@"'
        network = f"--net=/run/netns/{self._namespace(host)}"  # not `ip netns exec`, which hides /sys/fs/cgroup
        inside = ["nsenter", network, "unshare", "--uts", "--mount", "sh", "-c", setup, "sh"]
        return subprocess.Popen([*inside, *map(str, command)], text=True, env=environment, **options)

    def run(self, host: str, *command: object, timeout: float = 600.0, **options) -> subprocess.CompletedProcess[str]:
        """Run a command on a host to its end, and keep what it says."""
        process = self.start(host, *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def _namespace(self, host: str) -> str:
        return f"{self.tag}-{host}"

    def _start_slurm(self) -> None:
        folder = self.folder
        for name in ("state", "spool-node-a", "spool-node-b", "munge"):
            (folder / name).mkdir(exist_ok=True)
        key, socket = folder / "munge" / "key", folder / "munge" / "socket"
        subprocess.run(["mungekey", "--create", "--force", f"--keyfile={key}"], check=True)
        cores = len(os.sched_getaffinity(0))
        nodes = "".join(f"NodeName={name} NodeAddr={address} CPUs={cores}\n" for name, address in HOSTS.items())
        (folder / "slurm.conf").write_text(
            f"""ClusterName=two
SlurmctldHost=node-a({HOSTS["node-a"]})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={socket},cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SelectType=select/linear
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
KillWait=5
MinJobAge=3600
{nodes}PartitionName=main Nodes=ALL Default=YES State=UP MaxTime=INFINITE
"""
        )
        options = (f"--key-file={key}", f"--socket={socket}", f"--pid-file={folder}/munge/pid")
        files = (f"--log-file={folder}/munge/log", f"--seed-file={folder}/munge/seed")
        munged = ["munged", "--foreground", "--force", *options, *files]
        self._daemons.append(subprocess.Popen(munged, stderr=subprocess.DEVNULL))
        _wait_for(socket.exists, "munged")
        self._daemons.append(self.start("node-a", "slurmctld", "-D", "-c", stderr=subprocess.DEVNULL))
        self._daemons += [self.start(host, "slurmd", "-D", stderr=subprocess.DEVNULL) for host in HOSTS]
        _wait_for(lambda: self.run("node-a", "sinfo", "-h", "-o", "%T %D").stdout.split() == ["idle", "2"], "Slurm")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def _wait_for(is_there, what: str) -> None:
    deadline = time.monotonic() + START_S
    while not is_there():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not start within {START_S:.0f} s")
        time.sleep(0.2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--slurm", action="store_true")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    if problem := missing(arguments.slurm):
        sys.exit(f"two hosts cannot be made here: {problem}")
    with TwoHosts(arguments.folder, arguments.slurm) as hosts:
        sys.exit(hosts.start("node-a", *arguments.command).wait())
