"""The engine that a configuration asks for."""

from torch import nn

from sendvae_fast.engine.ddp_engine import DDPEngine
from sendvae_fast.engine.deepspeed_engine import DeepSpeedEngine
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.engine import Engine, EngineConfig
from sendvae_fast.engine.optimizer import OptimizerConfig

ENGINES: dict[str, type[Engine]] = {"deepspeed": DeepSpeedEngine, "ddp": DDPEngine}


def build_engine(
    module: nn.Module, optimizer_config: OptimizerConfig, config: EngineConfig, distributed: Distributed
) -> Engine:
    """Move `module` to this rank's device, copy rank 0's weights to all ranks, and make it trainable. Collective."""
    return ENGINES[config.name](module, optimizer_config, config, distributed)
