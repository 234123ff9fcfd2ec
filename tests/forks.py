"""Python programs as forks of a process that has imported what they need: torch takes each of them seconds otherwise.

`run` is for `subprocess.run([sys.executable, ...])`, `start` for `subprocess.Popen`. A process for each set of imports
is started with the first program that asks for it and lives as long as the tests. What a test says of a program's own
imports needs a process of its own.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Self

from time_limits import HANG_S

ROOT = Path(__file__).parents[1]
MAX_JOB_BYTES = 1 << 17
TRAINING = (
    "torch.fx.experimental.symbolic_shapes",  # what autograd imports when it is first called
    "sendvae_fast.train.sit.stage",
    "sendvae_fast.train.vae.stage",
    "imported_deepspeed",
)


class Program:
    """A program that runs, as `subprocess.Popen` has it: the end of the context waits for it."""

    def __init__(self, arguments: Sequence[object], answers: socket.socket) -> None:
        self.args = list(map(str, arguments))
        self.returncode: int | None = None
        self._answers = answers
        self.pid = int(answers.recv(32))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def fileno(self) -> int:
        """Ready to be read when the program has ended."""
        return self._answers.fileno()

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float = HANG_S) -> int:
        if self.returncode is None:
            if not select.select([self], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self._answers.recv(32))
            self._answers.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    arguments: Sequence[object],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdout: IO | int | None = None,
    stderr: IO | int | None = None,
    imports: tuple[str, ...] = TRAINING,
    own_group: bool = False,
) -> Program:
    """Start a program.

    Args:
        arguments: as for `python`: `-c` and code, `-m` and a module, or a script; then its own.
        env: its environment, that of this process by default.
        cwd: its folder, that of this process by default.
        stdout: a file or `subprocess.DEVNULL`; by default that of this process.
        stderr: the same.
        imports: the modules that are there already.
        own_group: whether it and what it starts are a process group, for `os.killpg`.
    """
    job = {
        "arguments": list(map(str, arguments)),
        "environment": dict(os.environ if env is None else env),
        "folder": str(cwd or Path.cwd()),
        "own_group": own_group,
    }
    answers, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.ExitStack() as stack, theirs:
        files = []
        for default, file in enumerate((subprocess.DEVNULL, stdout, stderr)):
            if file == subprocess.DEVNULL:
                file = stack.enter_context(open(os.devnull, "r+"))
            files.append(default if file is None else file if isinstance(file, int) else file.fileno())
        socket.send_fds(_server(imports), [json.dumps(job).encode()], [*files, theirs.fileno()])
    return Program(arguments, answers)


def run(arguments: Sequence[object], *, timeout: float = HANG_S, **options) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, `options` as for `start`; what it prints is captured, as text."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        program = start(arguments, stdout=out, stderr=err, **options)
        try:
            program.wait(timeout)
        finally:
            program.kill()
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(program.args, program.returncode, out.read(), err.read())


@cache
def _server(imports: tuple[str, ...]) -> socket.socket:
    """The connection to the process that forks, which ends with this one."""
    jobs, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", *filter(None, [os.environ.get("PYTHONPATH")]))))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with theirs:
        server = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno()), *imports], env=environment, pass_fds=[theirs.fileno()]
        )

    def end() -> None:
        jobs.close()
        server.wait()

    atexit.register(end)
    return jobs


# ---- The process that forks ----


def serve(jobs: socket.socket, imports: list[str]) -> None:
    """Fork a program for every job, until nobody is there to give one."""
    for name in imports:
        importlib.import_module(name)
    gc.freeze()  # DeepSpeed collects garbage for every engine, and all that has been imported would be looked at
    atexit.register(gc.unfreeze)
    while True:
        text, files, *_ = socket.recv_fds(jobs, MAX_JOB_BYTES, 4)
        if not text:
            return
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if os.fork() == 0:
            jobs.close()
            hold(json.loads(text), files)
        for file in files:
            os.close(file)


def hold(job: dict, files: list[int]) -> None:
    """Say the number of the program's process, and when it has ended its exit code."""
    *standard, answers = files
    pid = os.fork()
    if pid == 0:
        for number, file in enumerate(standard):
            os.dup2(file, number)
    for file in standard:
        os.close(file)
    if pid == 0:
        os.close(answers)
        execute(job)
    if job["own_group"]:
        os.setpgid(pid, pid)
    with socket.socket(fileno=answers) as client, contextlib.suppress(BrokenPipeError):
        client.send(str(pid).encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        client.send(str(code).encode())
    os._exit(0)


def execute(job: dict) -> None:
    """Do as `python ARGUMENTS...` does, then end."""
    if job["own_group"]:
        os.setpgid(0, 0)
    random.seed()
    # Those of the process that forks know whether another file is a terminal, a pipe or on a disk.
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    sys.path[1:1] = filter(None, job["environment"].get("PYTHONPATH", "").split(os.pathsep))
    first, *rest = job["arguments"]
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    elif first == "-m":
        sys.argv = rest
        sys.path[0] = job["folder"]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path[0] = str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")
    sys.exit(0)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection, sys.argv[2:])
