"""Python programs as forks of a process that has imported what they need: torch takes each of them seconds otherwise.

`run` is for `subprocess.run([sys.executable, ...])`, `start` for `subprocess.Popen`. A process for each set of imports
is started with the first program that asks for it, serves all workers of pytest-xdist, and ends when the last of them
is gone. What a test says of a program's own imports needs a process of its own.
"""

import atexit
import contextlib
import fcntl
import gc
import hashlib
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
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Self

from time_limits import HANG_S

ROOT = Path(__file__).parents[1]
MAX_JOB_BYTES = 1 << 17
TRAINING = (
    "torch.fx.experimental.symbolic_shapes",  # what autograd imports when it is first called
    "torch.utils.tensorboard",
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
    """A connection to the process that forks, which is started where no worker of these tests has started it."""
    tests = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    name = hashlib.sha256(repr((tests, imports)).encode()).hexdigest()[:16]
    place = Path(tempfile.gettempdir(), f"forks-{name}")
    jobs = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with _alone():
        try:
            jobs.connect(str(place))
        except (FileNotFoundError, ConnectionRefusedError):
            place.unlink(missing_ok=True)
            _start_server(place, imports)
            jobs.connect(str(place))
    atexit.register(jobs.close)
    return jobs


def _start_server(place: Path, imports: tuple[str, ...]) -> None:
    """Start the process that forks. Who connects need not wait for its imports."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", *filter(None, [os.environ.get("PYTHONPATH")]))))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        mask = os.umask(0o077)  # whoever may connect may run programs
        try:
            listener.bind(str(place))
        finally:
            os.umask(mask)
        listener.listen()
        subprocess.run(
            [sys.executable, __file__, str(listener.fileno()), *imports],
            env=environment, pass_fds=[listener.fileno()], check=True,
        )  # fmt: skip


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Among all processes that begin or end to serve."""
    folder = os.open(Path(__file__).parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


# ---- The process that forks ----


def serve(listener: socket.socket, imports: list[str]) -> None:
    """Fork a program for every job, until nobody is there to give one."""
    for name in imports:
        importlib.import_module(name)
    gc.freeze()  # DeepSpeed collects garbage for every engine, and all that has been imported would be looked at
    atexit.register(gc.unfreeze)
    clients: list[socket.socket] = []
    while clients or not _ended(listener):
        for ready in select.select([listener, *clients], [], [])[0]:
            if ready is listener:
                clients.append(listener.accept()[0])
                continue
            text, files, *_ = socket.recv_fds(ready, MAX_JOB_BYTES, 4)
            if not text:
                clients.remove(ready)
                ready.close()
                continue
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if os.fork() == 0:
                for connection in (listener, *clients):
                    connection.close()
                hold(json.loads(text), files)
            for file in files:
                os.close(file)


def _ended(listener: socket.socket) -> bool:
    """Take the name away, unless somebody waits to be let in."""
    with _alone():
        if select.select([listener], [], [], 0)[0]:
            return False
        Path(listener.getsockname()).unlink(missing_ok=True)
        return True


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
    if os.fork() == 0:  # it is nobody's child, as any of its clients may be the first to end
        with socket.socket(fileno=int(sys.argv[1])) as connection:
            serve(connection, sys.argv[2:])
