"""The settings of evaluations; torch is not needed to read them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from sendvae_fast import checks
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.feature_config import FeaturesConfig
from sendvae_fast.evaluation.latent_space.settings import (
    DiscriminationConfig,
    LearnabilityConfig,
    UniformityConfig,
    ViewsConfig,
)
from sendvae_fast.evaluation.result import (
    RESULTS_FILE,
)
from sendvae_fast.losses.settings import PerceptualConfig
from sendvae_fast.models.foundation.foundation_config import FoundationConfig
from sendvae_fast.sampling.settings import GenerateConfig

MetricName = Literal[
    "frechet", "spatial_frechet", "frechet_infinity", "inception_score", "precision_recall", "kid", "mind"
]
METRICS: tuple[MetricName, ...] = get_args(MetricName)
ProtocolName = Literal["lightningdit", "adm"]
Benchmark = Literal["csv", "celeba", "deepfashion", "awa2"]
Splitting = Literal["official", "random"]
Direction = Literal["pattern", "weight"]
Measure = Literal[
    "classes", "uniformity", "discrimination", "spectrum", "sensitivity", "learnability", "clusters", "patches"
]
MEASURES: tuple[Measure, ...] = get_args(Measure)


@dataclass(kw_only=True)
class EvaluationConfig:
    """Settings of every evaluation. Raises `UserError` for a value out of range."""

    batch_size: int = 64
    """Pictures at once; no result depends on it beyond the rounding of matrix products."""
    out: str | None = None
    """File that results are added to, a JSON line each; by default `evaluation.jsonl` in the run that is measured."""

    def __post_init__(self) -> None:
        checks.at_least(1, self, "batch_size")

    def results_file(self, run: Path | None) -> Path | None:
        """`out`, else the file in the run, None without either."""
        return Path(self.out) if self.out is not None else None if run is None else run / RESULTS_FILE


@dataclass(kw_only=True)
class GenerationConfig(EvaluationConfig):
    """The pictures, and the network that looks at them. Raises `UserError` unless samples come from one place."""

    samples: str | None = None
    """Generated pictures: a folder of PNG files, as `sendvae sample` writes it, or an npz of them."""
    generator: str | None = None
    """In place of `samples`, a SiT folder, checkpoint or run that draws them; nothing is written."""
    autoencoder: str | None = None
    """The one that made the generator's latents."""
    ema: bool = True
    """Draw from the moving average of the generator's weights."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """How pictures are drawn."""
    reference: str
    """Real pictures: an ImageFolder, tar shards, parquet files or a catalog, cropped to the samples' size; or an npz of
    pictures or of Inception's moments, such as ADM's reference files, which have both."""
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    """The feature network. FID, sFID, Inception score, precision and recall by the ADM protocol are Inception's."""
    metrics: list[MetricName] = field(default_factory=lambda: list(METRICS))
    """What to measure; the network's features, not the metrics, take the time, but for FID-infinity on a CPU."""
    features_dir: str | None = None
    """Folder to keep features in, so that a reference's are computed once. Without it they are kept beside the results
    until the evaluation is finished, so that an interrupted one goes on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choices(self)
        if (self.samples is None) == (self.generator is None):
            raise UserError("give --samples, or --generator and --autoencoder to draw them")
        if self.generator is not None and self.autoencoder is None:
            raise UserError("--generator needs --autoencoder, the one that made its latents")


@dataclass(kw_only=True)
class ReconstructionConfig(EvaluationConfig):
    """The autoencoder, the pictures and the networks that compare them. Raises `UserError` for a value out of range."""

    autoencoder: str
    """Autoencoder folder or run."""
    data: str
    """Held-out pictures: an ImageFolder, tar shards, parquet files, a catalog, or an npz."""
    protocol: ProtocolName = "lightningdit"
    """``lightningdit``, by which the tokenizer papers' tables are made (its crop, a sample of the posterior, its SSIM),
    or ``adm``: ADM's crop, the posterior's mean, Wang's SSIM."""
    image_size: int | None = None
    """Side of the centre crop in pixels; by default that of the autoencoder's run."""
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    """The feature network of the Fréchet distance, which is rFID with Inception's."""
    perceptual: PerceptualConfig | None = None
    """LPIPS network and weights; without it LPIPS is not measured. Published numbers are vgg's."""
    seed: int = 0
    """Of the posterior's samples."""
    pictures: str | None = None
    """Folder to write the pictures to, as they were compared: `originals/` and `reconstructions/`, PNG files."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choices(self)
        checks.at_least(1, self, "image_size")


@dataclass(kw_only=True)
class ProbeConfig:
    """How linear probes are fitted. Raises `UserError` for a value out of range."""

    inverse_penalty: float = 1.0
    """C of the objective C Σ cross-entropy + |w|²/2 (the bias has no penalty), scikit-learn's default."""
    max_iterations: int = 1000
    """L-BFGS iterations for all attributes together."""
    tolerance: float = 1e-5
    """Largest entry of the gradient of the mean objective at which L-BFGS stops."""

    def __post_init__(self) -> None:
        checks.above(0, self, "inverse_penalty", "max_iterations", "tolerance", where="probe")


@dataclass(kw_only=True)
class LatentsConfig(EvaluationConfig):
    """The autoencoder, the pictures, and what to measure."""

    autoencoder: str
    """Autoencoder folder or run."""
    train_data: str
    """Pictures that class probe and small SiT are fitted to; the other measures but the decoder's are of them, too."""
    data: str
    """Held-out pictures, with the same classes."""
    measures: tuple[Measure, ...] = MEASURES
    """What to measure; what the pictures or the latents do not allow is left out, and a line says so."""
    image_size: int | None = None
    """Side of the ADM centre crop in pixels; by default that of the autoencoder's run."""
    num_decoded: int = 1000
    """Held-out pictures at most whose latents are decoded with noise."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """The class probe."""
    uniformity: UniformityConfig = field(default_factory=UniformityConfig)
    """Uniformity, and its size."""
    discrimination: DiscriminationConfig = field(default_factory=DiscriminationConfig)
    """Discrimination, and its mixtures."""
    learnability: LearnabilityConfig = field(default_factory=LearnabilityConfig)
    """The small SiT."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    """Which held-out pictures `clusters` (t-SNE and silhouette) and `patches` (similarity maps) are of."""
    foundation: FoundationConfig | None = None
    """Foundation model that patch similarities are compared with; without it there are maps and no number."""
    view: str | None = None
    """Folder of what `clusters` and `patches` draw; by default `latent_space` in the run, where `report` looks."""
    cache: str | None = None
    """Folder that latents are kept in, as of `evaluate attributes`; by default a temporary one."""
    seed: int = 0
    """Of everything that is drawn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.at_least(1, self, "image_size", "num_decoded")
        checks.seeds(self, "seed")
        checks.weight_paths(self, "cache", "view")
        if unknown := [name for name in self.measures if name not in MEASURES]:
            raise UserError(f"measures has {unknown[0]!r}: it may name {', '.join(MEASURES)}")


@dataclass(kw_only=True)
class AttributeDataConfig(EvaluationConfig):
    """Pictures with their attributes, and probes of them."""

    data: str
    """The benchmark's folder; with `benchmark=csv` pictures with an attributes.csv, to score the probes on."""
    benchmark: Benchmark = "csv"
    """Where attributes and splits come from."""
    train_data: str | None = None
    """With `benchmark=csv`: pictures with an attributes.csv that the probes are fitted to."""
    validation_data: str | None = None
    """With `benchmark=csv`: pictures with an attributes.csv that thresholds are tuned on; by default a tenth of the
    training pictures, which then are not fitted to."""
    split: Splitting = "official"
    """Split of a benchmark: `official`, or `random` for a part of one."""
    image_size: int | None = None
    """Side of the ADM centre crop in pixels; by default that of the autoencoder's run."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """How the probes are fitted."""
    cache: str | None = None
    """Folder that latents are kept in, 2 bytes a number: an interrupted job goes on, a second one is fast. By default
    it is a temporary one."""
    seed: int = 0
    """Of splits and resamples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.at_least(1, self, "image_size")
        checks.seeds(self, "seed")
        checks.choices(self)
        checks.weight_paths(self, "cache")
        if (self.benchmark == "csv") != (self.train_data is not None):
            raise UserError("train_data goes with benchmark=csv, and only with it: a benchmark has a split of its own")


@dataclass(kw_only=True)
class AttributesConfig(AttributeDataConfig):
    """The autoencoder, and the pictures with their attributes."""

    autoencoder: str
    """Autoencoder folder or run."""
    control: bool = False
    """Probe random numbers in the place of latents as well: what the protocol gives where nothing is known."""


@dataclass(kw_only=True)
class TraversalsConfig(AttributeDataConfig):
    """The autoencoders, the pictures with their attributes, and who judges."""

    autoencoders: tuple[str, ...]
    """Autoencoder folders or runs, to be shown side by side."""
    direction: Direction = "pattern"
    """`pattern`: how latents of pictures with more of the attribute differ; `weight`: along the probe's weights."""
    judge: FeaturesConfig = field(default_factory=lambda: FeaturesConfig(name="demo"))
    """The network in whose features probes say how much attributes of decoded pictures change: not the autoencoder's
    own latents, which would be their own judge."""
    num_pictures: int = 32
    """Test pictures that are moved and judged."""
    num_shown: int = 2
    """Of these, how many get strips."""
    folder: str = "traversals"
    """Folder of the figures: `strips_<number>.png` and `matrices.png`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.at_least(1, self, "num_pictures", "num_shown")
        checks.weight_paths(self, "folder")
        checks.choices(self)
        if not self.autoencoders:
            raise UserError("autoencoders is empty: name one or more folders or runs")
