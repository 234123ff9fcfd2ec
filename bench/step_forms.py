"""The forms of one training step: ours, and those that one would write without this package.

`eager` is the same networks, losses and data with every op in plain PyTorch as public training code has it: contiguous
NCHW, everything under one autocast (so that norms and resizing go through float32), noise from torch.randn, AdamW, EMA
and clipping by torch's foreach functions. Attention is PyTorch's scaled_dot_product_attention in every form.
`compiled` is that with channels-last pictures and weights and the networks' blocks compiled by torch.compile.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw
from torch.utils.weak import WeakTensorKeyDictionary

from bench import step_cases
from bench.kernel_cases import noise_inject as noise_cases
from bench.step_cases import StepCase
from bench.step_names import COMPILED, EAGER, OURS, OURS_COMPILED
from sendvae_fast import ops
from sendvae_fast.engine import ddp_engine
from sendvae_fast.engine import optimizer as engine_optimizer
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.errors import UserError
from sendvae_fast.losses.perceptual import Perceptual
from sendvae_fast.models import noise_injection, norms, transformer
from sendvae_fast.models.autoencoder import autoencoder
from sendvae_fast.models.foundation.foundation import Foundation
from sendvae_fast.train import frozen_networks
from sendvae_fast.train.e2e import networks as e2e_networks
from sendvae_fast.train.e2e import stage as e2e_stage
from sendvae_fast.train.sit import stage as sit_stage
from sendvae_fast.train.vae import stage as vae_stage

ENGINE = {"name": "ddp"}  # one rank: no engine at all, for all forms alike
# How far the losses of a step may lie from the eager form's, relative to it or to the whole loss, and the gradient's
# norm to its own. bfloat16 keeps 8 bits; forms round at different places.
BOUNDS = {torch.float32: {"loss": 1e-4, "grad_norm": 1e-3}, torch.bfloat16: {"loss": 2e-2, "grad_norm": 1e-1}}


@dataclass
class Form:
    """One way of making the step, and its stage."""

    name: str
    plain: bool
    channels_last: bool
    compile: bool
    stage: Any = None
    """A `Stage`, from `build` on."""
    state_bytes: int = 0
    """Memory on the device between steps."""
    losses: dict[str, float] = field(default_factory=dict)
    """Of its first step."""

    def build(self, case: StepCase, scratch: Path, distributed: Distributed) -> None:
        """Make the stage."""
        with self.context():
            self.stage = case.build(scratch, {**ENGINE, "compile": self.compile}, distributed)
        if self.plain:
            for network in step_cases.frozen_networks(self.stage).values():
                network.forward = _autocast(network.forward, self.stage.engine.autocast)

    def step(self, number: int, batch: Any, *, same_noise: bool = False) -> dict[str, Tensor | float]:
        """One step; with `same_noise` the plain forms draw what ours draw, not torch.randn."""
        with self.context(same_noise):
            return self.stage.train_step(number, batch)

    def context(self, same_noise: bool = False) -> contextlib.AbstractContextManager:
        """A context in which the package's code runs as this form."""
        return plain_code(self.channels_last, same_noise) if self.plain else contextlib.nullcontext()


def forms_of(*, compile: bool) -> list[Form]:
    """Every form, eager first."""
    eager, compiled = Form(EAGER, True, False, False), Form(COMPILED, True, True, True)
    ours, ours_compiled = Form(OURS, False, True, False), Form(OURS_COMPILED, False, True, True)
    return [eager, compiled, ours, ours_compiled] if compile else [eager, ours]


def check_losses(forms: list[Form], dtype: torch.dtype) -> None:
    """Raise a UserError unless the first step of every form had the eager form's losses, within `BOUNDS`."""
    eager, *others = forms
    bounds = BOUNDS[dtype]
    for form in others:
        if form.losses.keys() != eager.losses.keys():
            raise UserError(f"form {form.name!r} has losses {sorted(form.losses)}, eager has {sorted(eager.losses)}")
        for name, wanted in eager.losses.items():
            scale = abs(wanted) if name == "grad_norm" else max(abs(wanted), abs(eager.losses["loss"]))
            bound = bounds.get(name, bounds["loss"])
            if not abs(form.losses[name] - wanted) <= bound * scale:  # NaN fails too
                raise UserError(
                    f"form {form.name!r} does not compute the same step: {name} is {form.losses[name]:.6g}, eager's is "
                    f"{wanted:.6g}, and they may differ by {bound:.0e}; nothing was timed"
                )


# -- plain code ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def plain_code(channels_last: bool, same_noise: bool) -> Iterator[None]:
    """Replace the package's fused and tuned parts by plain PyTorch."""
    keeps_dtype = contextlib.nullcontext
    replaced = [
        (norms, "group_norm_silu", group_norm_silu),
        (norms, "adaln", adaln),
        (autoencoder, "no_autocast", lambda _: keeps_dtype()),
        (transformer, "no_autocast", lambda _: keeps_dtype()),
        (engine_optimizer, "adamw_ema_", ForeachAdamWEMA.update),
        (engine_optimizer, "global_norm", torch.nn.utils.get_total_norm),
        (Foundation, "compute_in", _unchanged),
        (Perceptual, "compute_in", _unchanged),
    ]
    if not channels_last:
        replaced += [(stage, "to_model_range", to_model_range) for stage in (vae_stage, e2e_stage)]
        replaced += [(autoencoder, "attention", attention)]
        replaced += [(owner, "MEMORY_FORMAT", torch.contiguous_format) for owner in (ddp_engine, frozen_networks)]
    if not same_noise:
        replaced += [(owner, "noise_inject", noise_inject) for owner in (noise_injection, sit_stage, e2e_networks)]
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in replaced:
            stack.enter_context(patch.object(owner, name, replacement))
        stack.enter_context(ops.use_backend("reference"))
        yield


def group_norm_silu(x, weight, bias, num_groups, eps=1e-6, *, residual=None, silu=True):
    """`ops.group_norm_silu` as an autoencoder without it has it: in the layout and dtype that come."""
    s = x if residual is None else x + residual
    y = F.group_norm(s, num_groups, weight, bias, eps)
    y = F.silu(y) if silu else y
    return y if residual is None else (y, s)


def adaln(x, shift, scale, *, branch: Any = None, gate: Any = None, eps=1e-6, rms=False):
    """`ops.adaln` as DiT and SiT, and with `rms` LightningDiT, write it."""
    s = x if branch is None else x + gate.unsqueeze(1) * branch
    norm = F.rms_norm if rms else F.layer_norm
    return norm(s, s.shape[-1:], eps=eps) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1), s


def noise_inject(mean, spread, latent_mean, latent_std, key, sample_ids, t=None, **options):
    """`ops.noise_inject` with torch.randn."""
    return noise_cases.plain(mean, spread, latent_mean, latent_std, key, sample_ids, **options)


def to_model_range(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`ops.attention` with tokens last, so that the map made of its output is NCHW, as latent-diffusion's is."""
    return ops.attention(q, k, v).mT.contiguous().mT


class ForeachAdamWEMA:
    """`ops.adamw_ema_` by torch.optim's functional AdamW, a foreach EMA and a foreach clip."""

    float_steps = WeakTensorKeyDictionary()
    """torch counts in float32 on the CPU; ours in int64 on the device."""

    @classmethod
    @torch.no_grad()
    def update(
        cls,
        params,
        grads,
        exp_avg,
        exp_avg_sq,
        ema,
        steps,
        *,
        lr,
        betas,
        eps,
        weight_decay,
        ema_decay,
        grad_norm,
        max_grad_norm,
    ) -> None:
        float_steps: Any = cls.float_steps.setdefault(params[0], [torch.zeros(()) for _ in params])
        if max_grad_norm:
            torch._foreach_mul_(grads, (max_grad_norm / (grad_norm + 1e-6)).clamp_max(1.0))
        adamw(
            params,
            grads,
            exp_avg,
            exp_avg_sq,
            [],
            float_steps,
            foreach=True,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            maximize=False,
        )
        if ema is not None:
            torch._foreach_lerp_(ema, params, 1.0 - ema_decay)


def _unchanged(self: Any, _: torch.dtype) -> Any:
    return self


def _autocast(forward: Callable[..., Any], context: Callable[[], Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with context():
            return forward(*args)

    return call
