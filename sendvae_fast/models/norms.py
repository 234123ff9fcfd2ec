"""Norms fused with their neighbours in a network, each one op, for any network; see `sendvae_fast.nn`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sendvae_fast.ops import adaln, group_norm_silu


class GroupNormSiLU(nn.GroupNorm):
    """`nn.GroupNorm` and the `nn.SiLU` after it in one pass over memory (`ops.group_norm_silu`, which has the formula).

    Parameters are those of `nn.GroupNorm` (``weight`` and ``bias``, each [C]), so state dicts fit either way. Unlike it
    this takes maps [B, C, H, W] alone, returns them channels-last, computes in float32 inside and returns x's dtype,
    under autocast too. It has first derivatives only.

    Args:
        num_groups: a divisor of `num_channels`.
        num_channels: C.
        eps: added to the variance; the default is `nn.GroupNorm`'s, latent-diffusion and diffusers have 1e-6.
        silu: False leaves out the activation.
        device: of the parameters.
        dtype: of the parameters: float32 or that of the maps.

    Raises:
        ValueError: `num_groups` does not divide `num_channels`; when called, a map that does not fit.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        *,
        silu: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_groups, num_channels, eps=eps, device=device, dtype=dtype)
        self.silu = silu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """A map [B, C, H, W] to the same; with a residual like x, the norm of their sum and the sum itself."""
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, residual=residual, silu=self.silu)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, silu={self.silu}"


class AdaLayerNorm(nn.Module):
    """Adaptive layer norm of DiT (Peebles and Xie, 2023; SiT has it too) in one pass over memory (`ops.adaln`).

    ``y = LayerNorm(s) * (1 + scale) + shift`` without weights, of the tokens ``s = x + gate * branch``: a residual
    connection that ends before the norm needs no pass of its own. It has no parameters, and first derivatives only.

    Args:
        eps: added to the variance, not negative; the default is DiT's.
    """

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(
        self, x: Tensor, shift: Tensor, scale: Tensor, branch: Tensor | None = None, gate: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalise and modulate.

        Args:
            x: tokens [B, N, D], float32, bfloat16, float16 or float64.
            shift: [B, D], in x's dtype or float32; may be part of a wider tensor, as `chunk` gives it.
            scale: like shift.
            branch: the last layer's output, like x; with `gate` or not at all.
            gate: its factor, like `shift`.

        Returns:
            (y, s), each [B, N, D] in x's dtype; without a branch s is x.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit.
        """
        return adaln(x, shift, scale, branch=branch, gate=gate, eps=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class AdaRMSNorm(nn.Module):
    """`AdaLayerNorm` with RMSNorm (Zhang and Sennrich, 2019) and its weight [D], as LightningDiT has it.

    ``y = s / sqrt(mean(s²) + eps) * weight * (1 + scale) + shift``. The op is given weight and scale as one factor, and
    all modulation in float32.

    Args:
        width: D.
        eps: added to the mean of squares, not negative; the default is LightningDiT's.
        device: of the weight.
        dtype: of the weight.
    """

    def __init__(
        self,
        width: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def forward(
        self, x: Tensor, shift: Tensor, scale: Tensor, branch: Tensor | None = None, gate: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalise and modulate, with what `AdaLayerNorm` takes, gives and raises."""
        compute = torch.promote_types(scale.dtype, torch.float32)
        weight, shift, scale = (tensor.to(compute) for tensor in (self.weight, shift, scale))
        gate = None if gate is None else gate.to(compute)
        scale = torch.addcmul(weight - 1, weight, scale)  # 1 + it is weight * (1 + scale)
        return adaln(x, shift, scale, branch=branch, gate=gate, eps=self.eps, rms=True)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"
