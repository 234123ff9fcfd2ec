"""The machines that a process has been started on, for a plan of its own run."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from sendvae_fast.plan.gpus import gpu_in
from sendvae_fast.plan.settings import PlanConfig


def machines_here(num_ranks: int) -> PlanConfig:
    """As many GPUs as ranks, of the kind that is here if there is one that is known."""
    kind = gpu_in(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    machines = PlanConfig(gpus=num_ranks, gpus_per_node=math.gcd(num_ranks, PlanConfig.gpus_per_node))
    return machines if kind is None else replace(machines, gpu=kind.name)
