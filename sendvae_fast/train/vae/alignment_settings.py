"""How stage 1 aligns latents with a foundation model: the settings of each method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from sendvae_fast import checks
from sendvae_fast.errors import UserError
from sendvae_fast.models.foundation.foundation_config import FoundationConfig
from sendvae_fast.models.mappers.mapper_config import MapperSizes

DEFAULT_WEIGHT = {"send": 1.0, "va": 0.1, "reals": 1.0, "none": 0.0}


@dataclass(kw_only=True)
class SendConfig(MapperSizes):
    """Send-VAE: noised latents through a small transformer (Section 3.2 of the paper)."""

    section: ClassVar[str] = "alignment.send"

    noise: bool = True
    """Whether the mapper sees noised latents (Equation 1). The paper's Table 3 switches it off."""


@dataclass(kw_only=True)
class VAConfig:
    """VA-VAE: its VF loss of a linear map of the posterior's samples. Defaults are those of its last stage."""

    cos_margin: float = 0.5
    """Cosine distance of a patch that counts as none."""
    distmat_margin: float = 0.25
    """Difference between two patches' cosine in the latents and in the foundation model that counts as none."""
    cos_weight: float = 1.0
    """Weight of the cosine term within the VF loss."""
    distmat_weight: float = 1.0
    """Weight of the distance matrix term within the VF loss."""
    adaptive: bool = True
    """Scale the weight by the ratio of gradients at the encoder's last layer: reconstruction and LPIPS over the VF
    loss. Costs one more backward pass through the decoder, without weight gradients; not with engine.zero_stage=3."""

    def __post_init__(self) -> None:
        checks.weights(self, "cos_margin", "distmat_margin", "cos_weight", "distmat_weight", where="alignment.va")
        if self.cos_weight == self.distmat_weight == 0:
            raise UserError("alignment.va.cos_weight and distmat_weight are both 0: give one, or alignment.method=none")


@dataclass(kw_only=True)
class RealsConfig:
    """ReaLS: an MLP, at patch level and at global level. No more is published; every number here is ours."""

    noise: bool = False
    """Whether the MLP sees noised latents."""
    width: int = 2048
    """Hidden width of the MLP."""
    patch_weight: float = 1.0
    """Weight of the patch level within the loss."""
    global_weight: float = 1.0
    """Weight of the global level (the mean over patches) within the loss."""

    def __post_init__(self) -> None:
        checks.at_least(1, self, "width", where="alignment.reals")
        checks.weights(self, "patch_weight", "global_weight", where="alignment.reals")
        if self.patch_weight == self.global_weight == 0:
            raise UserError("alignment.reals.patch_weight and global_weight are both 0: give one, or method=none")


@dataclass(kw_only=True)
class AlignmentConfig:
    """The alignment with a foundation model: by which method, with which model, of which latents."""

    method: Literal["send", "va", "reals", "none"] = "send"
    """send: the paper's. va: VA-VAE's VF loss. reals: ReaLS. none: neither mapper nor foundation model is built."""
    weight: float | None = None
    """λ_align, by default the method's own: 1.0 for send (the paper) and reals, 0.1 for va. 0 is like method none."""
    foundation: FoundationConfig = field(default_factory=lambda: FoundationConfig(name="dinov2-vit-b"))
    """The frozen foundation model f."""
    latent_norm: Literal["running", "fixed", "scale", "none"] = "running"
    """How latents are normalised before noising, and for generators afterwards: by running statistics, by those loaded
    with the weights, by `latent_scale` alone, or not at all. VA-VAE's mapper sees latents as they are in any case."""
    latent_scale: float = 0.18215
    """With latent_norm=scale: what latents are multiplied by. The default is SD-VAE's."""
    patch_size: int = 1
    """Latent positions per mapper token and side: 1 for f16 latents, 2 for f8."""
    send: SendConfig = field(default_factory=SendConfig)
    """Settings of method send."""
    va: VAConfig = field(default_factory=VAConfig)
    """Settings of method va."""
    reals: RealsConfig = field(default_factory=RealsConfig)
    """Settings of method reals."""

    def __post_init__(self) -> None:
        checks.choices(self, where="alignment")
        checks.weights(self, "weight", where="alignment")
        checks.at_least(1, self, "patch_size", where="alignment")
        checks.above(0, self, "latent_scale", where="alignment", hint=", as SD-VAE's 0.18215")
        if self.method == "none" and self.lambda_align > 0:
            raise UserError(f"alignment.weight={self.weight:g} has nothing to weigh with method none: leave it out")

    @property
    def lambda_align(self) -> float:
        """`weight`, or the method's own where it is not given."""
        return DEFAULT_WEIGHT[self.method] if self.weight is None else self.weight

    @property
    def is_adaptive(self) -> bool:
        """Whether the weight follows gradients at the encoder's last layer."""
        return self.method == "va" and self.va.adaptive and self.lambda_align > 0
