"""Runs a script on two ranks, which are forks: what torchrun would start imports torch and DeepSpeed three times."""

import os
import select
import socket
import subprocess
import tempfile
from pathlib import Path

import forks
from time_limits import HANG_S


def run_on_two_ranks(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The script's exit code, 0 where both ranks ended with 0, and what they printed. One that fails ends the other."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    meeting |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        ranks = []
        for rank in ("0", "1"):
            env = {**os.environ, **meeting, "RANK": rank, "LOCAL_RANK": rank}
            ranks.append(forks.start([script, *arguments], env=env, stdout=out, stderr=err))
        ended = select.select(ranks, [], [], HANG_S)[0]
        if not ended or any(rank.wait() for rank in ended):
            for rank in ranks:  # it may wait for the one that failed
                rank.kill()
        codes = [rank.wait() for rank in ranks]
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess([script, *arguments], int(any(codes)), out.read(), err.read())
