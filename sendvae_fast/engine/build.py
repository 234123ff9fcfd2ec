"""The engine that a configuration asks for, and how its steps are made."""

from collections.abc import Callable
from typing import Any

from torch import nn

from sendvae_fast.engine.ddp_engine import DDPEngine
from sendvae_fast.engine.deepspeed_engine import DeepSpeedEngine
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.engine import Engine
from sendvae_fast.engine.replayed_functions import Recorder, Replayed
from sendvae_fast.engine.settings import EngineConfig, OptimizerConfig
from sendvae_fast.engine.streams import CudaGraphRecorder
from sendvae_fast.errors import UserError

ENGINES: dict[str, type[Engine]] = {"deepspeed": DeepSpeedEngine, "ddp": DDPEngine}

NUM_FIRST_STEPS = 11
"""Steps of a kind before it is recorded: so many DDP wants (PyTorch's notes on CUDA, "Usage with
DistributedDataParallel"), which arranges its buckets in them and times them."""


def build_engine(
    module: nn.Module, optimizer_config: OptimizerConfig, config: EngineConfig, distributed: Distributed
) -> Engine:
    """Move `module` to this rank's device, copy rank 0's weights to all ranks, and make it trainable. Collective."""
    return ENGINES[config.name](module, optimizer_config, config, distributed)


def build_recorder(config: EngineConfig, distributed: Distributed) -> Recorder | None:
    """What records steps, or None where the settings do not ask for it. Engines are built while it is `active`.

    Raises:
        UserError: the settings ask for it and there is no GPU.
    """
    if not config.cuda_graph:
        return None
    if distributed.device.type != "cuda":
        raise UserError("engine.cuda_graph needs a GPU, and there is none here: leave it out")
    return CudaGraphRecorder(distributed.device)


def replayed_step(step: Callable[..., Any], recorder: Recorder | None, distributed: Distributed) -> Callable[..., Any]:
    """`step`, a function as `engine.replayed_functions.Replayed` takes it: replayed, or without a recorder as it is."""
    return step if recorder is None else Replayed(step, recorder, distributed.device, NUM_FIRST_STEPS)
