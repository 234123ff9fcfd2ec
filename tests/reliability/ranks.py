"""Ranks as forks of one process, which dies of nothing that kills them, and a training small enough to be killed often.

`python ranks.py` (see `main`) imports what takes long once; a rank is then a fork that joins a new group.
"""

import faulthandler
import importlib
import itertools
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from engine_cases import ENGINES, Network, batch
from saved_tensors import tensors_in

from sendvae_fast.engine.build import build_engine
from sendvae_fast.engine.distributed import Distributed, init_distributed
from sendvae_fast.engine.run import RunDirectory
from sendvae_fast.engine.settings import EngineConfig, OptimizerConfig
from sendvae_fast.engine.snapshot import Snapshot, Write
from sendvae_fast.errors import UserError
from sendvae_fast.files import save_tensors
from sendvae_fast.models.weights import read_weights
from sendvae_fast.train.loop import fit
from sendvae_fast.train.settings import LoopConfig

LIMIT_S = 600
"""After so many seconds a rank has hung, on a machine however loaded."""
DIED = 9
"""Exit code of a rank that ended itself on purpose, without any clean-up."""


class Batch(NamedTuple):
    ids: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor


class Stage:
    """A regression behind the loop's interface, on any engine."""

    title, dtype, learning_rate, flops_by_part = "train tiny", torch.float32, 3e-3, None

    def facts(self):
        return {}

    def next_command(self):
        return "none"

    def __init__(self, kind: str, ranks: Distributed, fault: Callable[[int, Batch], Batch] | None = None) -> None:
        torch.manual_seed(0)
        settings = OptimizerConfig(learning_rate=3e-3, ema_decay=0.9)
        self.engine = build_engine(Network(), settings, EngineConfig(**ENGINES[kind]), ranks)
        self.ranks, self.fault = ranks, fault

    def batches(self, start_step):
        for step in itertools.count(start_step):
            x, y = (part.chunk(self.ranks.world_size)[self.ranks.rank].float() for part in batch(step))
            yield Batch(torch.arange(len(x)), x, y)

    def train_step(self, step, batch):
        if self.fault is not None:
            batch = self.fault(step + 1, batch)
        loss = (self.engine(batch.x) - batch.y).square().mean()
        self.engine.backward(loss)
        norm = self.engine.queue_step()
        self.engine.see(norm)
        return {"loss": loss.detach(), "grad_norm": norm}

    def snapshot(self, snapshot: Snapshot) -> Write:
        model, write_engine = self.engine.copy_full_state("model", snapshot), self.engine.snapshot(snapshot)

        def write(directory):
            write_engine(directory / "engine")
            if self.ranks.is_main:
                save_tensors(directory / "model.safetensors", model)

        return write

    def load(self, directory):
        self.engine.load_model(read_weights(directory / "model.safetensors"))
        self.engine.load(directory / "engine")

    def preview(self, step, directory):
        pass


def train(folder: Path, kind: str, num_steps: int, fault=None, prepare=None, **settings) -> int:
    """What a rank does: train to the last step, or to its death; its exit code."""
    ranks = init_distributed("cpu")
    if prepare is not None:
        prepare(ranks)
    settings = {"save_every": 2, "log_every": 2, "preview_every": 10**6} | settings
    run = RunDirectory(folder, OptimizerConfig(), ranks)
    stage = Stage(kind, ranks, None if fault is None else lambda step, batch: fault(ranks, step, batch))
    return fit(stage, LoopConfig(num_steps=num_steps, **settings), run, 8, ranks)


def start(world_size: int, work: Callable[[], int | None], log: Path) -> list[int]:
    """Process ids of forked ranks that do `work` and end with its result; what they say goes to `log`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return [_fork(rank, world_size, port, work, log) for rank in range(world_size)]


def _fork(rank: int, world_size: int, port: int, work: Callable[[], int | None], log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        faulthandler.enable()
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        if world_size == 1:
            del os.environ["RANK"], os.environ["WORLD_SIZE"]
        code = work() or 0
        init_distributed("cpu").close()
    except UserError as error:
        print(f"rank {rank}: {error}", flush=True)
        code = error.exit_code
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(pids: list[int], *, together: bool = True) -> list[int]:
    """Exit codes, of signals negative; with `together` what torchrun does: one that fails ends the others."""
    codes: dict[int, int] = {}
    until = time.monotonic() + LIMIT_S
    while len(codes) < len(pids):
        for pid in [pid for pid in pids if pid not in codes]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        failed = any(code != 0 for code in codes.values())
        if (together and failed) or time.monotonic() > until:
            for pid in [pid for pid in pids if pid not in codes]:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def run_to_the_end(world_size: int, work: Callable[[], int | None], log: Path) -> None:
    """Run ranks that must end well."""
    codes = wait(start(world_size, work, log))
    assert codes == [0] * world_size, f"exit codes {codes}: {log.read_text()[-1500:]}"


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by name, flat: see `tensors_in`."""
    return {name: value.flatten() for name, value in tensors_in(folder / "checkpoints" / f"step_{step:08d}").items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert one and one.keys() == other.keys(), sorted(one.keys() ^ other.keys())
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"{len(different)} tensors differ: {different[:3]}"


class Outcomes:
    """What became of each trial, for the test that started this process."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def trial(self, name: str, work: Callable[[], None]) -> None:
        """Do `work` and note its error, if any."""
        error = None
        try:
            work()
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"trial": name, "error": error}) + "\n")


def main(arguments: list[str]) -> None:
    """`FOLDER DEEPSPEED SCENARIO=ARGUMENT ...`: import what takes long, and run in turn functions of other files here.

    SCENARIO is one of the functions that take a folder, `Outcomes` and an argument: `scenarios.elastic`.
    """
    import torch._dynamo  # which DDP imports
    import torch.fx.experimental.symbolic_shapes  # and autograd, when it is first called
    import torch.utils.tensorboard

    folder, with_deepspeed, *names = arguments
    torch.set_num_threads(1)
    if with_deepspeed == "yes":
        from sendvae_fast.engine.deepspeed_private import import_deepspeed

        import_deepspeed(torch.device("cpu"))
    for words in names:
        name, _, argument = words.partition("=")
        place = Path(folder) / name
        place.mkdir()
        module, _, function = name.partition(".")
        scenario = getattr(importlib.import_module(module), function)
        scenario(place, Outcomes(Path(folder) / f"{name}.jsonl"), argument)


if __name__ == "__main__":
    sys.modules["ranks"] = sys.modules["__main__"]
    main(sys.argv[1:])
