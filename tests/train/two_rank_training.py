"""Run on two ranks by test_two_ranks.py: both stages under every ZeRO stage, in one pair of processes."""

import sys
from pathlib import Path

import torch
from tiny_runs import COMPARED, COMPARED_E2E, e2e_config, sit_config, vae_config

from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.train.e2e.stage import train_e2e
from sendvae_fast.train.evaluator import Evaluator
from sendvae_fast.train.sit.stage import train_sit
from sendvae_fast.train.vae.stage import train_vae


def train_all(out: Path, images: Path, latents: Path, autoencoder: Path, engines: dict[str, dict]) -> None:
    """Three steps of each stage under each engine, into `out/<engine>/{vae,sit}`, with previews; some are measured."""
    Evaluator.chunk = 4  # so that both ranks have work
    for name, engine in engines.items():
        settings = {"engine": engine, "loop": {"num_steps": 3}}
        if name in MEASURED:
            settings["evaluation"] = {"features": {"name": "demo"}}
        train_vae(vae_config(out / name / "vae", images, **settings, **COMPARED))
        if name in MEASURED:
            settings["evaluation"] = {"features": {"name": "demo"}, "generate": DRAWN}
        settings |= {"autoencoder": str(autoencoder), "optimizer": COMPARED["optimizer"]}
        train_sit(sit_config(out / name / "sit", images, latents, **settings))


def train_aligned(out: Path, images: Path, engines: dict[str, dict]) -> None:
    """Three steps of each other way to align, weights adaptive where possible, into `out/<engine>/{va,reals,e2e}`."""
    for name, engine in engines.items():
        for method in ("va", "reals"):
            settings = {"engine": engine, "loop": {"num_steps": 3}, "loss": {"gan_adaptive": True}, **COMPARED}
            train_vae(vae_config(out / name / method, images, alignment={"method": method}, **settings))
        train_e2e(e2e_config(out / name / "e2e", images, engine=engine, loop={"num_steps": 3}, **COMPARED_E2E))


ALIGNED_ENGINES = {"ddp": {"name": "ddp"}, "zero2": {"zero_stage": 2}}
MEASURED = ("ddp", "zero3")
DRAWN = {"num_samples": 8, "batch_size": 4, "guidance_scale": 1.0, "sampler": {"num_steps": 2}}
ENGINES = {f"zero{stage}": {"zero_stage": stage} for stage in range(4)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    train_all(*map(Path, sys.argv[1:5]), ENGINES)
    train_aligned(*map(Path, sys.argv[1:3]), ALIGNED_ENGINES)
    init_distributed("cpu").close()
