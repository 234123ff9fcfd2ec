"""Runs a script on two ranks: `python two_ranks.py SCRIPT ARGUMENT...`, in two processes forked from this one.

What torchrun would start imports torch and DeepSpeed three times, which takes longer than what the tests have to do.
"""

import atexit
import gc
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

from time_limits import HANG_S

ROOT = Path(__file__).parents[1]


def run_on_two_ranks(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The script's exit code, 0 where both ranks ended with 0, and what they printed."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", script.parent)))
    return subprocess.run(
        [sys.executable, __file__, script, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def main(arguments: list[str]) -> int:
    """Import what takes long, part into two ranks that run the script, and wait for them."""
    import torch
    import torch.fx.experimental.symbolic_shapes  # which autograd imports when it is first called

    import sendvae_fast.train.sit.stage
    import sendvae_fast.train.vae.stage  # noqa: F401
    from sendvae_fast.engine.deepspeed_private import import_deepspeed

    import_deepspeed(torch.device("cpu"))
    gc.freeze()  # DeepSpeed collects garbage for every engine, and all that has been imported would be looked at
    atexit.register(gc.unfreeze)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [_fork(rank, arguments) for rank in range(2)]
    code = 0
    for _ in range(2):
        pid, status = os.wait()
        ranks.remove(pid)
        if status and not code:
            code = 1
            for other in ranks:  # it may wait for the one that failed
                os.kill(other, signal.SIGKILL)
    return code


def _fork(rank: int, arguments: list[str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
