"""The settings of a comparison, and the checks that need no look at files."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sendvae_fast import checks
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.feature_config import FeaturesConfig
from sendvae_fast.evaluation.latent_space.settings import ViewsConfig
from sendvae_fast.evaluation.settings import METRICS, MetricName, ProtocolName
from sendvae_fast.losses.settings import PerceptualConfig
from sendvae_fast.models.foundation.foundation_config import FoundationConfig
from sendvae_fast.sampling.settings import GenerateConfig, SamplerConfig


@dataclass(kw_only=True)
class MethodConfig:
    """An autoencoder: trained by a config, or taken as it is. Raises `UserError` for settings that exclude each other.

    A comparison gives every config its run, seed and pictures.
    """

    key: str
    """Its folder's name, and what it is called in other settings."""
    name: str | None = None
    """Its name on the page; by default the key."""
    description: str = ""
    """A sentence for the page."""
    config: str | None = None
    """Config of `train vae`, or with `end_to_end` of `train e2e`: a path or a packaged name."""
    end_to_end: bool = False
    """Train it together with a generator (REPA-E); that generator is not compared, its autoencoder is."""
    start: str | None = None
    """Key of the method whose autoencoder it starts from, of the same seed. null: as its config says."""
    weights: str | None = None
    """In place of `config`, an autoencoder that is taken as it is: whatever `cache-latents --autoencoder` takes."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Further settings, over those of `config`."""
    generator: str | None = None
    """Config of a generator in place of the shared one, for latents of another shape."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*", self.key):
            raise UserError(f"the method's key {self.key!r} names a folder: give letters, digits, _, - and .")
        if (self.config is None) == (self.weights is None):
            raise UserError(f"the method {self.key} has config and weights, or neither: give one of them")
        if self.weights is not None and (self.start is not None or self.end_to_end or self.settings):
            raise UserError(f"the method {self.key} takes weights as they are: leave out start, end_to_end, settings")

    @property
    def title(self) -> str:
        """`name`, or the key where it is not given."""
        return self.name or self.key


@dataclass(kw_only=True)
class PicturesConfig:
    """What is trained on, and what is held out to measure with. Raises `UserError` for a value out of range."""

    data: str | None = None
    """Photographs to train on, anything `Catalog.open` takes; null renders scenes with known attributes."""
    held_out: str | None = None
    """Photographs that nothing is trained on; null holds out every fifth of each class of `data`."""
    image_size: int = 64
    """Side of the pictures in pixels, after the crop."""
    num_train_images: int = 3000
    """Rendered scenes to train on."""
    num_test_images: int = 600
    """Rendered scenes held out."""

    def __post_init__(self) -> None:
        checks.at_least(1, self, "image_size", "num_train_images", "num_test_images", where="pictures")
        if self.held_out is not None and self.data is None:
            raise UserError("pictures.held_out is for photographs: give pictures.data, or leave it out")


@dataclass(kw_only=True)
class CompareConfig:
    """Methods, seeds, and what is the same for all of them. Raises `UserError` for what does not fit together."""

    run: str
    """Folder of the comparison. The same command, here or on another machine, goes on in it."""
    title: str = "Autoencoders compared"
    """Title of the page."""
    methods: list[MethodConfig]
    """The autoencoders, in the order of the page."""
    only: list[str] | None = None
    """Keys of the methods to take, with those that they start from; null takes all. More may be taken later."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds of training and sampling: everything that is trained is trained once with each. More may be given later."""
    control: str | None = None
    """Key of the method that the others are put beside; by default the first."""
    candidate: str | None = None
    """Key of a method whose numbers are also given in sentences, beside the control's."""
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    """The pictures, the same for all."""
    foundation: FoundationConfig | None = None
    """The frozen foundation model of every alignment and of REPA; null: those of the configs."""
    generator: str
    """Config of `train sit`: the generator on each autoencoder's latents."""
    generator_settings: dict[str, Any] = field(default_factory=dict)
    """Further settings of the generator, over those of its config."""
    curve_every: int | None = None
    """Steps of the generators between two measurements of what they draw; null: none, and so no curves."""
    curve: GenerateConfig = field(
        default_factory=lambda: GenerateConfig(
            num_samples=5_000, guidance_scale=1.0, sampler=SamplerConfig(num_steps=50)
        )
    )
    """How pictures are drawn for the curves."""
    samples: GenerateConfig = field(default_factory=GenerateConfig)
    """How pictures are drawn from the finished generators."""
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    """The network whose features the Fréchet distances and their like compare."""
    metrics: list[MetricName] = field(default_factory=lambda: list(METRICS))
    """What is measured of generated pictures."""
    reference: str | None = None
    """What generated pictures are compared with, as `evaluate generation --reference`; null: those trained on."""
    protocol: ProtocolName = "lightningdit"
    """How reconstructions of the held-out pictures are compared, as `evaluate reconstruction --protocol`."""
    perceptual: PerceptualConfig | None = None
    """LPIPS network and weights, for the table; without it LPIPS is not measured."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    """Which held-out pictures the page shows the latents of: t-SNE by class, maps of patches that are alike."""
    batch_size: int = 100
    """Pictures measured at once."""

    def __post_init__(self) -> None:
        checks.weight_paths(self, "run")
        checks.choices(self)
        checks.at_least(1, self, "curve_every", hint=", or null")
        checks.at_least(1, self, "batch_size")
        if not self.methods:
            raise UserError("methods is empty: give at least one autoencoder")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0 or max(self.seeds) >= 2**63:
            raise UserError(f"seeds is {self.seeds}: give different whole numbers of at least 0 and below 2**63")
        for what in ("key", "title"):
            names = [getattr(method, what) for method in self.methods]
            if twice := [name for name in names if names.count(name) > 1]:
                raise UserError(f"two methods are called {twice[0]}: give each a {'name' if what == 'title' else what}"
                                " of its own")  # fmt: skip
        before: list[str] = []
        for method in self.methods:
            if method.start is not None and method.start not in before:
                raise unknown_method(f"the method {method.key} starts from", method.start, before, " above it")
            before.append(method.key)
        named = [("control", self.control), ("candidate", self.candidate), *(("only", key) for key in self.only or ())]
        for what, key in named:
            if key is not None and key not in before:
                raise unknown_method(f"{what} names", key, before)
        if self.only is not None and not self.only:
            raise UserError("only is empty: give at least one method, or leave it out")

    def taken(self) -> list[MethodConfig]:
        """The methods that `only` takes, and those that they start from."""
        if self.only is None:
            return self.methods
        wanted = set(self.only)
        for method in reversed(self.methods):  # a start stands above who starts from it
            if method.key in wanted and method.start is not None:
                wanted.add(method.start)
        return [method for method in self.methods if method.key in wanted]

    def control_key(self) -> str:
        """Key of the method that others are put beside, of those that are taken."""
        keys = [method.key for method in self.taken()]
        return self.control if self.control in keys else keys[0]


def unknown_method(beginning: str, key: str, known: Sequence[str], where: str = "") -> UserError:
    """The error of a key that no method has."""
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known) or 'none'}"
    return UserError(f"{beginning} {key}, and there is no such method{where}; {hint}")
