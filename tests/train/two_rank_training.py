"""Run on two ranks by test_two_ranks.py: all stages and ways to align under their engines, in one pair of processes."""

import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import torch
from everything import EVERYTHING
from tiny_runs import COMPARED, COMPARED_E2E, e2e_config, sit_config, vae_config

from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.train.e2e.stage import train_e2e
from sendvae_fast.train.evaluator import Evaluator
from sendvae_fast.train.sit.stage import train_sit
from sendvae_fast.train.vae.stage import train_vae

ZERO = {f"zero{stage}": {"zero_stage": stage} for stage in range(4)}
ENGINES = {"ddp": {"name": "ddp"}, **ZERO}
EVERY_RUN = [*product(("vae", "sit"), ZERO), *product(("va", "reals", "e2e", "started"), ("ddp", "zero2"))]
FEW_RUNS = [
    ("vae", "zero1"), ("vae", "zero3"), ("sit", "zero2"), ("sit", "zero3"), ("va", "zero2"), ("reals", "ddp"),
    ("e2e", "zero2"), ("started", "zero2"),
]  # fmt: skip
RUNS = EVERY_RUN if EVERYTHING else FEW_RUNS
"""What is trained, and under which engine. tests/engine/test_engine.py has each engine on two ranks."""


def train_all(out: Path, images: Path, latents: Path, autoencoder: Path, runs: Iterable[tuple[str, str]]) -> None:
    """`num_steps` of each run, into `out/<engine>/<what>`, with previews; some are measured. Weights of the other ways
    to align are adaptive where possible. What is "started" goes on from REPA-E's checkpoint in `out/../theirs`.
    """
    Evaluator.chunk = 4  # so that both ranks have work
    for what, name in runs:
        run, settings = out / name / what, {"engine": ENGINES[name], "loop": {"num_steps": num_steps(what)}}
        if name in MEASURED and what in ("vae", "sit"):
            drawn = {"generate": DRAWN} if what == "sit" else {}
            settings["evaluation"] = {"features": {"name": "demo"}, **drawn}
        if what in ("e2e", "started"):
            if what == "started":
                settings["start_from"] = str(out.parent / "theirs" / "generator.pt")
            train_e2e(e2e_config(run, images, **settings, **COMPARED_E2E))
        elif what == "sit":
            settings |= {"autoencoder": str(autoencoder), "optimizer": COMPARED["optimizer"]}
            train_sit(sit_config(run, images, latents, **settings))
        else:
            if what != "vae":
                settings |= {"loss": {"gan_adaptive": True}, "alignment": {"method": what}}
            train_vae(vae_config(run, images, **settings, **COMPARED))


def num_steps(what: str) -> int:
    """After which the run has ended."""
    return 5 if what == "started" else 3


MEASURED = ("ddp", "zero3")
DRAWN = {"num_samples": 8, "batch_size": 4, "guidance_scale": 1.0, "sampler": {"num_steps": 2}}

if __name__ == "__main__":
    torch.set_num_threads(1)
    train_all(*map(Path, sys.argv[1:5]), RUNS)
    init_distributed("cpu").close()
