"""Pictures' decoders that die, planted by `setattr(*dead_thread(...))`.

Run as `dying_decoders.py RUN DATA STEPS HARM VICTIM` on two ranks it trains with one of them planted on one rank.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tiny_runs import vae_config

from sendvae_fast.data import loader
from sendvae_fast.data.dali_decoder import DaliDecoder
from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.train.vae.stage import train_vae


def train(run: Path, pictures: Path, num_steps: int, **data: object) -> int:
    """Stage 1 with a checkpoint at every second step and nothing read that is not needed soon."""
    settings = {"data": {"cache_mb": 0, "read_ahead": 1, **data}, "loop": {"num_steps": num_steps, "save_every": 2}}
    return train_vae(vae_config(run, pictures, **settings))


def at_call(number: int, function: Callable, harm: Callable[[], None]) -> Callable:
    """`function`, with harm done before one of its calls."""
    calls = itertools.count()

    def call(*arguments):
        if next(calls) == number:
            harm()
        return function(*arguments)

    return call


def die() -> None:
    raise RuntimeError("planted")


def dead_thread(number: int, harm: Callable[[], None] = die) -> tuple[object, str, Callable]:
    """What to plant so that a thread of the loader comes to harm at the picture of that number."""
    return loader, "read_crop", at_call(number, loader.read_crop, harm)


def dead_pipeline(runs: Iterator[int]) -> tuple[object, str, Callable]:
    """What to plant so that DALI's pipeline dies at its third batch, and stays dead; `runs` counts batches."""
    build = DaliDecoder._build

    def build_to_die(self):
        pipeline = build(self)
        run = pipeline.run

        def run_or_die(stream):
            if next(runs) == 2:
                pipeline.run = None
                raise RuntimeError("encountered:\n\nplanted\n\nCurrent pipeline object is no longer valid.")
            return run(stream)

        pipeline.run = run_or_die
        return pipeline

    return DaliDecoder, "_build", build_to_die


HARMS = {
    "nothing": (lambda: None, {}),
    "a dead thread": (lambda: setattr(*dead_thread(4 * 4)), {}),
    "a dead pipeline": (lambda: setattr(*dead_pipeline(itertools.count())), {"decoder": "dali"}),
}
"""What is planted, and settings of the data."""


def main(run: str, pictures: str, num_steps: str, harm: str, victim: str) -> None:
    torch.set_num_threads(1)
    plant, data = HARMS[harm]
    ranks = init_distributed("cpu")
    if ranks.rank == int(victim):
        plant()
    assert train(Path(run), Path(pictures), int(num_steps), **data) == 0
    ranks.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
