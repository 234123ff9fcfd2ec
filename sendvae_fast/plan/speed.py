"""The time of a step, by a model on paper: arithmetic, the optimizer's pass over memory, and what ranks exchange."""

from __future__ import annotations

from dataclasses import dataclass

from sendvae_fast.engine.settings import EngineConfig
from sendvae_fast.plan.gpus import GPU
from sendvae_fast.plan.settings import PlanConfig

BACKWARD_SHARE = 2 / 3
"""Of a step's arithmetic: a backward pass has twice the products of a forward one."""
OPTIMIZER_BYTES, EMA_BYTES = 32, 8
"""Read and written for each parameter: its gradient twice (once for the norm), weight and two moments; the average."""


@dataclass(frozen=True)
class StepTime:
    """The seconds of a step."""

    arithmetic_s: float
    optimizer_s: float
    exchange_s: float
    """Of gradients and weights, hidden or not."""
    exposed_s: float
    """Of the exchange, not hidden behind arithmetic."""

    @property
    def total_s(self) -> float:
        """From step to step."""
        return self.arithmetic_s + self.optimizer_s + self.exposed_s


def step_time(
    flops: float, num_parameters: int, engine: EngineConfig, plan: PlanConfig, *, has_ema: bool, recomputes: bool
) -> StepTime:
    """The model.

    Arithmetic takes `flops` / (peak * MFU); recomputation adds a forward pass, a third. A ring exchanges (n - 1) / n of
    the bytes in each direction; over several nodes it does so in each node first, and between nodes each GPU exchanges
    its share through its own adapter. Gradients travel as float32. DDP hides their exchange behind the last backward
    pass; DeepSpeed, as it is set here, hides none. ZeRO 1 and 2 exchange as much, as gradients and as weights, ZeRO 3
    half as much again. Latencies, the loader, checkpoints and stragglers are left out.

    Args:
        flops: of a GPU's share of a step.
        num_parameters: in training.
        engine: whose exchange it is.
        plan: machines and assumptions.
        has_ema: whether an average is kept.
        recomputes: whether forward passes are made twice.
    """
    stage = engine.zero_stage if engine.name == "deepspeed" else 0
    arithmetic_s = flops * (4 / 3 if recomputes else 1) / (plan.kind.flops_per_s * plan.mfu)
    swept = num_parameters * (OPTIMIZER_BYTES + EMA_BYTES * has_ema) / (plan.gpus if stage > 0 else 1)
    exchange_s = all_reduce_s(4 * num_parameters, plan) * (1.5 if stage == 3 else 1.0)
    hidden_s = BACKWARD_SHARE * arithmetic_s / engine.accumulation_steps if engine.name == "ddp" else 0.0
    return StepTime(
        arithmetic_s=arithmetic_s,
        optimizer_s=swept / (plan.kind.memory_bytes_per_s * plan.link_share),
        exchange_s=exchange_s,
        exposed_s=max(0.0, exchange_s - hidden_s),
    )


def all_reduce_s(num_bytes: float, plan: PlanConfig) -> float:
    """Seconds in which all GPUs sum `num_bytes`, in rings within nodes and between them."""
    gpu: GPU = plan.kind
    in_node = min(plan.gpus, plan.gpus_per_node)
    num_nodes = plan.gpus / in_node
    within = 2 * (in_node - 1) / in_node * num_bytes / (gpu.link_bytes_per_s * plan.link_share)
    between = 2 * (num_nodes - 1) / num_nodes * num_bytes / in_node
    return within + between / (gpu.network_bits_per_s / 8 * plan.link_share)
