"""The DeepSpeed engine: ZeRO stages 0 to 3 behind the engine interface.

Parameters stay fp32 at every stage (bf16 is autocast), so the module holds the true weights at stages 0 to 2; at stages
1 and 2 the optimizer works on a flat fp32 copy of this rank's part, at stage 3 the module's own tensors are split.
"""

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sendvae_fast.engine.deepspeed_private import (
    flat_partitions,
    import_deepspeed,
    link_optimizer_state,
    local_fragment,
)
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.engine import Engine
from sendvae_fast.engine.settings import EngineConfig, OptimizerConfig
from sendvae_fast.engine.state_parts import Part

MAX_BUCKET_ELEMENTS = 100_000_000
"""Elements reduced at once. DeepSpeed's default of 5e8 is a 2 GB buffer per engine, whatever the model's size."""
CPU_BUCKET_ELEMENTS = 4_000_000
"""The same on CPU ranks, and the elements of a parameter group there: 16 MB. DeepSpeed makes its buffers anew at every
step; above 32 MB malloc takes their pages from the system each time, which costs more than the communication."""


class DeepSpeedEngine(Engine):
    """An engine whose steps equal plain AdamW + EMA at every stage, up to the order of summation over ranks."""

    def __init__(
        self, module: nn.Module, optimizer_config: OptimizerConfig, config: EngineConfig, distributed: Distributed
    ) -> None:
        super().__init__(module, optimizer_config, config, distributed)
        self._saves_allocations = distributed.device.type == "cpu" and config.zero_stage in (1, 2)
        if self._saves_allocations:
            # DeepSpeed flattens, splits, updates and gathers each group by itself.
            (group,) = self.optimizer.param_groups
            self.optimizer.param_groups = [
                {**group, "params": part} for part in chunks(group["params"], CPU_BUCKET_ELEMENTS)
            ]
        deepspeed = import_deepspeed(distributed.device)
        self._gathered_parameters = deepspeed.zero.GatheredParameters
        self._fragments = deepspeed.utils
        self._engine, *_ = deepspeed.initialize(
            model=self.module,
            optimizer=self.optimizer,
            config=self._deepspeed_config(),
            dist_init_required=False,
        )
        # DeepSpeed fills optimizer state at the first step; here it is readable and loadable from the start. State from
        # a trial step at initialisation (some versions make one with zero gradients) is removed.
        self.optimizer.state.clear()
        if config.zero_stage == 3:
            self.optimizer.init_state(flat_partitions(self._engine.optimizer))
        else:
            self.optimizer.init_state(param for group in self.optimizer.param_groups for param in group["params"])
        if config.zero_stage in (1, 2):
            link_optimizer_state(self._engine.optimizer)

    def _deepspeed_config(self) -> dict[str, Any]:
        stage = self.config.zero_stage
        num_elements = sum(param.numel() for param in self.trained.values())
        zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": min(num_elements, MAX_BUCKET_ELEMENTS)}
        if self._saves_allocations:
            # Gradients are reduced in place, bucket by bucket, without a buffer as large as all of them.
            zero |= {"contiguous_gradients": False, "reduce_scatter": False, "reduce_bucket_size": CPU_BUCKET_ELEMENTS}
        settings = {
            # Only DeepSpeed's own throughput line would use it, and that is off.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.config.accumulation_steps,
            # At stage 0 DeepSpeed would neither report the norm nor skip a bad step: the optimizer does both.
            "gradient_clipping": self.optimizer_config.max_grad_norm if stage > 0 else 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
        }
        if self.config.precision == "bf16":
            # No "lower precision safe" modules: gradients are reduced, and ZeRO 3 gathers weights, in fp32.
            settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        return settings

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def _backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        if self._accumulates:
            # Only counts the micro-batch.
            self._engine.step()

    def _apply_gradients(self) -> Tensor | float:
        self._engine.step()
        if self.config.zero_stage == 0:
            assert self.optimizer.grad_norm is not None
            return self.optimizer.grad_norm
        # The norm before clipping; inf for a skipped step.
        return float(self._engine.get_global_grad_norm())

    def gather(self, name: str, kind: str) -> Tensor:
        param = self.module.get_parameter(name)
        if kind == "model":
            with self._whole(param):
                return param.detach().clone() if self.config.zero_stage == 3 else param.detach()
        if self.config.zero_stage == 0:
            return self.optimizer.state[param][kind]
        if self.distributed.world_size == 1 and (part := self.own_part(name, kind)) is not None:
            return part.values.view(self._shapes[name])  # DeepSpeed would make a copy and sum it over the one rank
        return self._fragments.safe_get_full_optimizer_state(param, kind)

    def own_part(self, name: str, key: str) -> Part | None:
        if self.config.zero_stage == 0:
            return super().own_part(name, key)
        param = self.trained[name]
        if self.config.zero_stage < 3:
            fragment = local_fragment(param, key)
            return None if fragment is None else Part(*fragment)
        padded = self._fragments.safe_get_local_optimizer_state(param, key).flatten()
        start = len(padded) * self.distributed.rank
        values = padded[: max(self._shapes[name].numel() - start, 0)]
        return Part(start, values) if len(values) else None

    @torch.no_grad()
    def scatter(self, name: str, kind: str, value: Tensor) -> None:
        param = self.module.get_parameter(name)
        if kind == "model":
            with self._whole(param, modifier_rank=0):
                param.copy_(value)
        if name not in self.trained:
            return
        if self.config.zero_stage == 0:
            if kind != "model":
                self.optimizer.state[param][kind].copy_(value)
        elif self.config.zero_stage == 3:
            self._scatter_split(param, kind, value)
        elif kind == "model":
            self._fragments.safe_set_full_fp32_param(param, value)
        else:
            self._fragments.safe_set_full_optimizer_state(param, value, kind)

    def _scatter_split(self, param: nn.Parameter, kind: str, value: Tensor) -> None:
        """ZeRO 3: this rank's equal part of the flattened value, which is padded to a multiple of the world size.

        DeepSpeed's own safe_set_full_* fail where there is padding.
        """
        size = self._fragments.safe_get_local_fp32_param(param).numel()
        padded = value.new_zeros(size * self.distributed.world_size)
        padded[: value.numel()] = value.flatten()
        part = padded[size * self.distributed.rank :][:size]
        if kind == "model":
            self._fragments.safe_set_local_fp32_param(param, part)
        else:
            self._fragments.safe_set_local_optimizer_state(param, part, kind)

    def _whole(self, param: nn.Parameter, modifier_rank: int | None = None) -> contextlib.AbstractContextManager:
        """A context with a ZeRO 3 parameter whole on this rank; on exit the values of `modifier_rank` are split."""
        if self.config.zero_stage < 3:
            return contextlib.nullcontext()
        return self._gathered_parameters([param], modifier_rank=modifier_rank)

    def close(self) -> None:
        self._engine.destroy()


def chunks(params: Iterable[Tensor], max_elements: int) -> list[list[Tensor]]:
    """The parameters in their order, in lists of up to `max_elements` elements; a larger one is alone in its list."""
    parts: list[list[Tensor]] = []
    room = 0
    for param in params:
        if param.numel() > room:
            parts.append([])
            room = max_elements
        parts[-1].append(param)
        room -= param.numel()
    return parts
