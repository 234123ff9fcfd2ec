"""The memory of a GPU under an engine, from what a step on one rank was seen to need.

What ZeRO splits is a share of counted bytes; its buffers are DeepSpeed's, read in its code (runtime/zero of
0.19.8) with this engine's settings. P trained parameters of 4 bytes, N ranks, B elements in a bucket:

    ddp, N > 1   buckets of DDP: 4 P, beside the gradients
    ZeRO 1, 2    a float32 copy of this rank's weights 4 P / N, and in the backward pass a bucket 4 B
    ZeRO 1       all gradients until the backward pass is over, then this rank's share of them twice more
    ZeRO 2       gradients in the bucket; this rank's share of them once they are reduced
    ZeRO 3       weights 4 P / N and their copy, this rank's share of gradients throughout, and at most 10^9 gathered
                 weights, which smaller networks keep from the forward pass on; beside them the buffer that a group of
                 weights was gathered into, until the last of the group is used; at the end a copy of the bucket
"""

from __future__ import annotations

from dataclasses import dataclass

from sendvae_fast.engine.deepspeed_engine import MAX_BUCKET_ELEMENTS
from sendvae_fast.engine.settings import EngineConfig
from sendvae_fast.plan.fake_step import EMA, FROZEN, MOMENTS, WEIGHTS, FakeStep

BYTES = 4
"""Of a parameter, a gradient and each number of optimizer state."""
MAX_GATHERED_ELEMENTS = 1_000_000_000
"""DeepSpeed's defaults of stage3_max_live_parameters and stage3_max_reuse_distance."""

MAX_PREFETCHED_ELEMENTS = 50_000_000
"""DeepSpeed's default of stage3_prefetch_bucket_size: weights that are gathered as one group."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each GPU, by part, at the moment when their sum is the most."""

    weights: float
    frozen: float
    gradients: float
    optimizer: float
    ema: float
    activations: float
    buffers: float
    """Of the engine: buckets, copies, gathered weights."""
    slack: float
    """The allocator's: `SLACK_SHARE` of the rest, and `CONTEXT_BYTES`. An assumption."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(vars(self).values())


SLACK_SHARE = 0.08
"""Of what tensors take: rounding to blocks, fragments, workspaces of cuDNN and cuBLAS. An assumption."""
CONTEXT_BYTES = 1.5e9
"""CUDA's context, loaded kernels, NCCL's buffers. An assumption."""


def memory_of(step: FakeStep, engine: EngineConfig, num_gpus: int) -> Memory:
    """The memory of each GPU for micro-batches of `step.num_pictures`."""
    tensors = tensor_memory(step, engine, num_gpus)
    slack = SLACK_SHARE * sum(tensors.values()) + CONTEXT_BYTES
    return Memory(**tensors, slack=slack)


def tensor_memory(
    step: FakeStep, engine: EngineConfig, num_gpus: int, bucket_elements: int = MAX_BUCKET_ELEMENTS
) -> dict[str, float]:
    """The parts of `Memory` that tensors take, in bytes.

    Args:
        step: what one rank was seen to need.
        engine: whose stage it is.
        num_gpus: ranks.
        bucket_elements: the most that is reduced at once.
    """
    stage = engine.zero_stage if engine.name == "deepspeed" else 0
    all_weights = step.state[WEIGHTS]
    share = 1 / num_gpus if stage > 0 else 1.0
    state = {
        "weights": all_weights * (share if stage == 3 else 1.0),
        "frozen": step.state.get(FROZEN, 0),
        "optimizer": step.state[MOMENTS] * share,
        "ema": step.state.get(EMA, 0) * share,
    }
    buffers = all_weights * share if stage > 0 else 0.0  # the float32 copy that the optimizer updates
    if stage == 3:
        buffers += min(all_weights, BYTES * MAX_GATHERED_ELEMENTS)
    if engine.name == "ddp" and num_gpus > 1:
        buffers += all_weights
    largest = BYTES * max(step.num_parameters.values())
    bucket = min(largest, BYTES * bucket_elements) if stage > 0 else 0
    own = all_weights * share
    if stage < 2:
        gradients, activations = step.gradients_at_peak, step.activations_at_peak
    else:  # at the peak none of a first micro-batch's is reduced yet; ZeRO 3 has the place of its share all the time
        gradients = own if stage == 3 or engine.accumulation_steps > 1 else 0
        activations = step.peak_activations
    prefetched = min(all_weights, BYTES * MAX_PREFETCHED_ELEMENTS) if stage == 3 else 0
    moments = [
        {"activations": activations, "gradients": gradients, "buffers": buffers + bucket + prefetched},
        {
            "activations": 0.0,
            "gradients": {0: all_weights, 1: all_weights + 2 * own, 2: 3 * own, 3: 2 * own}[stage],
            "buffers": buffers,
        },
    ]
    if stage > 1:  # the last bucket is reduced
        moments.append({"activations": 0.0, "gradients": own, "buffers": buffers + bucket * (2 if stage == 3 else 1)})
    return state | max(moments, key=lambda parts: sum(parts.values()))
