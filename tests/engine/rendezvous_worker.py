"""Ranks that cannot meet: `python rendezvous_worker.py` prints, as JSON, what the ranks of every case say.

Ranks are forked from this process, as each would import torch for seconds otherwise.
"""

import io
import json
import os
import socket
import sys
from contextlib import redirect_stderr

import torch

import sendvae_fast.engine.agreement  # noqa: F401
from sendvae_fast.engine import rendezvous
from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.errors import UserError


def main() -> None:
    """Every case, one after the other."""
    said = {}
    rendezvous.NOTICE_S = 600.0
    with socket.create_server(("127.0.0.1", 0)) as taken:  # by somebody who never says a word
        said["taken"] = run_ranks(2.0, {}, {}, port=taken.getsockname()[1])
        rendezvous.NOTICE_S, rendezvous.ANSWER_S = 0.1, 1.0
        said["listening"] = run_ranks(300.0, {"RANK": "1"}, port=taken.getsockname()[1])
    rendezvous.NOTICE_S = 600.0
    said["missing"] = run_ranks(1.0, {})
    said["strangers"] = run_ranks(2.0, {"SLURM_JOB_ID": "1"}, {"SLURM_JOB_ID": "2"})
    said["versions"] = run_ranks(60.0, {}, {"OTHER_TORCH": "1.0"})
    said["data"] = run_ranks(60.0, {}, {"NO_DATA": "1"})
    json.dump({"host": socket.gethostname(), **said}, sys.stdout)


def run_ranks(wait_s: float, *variables: dict[str, str], port: int | None = None) -> list[str]:
    """What each of the ranks with these variables says."""
    if port is None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    pipes = []
    for rank, extra in enumerate(variables):
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.environ |= {"RANK": str(rank), **extra}
            os.write(writing, words_of_rank(wait_s).encode())
            os._exit(0)
        os.close(writing)
        pipes.append(reading)
    said = []
    for pipe in pipes:
        with open(pipe) as file:
            said.append(file.read())
    for _ in variables:
        os.wait()
    return [words.replace(f":{port}", ":PORT") for words in said]


def words_of_rank(wait_s: float) -> str:
    """Meet the others; what is printed meanwhile, and behind it the error, or "met"."""
    torch.__version__ = os.environ.get("OTHER_TORCH", torch.__version__)
    with redirect_stderr(io.StringIO()) as printed:
        try:
            ranks = init_distributed("cpu", rendezvous_s=wait_s)
            with ranks.all_or_none():
                if "NO_DATA" in os.environ:
                    raise UserError("/data/photos is not there")
        except UserError as error:
            return f"{printed.getvalue()}{error}"
    return f"{printed.getvalue()}met"


main()
