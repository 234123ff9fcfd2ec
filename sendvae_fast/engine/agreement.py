"""What all ranks of a job must have in common, which they compare once, when they have met."""

import importlib.metadata
import socket
from collections.abc import Mapping

import torch
from torch.cuda.nccl import version as nccl_version

from sendvae_fast.version import __version__, package_commit

HOST = "host"
GPU = "GPU"


def facts_of_rank(device: torch.device) -> dict[str, str]:
    """What is compared between ranks, and where this one is."""
    try:
        deepspeed = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        deepspeed = "not installed"
    facts = {
        HOST: socket.gethostname(),
        "sendvae_fast": __version__,
        "commit": package_commit() or "unknown",
        "torch": torch.__version__,
        "deepspeed": deepspeed,
    }
    if device.type == "cuda":
        nccl = nccl_version()
        facts["NCCL"] = ".".join(map(str, nccl)) if isinstance(nccl, tuple) else str(nccl)
        facts[GPU] = str(torch.cuda.get_device_properties(device).uuid)
    return facts


def difference(everyone: list[Mapping[str, str]]) -> str | None:
    """The first thing in which ranks differ and must not, or share and must not, for the user; None without one."""
    hosts = [facts[HOST] for facts in everyone]
    for name in (name for name in everyone[0] if name not in (HOST, GPU)):
        values = [facts.get(name) for facts in everyone]
        for rank, value in enumerate(values):
            if value != values[0]:
                return (
                    f"rank 0 on {hosts[0]} has {name} {values[0]} and rank {rank} on {hosts[rank]} has {name} {value}: "
                    "use one environment on all nodes (one folder that all see, or one container image)"
                )
    seen: dict[tuple[str, str], int] = {}
    for rank, facts in enumerate(everyone):
        first = seen.setdefault((hosts[rank], facts[GPU]), rank) if GPU in facts else rank
        if first != rank:
            return (
                f"ranks {first} and {rank} on {hosts[rank]} have the same GPU ({facts[GPU]}): start one rank a GPU, "
                f"and give each its own (with Slurm: --gpus-per-task=1)"
            )
    return None
