"""The settings of sampling; torch is not needed to read them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Literal

from sendvae_fast import checks
from sendvae_fast.errors import UserError
from sendvae_fast.models.sit.sizes import DIFFUSION_STEPS

LabelSampling = Literal["equal", "random"]


@dataclass(kw_only=True)
class SamplerConfig:
    """How the reverse process is integrated. Raises `UserError` for a value out of range."""

    kind: Literal["sde", "euler", "heun", "dopri5", "ddpm", "ddim"] = "sde"
    """`sde`: Euler-Maruyama, as REPA, REPA-E and Send-VAE sample; `euler`, `heun`, `dopri5`: the probability-flow ODE,
    the last with steps of its own choice, as SiT's ODE samples (needs the package torchdiffeq); `ddpm`, `ddim`: of DiT,
    and of nothing else."""
    num_steps: int = 250
    """Steps. The model runs once a step; with `heun`, twice in every step but the last. Not for `dopri5`."""
    last_step: float = 0.04
    """`sde` only: noise level from which the final, noise-free step goes to 0."""
    timestep_shift: float = 1.0
    """`euler` and `heun` only: LightningDiT's s, see `time_grid`. Below 1 there are more steps near noise."""
    atol: float = 1e-6
    """`dopri5` only: absolute error allowed in a step. SiT's value, like rtol's."""
    rtol: float = 1e-3
    """`dopri5` only: relative error allowed in a step."""
    dtype: Literal["float64", "float32"] = "float64"
    """Precision of the state between steps. The network always sees its own dtype."""

    def __post_init__(self) -> None:
        checks.choices(self, where="sampler")
        checks.in_interval("(0, 1)", self, "last_step", where="sampler")
        checks.above(0, self, "timestep_shift", where="sampler", hint=" (1 is no shift)")
        checks.above(0, self, "atol", "rtol", where="sampler")
        fewest = 2 if self.kind == "sde" or self.is_diffusion else 1
        checks.at_least(fewest, self, "num_steps", where="sampler", hint=f" for {self.kind}")
        if self.is_diffusion and self.num_steps > DIFFUSION_STEPS:
            raise UserError(f"sampler.num_steps is {self.num_steps}: {self.kind} has {DIFFUSION_STEPS} steps at most")
        if self.kind == "dopri5" and importlib.util.find_spec("torchdiffeq") is None:
            raise UserError(
                "sampler kind dopri5 needs the package torchdiffeq: pip install 'sendvae_fast[ode]', or give heun"
            )
        if self.kind not in ("euler", "heun") and self.timestep_shift != 1:
            raise UserError(
                f"sampler.timestep_shift is {self.timestep_shift}: {self.kind} takes only 1, euler and heun shift"
            )

    @property
    def is_diffusion(self) -> bool:
        """Whether the sampler is one of a network that predicts noise in discrete steps."""
        return self.kind in ("ddpm", "ddim")


@dataclass(kw_only=True)
class GenerateConfig:
    """Settings of sampling. The defaults are the paper's, with REPA-E's interval, which the paper leaves open.

    Raises `UserError` for a value out of range.
    """

    num_samples: int = 50_000
    """Pictures."""
    batch_size: int = 64
    """Pictures drawn at once on a rank. Noise and labels do not depend on it; the rounding of matrix products does, by
    a grey level here and there."""
    guidance_scale: float = 2.5
    """Classifier-free guidance; 1 is none. The paper: 2.5."""
    guidance_interval: tuple[float, float] = (0.0, 0.75)
    """Noise levels at which to guide, both ends included."""
    guidance_channels: int | None = None
    """Guide only the first so many latent channels, as SiT and LightningDiT do (3); null guides all."""
    labels: LabelSampling = "random"
    """Classes: drawn by sample id (the paper, as REPA-E then), or an equal number of each (about 0.1 lower FID)."""
    rounding: Literal["truncate", "round"] = "truncate"
    """How [-1, 1] becomes 0..255: truncate as REPA does, or round half up as SiT does."""
    seed: int = 0
    """Seed of labels and noise."""
    precision: Literal["tf32", "fp32", "bf16"] = "tf32"
    """Precision of the generator: tf32 as the published samplers (fp32, but products on tensor cores; no different on a
    CPU), fp32, or bf16, the fastest. The state between steps has `sampler.dtype`. Pictures are decoded in tf32, or
    fp32."""
    cuda_graphs: bool = True
    """On a GPU, record the generator once and replay it in every step: the same pictures, less work for the host."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """The integrator."""

    def __post_init__(self) -> None:
        self.guidance_interval = tuple(self.guidance_interval)  # pyright: ignore[reportAttributeAccessIssue] - YAML's list
        check_guidance(self.guidance_scale, self.guidance_interval, self.guidance_channels)
        checks.choices(self)
        checks.at_least(1, self, "num_samples", "batch_size")
        checks.seeds(self, "seed")

    def check_channels(self, latent_channels: int) -> None:
        """Raise UserError if more channels are to be guided than the latents have."""
        if self.guidance_channels is not None and self.guidance_channels > latent_channels:
            raise UserError(
                f"guidance_channels is {self.guidance_channels}, but the generator's latents have "
                f"{latent_channels} channels; give fewer, or null to guide all"
            )


def check_guidance(scale: float, interval: tuple[float, float], channels: int | None) -> None:
    """Raise UserError for a scale, an interval or a number of channels outside its range."""
    low, high = interval
    if not scale >= 1:
        raise UserError(f"guidance scale is {scale}; give 1 (no guidance) or more")
    if not 0 <= low <= high <= 1:
        raise UserError(f"guidance interval is [{low}, {high}]; give 0 <= low <= high <= 1 (t = 1 is pure noise)")
    if channels is not None and channels < 1:
        raise UserError(f"guidance channels is {channels}; give 1 or more, or null to guide all")


@dataclass(kw_only=True)
class SampleConfig(GenerateConfig):
    """A sampling job."""

    generator: str
    """SiT folder, checkpoint or stage 2 run."""
    autoencoder: str
    """Autoencoder folder, checkpoint or stage 1 run: the one that made the generator's latents."""
    out: str
    """Folder of the PNG files, named by sample id; `<out>.png` is an overview grid."""
    ema: bool = True
    """Sample from the moving average of the weights, as all published numbers do."""
    npz: bool = False
    """Also write `<out>.npz`, the sample file of the ADM evaluator."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.weight_paths(self, "out")
