"""Classifier-free guidance within an interval of noise levels.

Shape letters: B batch, C latent channels, H W latent height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sendvae_fast.errors import UserError
from sendvae_fast.sampling.settings import check_guidance

# (z_t [B, C, H, W], t [B], labels int64 [B]) -> (velocity [B, C, H, W], anything): a SiT
LabelledModel = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, object]]


@dataclass(frozen=True, kw_only=True)
class GuidedVelocity:
    """The velocity function of one batch of labels; made by `guided`.

    v = v_null + scale · (v_label - v_null) where low <= t <= high, both ends included, and v_label elsewhere. The
    numbers of REPA, REPA-E and Send-VAE come from guiding every channel; those of DiT, SiT and LightningDiT from
    guiding the first three, inherited from code for RGB images, with v_label in the others. Guiding the velocity equals
    guiding the SDE drift, which is affine in it.
    """

    model: LabelledModel
    labels: Tensor
    """int64 [B], on the model's device."""
    scale: float
    interval: tuple[float, float]
    null_label: int
    channels: int | None = None
    """Guide the first so many channels only; None is all."""
    decided_at: float | None = None
    """Noise level at which to decide whether to guide, in place of the evaluated one."""

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """x [B, C, H, W]; t scalar. Costs one evaluation of 2B inside the interval, of B outside."""
        velocity, scale = self.uncombined(x, t)
        if scale is None:
            return velocity
        # A bfloat16 network's velocities are not rounded to it once more.
        conditional, unconditional = velocity.to(torch.promote_types(velocity.dtype, torch.float32)).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    def uncombined(self, x: Tensor, t: Tensor) -> tuple[Tensor, float | None]:
        """The velocities before they are combined, as `ops.sde_step` takes them.

        Inside the interval [2B, C, H, W], for the labels and then for the null class, and the scale; outside it
        [B, C, H, W] and None.
        """
        # Compared as Python floats: the end 0.65 in float32 lies below 0.65, and would move the interval's edge.
        decisive_t = float(t) if self.decided_at is None else self.decided_at
        if self.scale > 1 and self.interval[0] <= decisive_t <= self.interval[1]:
            null_labels = torch.full_like(self.labels, self.null_label)
            velocities = self._evaluate(torch.cat([x, x]), t, torch.cat([self.labels, null_labels]))
            return self._unguide_other_channels(velocities), self.scale
        return self._evaluate(x, t, self.labels), None

    def decide_at(self, t: float) -> "GuidedVelocity":
        """The same function with the decision to guide taken at `t`: both halves of a Heun step must agree."""
        return replace(self, decided_at=t)

    def _unguide_other_channels(self, velocities: Tensor) -> Tensor:
        """v_label in place of v_null there: combined at any scale, and by any code, the two give v_label exactly."""
        if self.channels is None:
            return velocities
        conditional, unconditional = velocities.chunk(2)
        unconditional = torch.cat([unconditional[:, : self.channels], conditional[:, self.channels :]], dim=1)
        return torch.cat([conditional, unconditional])

    def _evaluate(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        times_dtype = torch.promote_types(x.dtype, torch.float32)
        times = torch.full((x.shape[0],), float(t), dtype=times_dtype, device=x.device)
        return self.model(x, times, labels)[0]


def guided(
    model: LabelledModel,
    labels: Tensor,
    scale: float,
    interval: tuple[float, float],
    num_classes: int,
    channels: int | None = None,
) -> GuidedVelocity:
    """The velocity function that `sampling.samplers` integrates, for one batch.

    labels: int64 [B], each in [0, num_classes]; `num_classes` itself is the null class. scale: 1 is no guidance.
    interval: (low, high) noise levels. channels: how many of the first channels to guide, None all.
    Raises UserError for a label, scale, interval or number of channels outside its range.
    """
    check_guidance(scale, interval, channels)
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= num_classes:
        raise UserError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, but the model has {num_classes} classes; "
            f"give labels from 0 to {num_classes - 1} ({num_classes} is the null class)"
        )
    return GuidedVelocity(
        model=model, labels=labels, scale=scale, interval=interval, null_label=num_classes, channels=channels
    )
