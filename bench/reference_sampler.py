"""A sampler of a SiT in plain PyTorch, as the public samplers have it.

The SDE of REPA and REPA-E by Euler-Maruyama with a float64 state on the device, guidance of a concatenated batch
combined in the drift, the network in float32 or under one autocast, which keeps its casts of the weights for all steps.
Under it norms and the residual stream are float32, as they are in public code.

Shape letters: B batch, C latent channels, H latent size, N tokens, D width.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sendvae_fast.models.sit.sit import SiT, SiTBlock


class PlainSiT(nn.Module):
    """A SiT's velocity from its own weights without any op of this package; without the switches of LightningDiT."""

    def __init__(self, sit: SiT, *, compile: bool = False) -> None:
        super().__init__()
        self.sit = sit
        self.block = torch.compile(plain_block, dynamic=False) if compile else plain_block

    def forward(self, z_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """z_t [B, C, H, H], t [B], labels int64 [B] to the velocity [B, C, H, H]."""
        sit = self.sit
        x = sit.x_embedder(z_t) + sit.pos_embed
        condition = sit.t_embedder(t) + sit.y_embedder(labels, None)  # [B, D]
        blocks: Any = sit.blocks
        for block in blocks:
            x = self.block(block, x, condition)
        shift, scale = sit.final_layer.adaLN_modulation(condition).chunk(2, dim=1)
        x = sit.final_layer.linear(modulated_norm(x, shift, scale))  # [B, N, P P C]
        (grid, _), patch = sit.config.grid_shape, sit.config.patch_size
        x = x.reshape(len(x), grid, grid, patch, patch, -1)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(z_t.shape)


def plain_block(block: SiTBlock, x: Tensor, condition: Tensor) -> Tensor:
    """A transformer layer on tokens [B, N, D]."""
    shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(condition).chunk(6, dim=1)
    y = modulated_norm(x, shift1, scale1)
    q, k, v = block.attn.qkv(y).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + gate1.unsqueeze(1) * block.attn.proj(y)
    return x + gate2.unsqueeze(1) * block.mlp(modulated_norm(x, shift2, scale2))


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


@torch.no_grad()
def reference_sampler(
    network: PlainSiT,
    z: Tensor,
    labels: Tensor,
    *,
    guidance_scale: float,
    num_steps: int,
    autocast: bool,
    noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Latents [B, C, H, H] from noise z, guided at every noise level.

    autocast: the network in bfloat16 where autocast would have it; else in the dtype of z.
    noise: of a step, float32 like z; torch.randn without it.
    """
    times = torch.cat([torch.linspace(1, 0.04, num_steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    x = z.double()
    both_labels = torch.cat([labels, torch.full_like(labels, network.sit.config.num_classes)])
    context = torch.autocast(z.device.type, dtype=torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        for step in range(num_steps):
            t, dt = times[step], times[step + 1] - times[step]
            both = torch.cat([x, x])
            level = torch.full((len(both),), float(t), dtype=z.dtype, device=z.device)
            velocity = network(both.to(z.dtype), level, both_labels).double()
            score = -((1 - t) * velocity + both) / t
            drift, drift_null = (velocity - t * score).chunk(2)
            x = x + (drift_null + guidance_scale * (drift - drift_null)) * dt
            if step < num_steps - 1:
                drawn = torch.randn(z.shape, device=z.device) if noise is None else noise(step)
                x = x + torch.sqrt(2 * t) * drawn * torch.sqrt(dt.abs())
    return x.to(z.dtype)
