"""The study's points: a variant of the settings and a seed each, in the order in which they are run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.machine import ROOT
from sendvae_fast.config import build_config, merge, plain, read_config
from sendvae_fast.engine.run_weights import PACKAGED
from sendvae_fast.errors import UserError
from sendvae_fast.train.settings import CacheConfig
from sendvae_fast.train.sit.settings import SiTTrainConfig
from sendvae_fast.train.vae.settings import VAETrainConfig

HERE = Path(__file__).parent
RESULTS = HERE / "results"
WEIGHTS = HERE / "weights"
PUBLISHED = {"aa6f1e3176": WEIGHTS / "plain-aa6f1e3176", "47bd07307c": PACKAGED["demo"]}
"""Plain autoencoders that come with the study, or with the package, by the hash of their settings."""
"""Networks that all points share."""
SCALES = ("cpu", "gpu", "tiny", "tiny_gpu")
PARTS = ("plain", "finetuning", "generator", "decoder", "samples", "guidance")
"""Sections of a scale that are settings of runs and jobs."""


@dataclass(kw_only=True)
class Scale:
    """How large everything is: a file of bench/evidence/scales."""

    name: str
    image_size: int
    """Side of the pictures in pixels."""
    num_train: int | None
    """Rendered scenes to train on; None with photographs, of which four fifths are trained on."""
    num_held_out: int | None
    """Rendered scenes that nothing is trained on: what pictures are compared with, and probes are scored on."""
    foundations: dict[str, Any]
    """Foundation models by what they know; `supervised` is the default."""
    judge: str | None
    """Weights of the network that judges pictures of scenes; None where a feature network is named by the user."""
    plain: dict[str, Any] = field(default_factory=dict)
    """Settings of the plain autoencoder's run."""
    finetuning: dict[str, Any] = field(default_factory=dict)
    """Settings of a fine-tuning, over the plain run's."""
    generator: dict[str, Any] = field(default_factory=dict)
    """Settings of a generator's run; its checkpoints are the points of the curve."""
    decoder: dict[str, Any] = field(default_factory=dict)
    """Settings of the decoders that are trained further on fixed latents."""
    samples: dict[str, Any] = field(default_factory=dict)
    """Settings of sampling, without guidance."""
    guidance: dict[str, Any] = field(default_factory=dict)
    """What is added to them with guidance."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What differs from the scale's settings."""

    key: str
    control: str | None = None
    """The variant of equal steps that it is compared with."""
    foundation: str = "supervised"
    plain: dict[str, Any] = field(default_factory=dict)
    finetuning: dict[str, Any] | None = field(default_factory=dict)
    """None: the plain autoencoder as it is."""
    generator: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """A variant and a seed."""

    batch: str
    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        """As on the command line and of its file: send-0."""
        return f"{self.variant.key}-{self.seed}"

    def result_file(self, scale: Scale, results: Path = RESULTS) -> Path:
        """Where its result is written."""
        return results / scale.name / f"{self.name}.json"


def read_scale(name: str, foundation_weights: str | None = None) -> Scale:
    """A scale by name. `foundation_weights`: file of a foundation model that does not come with the study.

    Raises:
        UserError: there is no such scale.
    """
    if name not in SCALES:
        raise UserError(f"--scale {name}: there are {', '.join(SCALES)}")
    content = read_config(HERE / "scales" / f"{name}.yaml")
    scale = build_config(Scale, {"name": name, **content}, f"scales/{name}.yaml")
    for foundation in scale.foundations.values():
        if "weights" in foundation:
            foundation["weights"] = str(ROOT / foundation["weights"])
        elif foundation_weights is not None:
            foundation["weights"] = foundation_weights
    if scale.judge is not None:
        scale.judge = str(ROOT / scale.judge)
    return scale


def read_points() -> list[Point]:
    """All points of variants.yaml in their order: batch by batch, seed by seed, a control before its variants."""
    content = read_config(HERE / "variants.yaml")
    variants = read_variants(content["variants"])
    points = []
    for batch in content["batches"]:
        for seed in range(batch["seeds"]):
            points += [Point(batch["name"], variants[key], seed) for key in batch["variants"]]
    return points


def read_variants_file() -> dict[str, Variant]:
    """All variants of variants.yaml by key, in its order."""
    return read_variants(read_config(HERE / "variants.yaml")["variants"])


def read_variants(content: dict[str, Any]) -> dict[str, Variant]:
    """The variants by key, each `like` resolved."""
    resolved: dict[str, dict[str, Any]] = {}
    for key, own in content.items():
        like = own.get("like")
        below = {} if like is None else resolved[like]
        resolved[key] = merge(below, {name: value for name, value in own.items() if name != "like"})
    return {key: Variant(key=key, **settings) for key, settings in resolved.items()}


@dataclass(frozen=True)
class Runs:
    """The configs of a point's runs and jobs, and their folders. Runs of the same settings share a folder."""

    scale: Scale
    point: Point
    root: Path
    """Of all points of the scale."""

    @property
    def train(self) -> Path:
        """The pictures to train on."""
        return self._pictures("train")

    @property
    def held_out(self) -> Path:
        """The pictures that nothing is trained on."""
        return self._pictures("held_out")

    def _pictures(self, part: str) -> Path:
        return self.root / "data" / (part if self.scale.num_train is not None else f"{part}.parquet")

    @cached_property
    def plain(self) -> VAETrainConfig:
        """The plain autoencoder. Its seed is its own: all points of the same latents start from one."""
        return self._vae("plain", self.plain_settings())

    def plain_settings(self) -> dict[str, Any]:
        """Of `plain`, but for its folder."""
        data = {"root": str(self.train), "image_size": self.scale.image_size}
        return merge(merge(self.scale.plain, {"data": data}), self.point.variant.plain)

    @cached_property
    def finetuning(self) -> VAETrainConfig | None:
        """The fine-tuning from it; None where the plain autoencoder is used as it is."""
        settings = self.finetuning_settings()
        return None if settings is None else self._vae(f"vae-{self.point.seed}", settings)

    def finetuning_settings(self) -> dict[str, Any] | None:
        """Of `finetuning`, but for its folder."""
        if self.point.variant.finetuning is None:
            return None
        start = {"seed": self.point.seed, "init_from": str(self.published or self.plain.run)}
        below = self.plain_settings() | start
        below.pop("autoencoder")  # its sizes come from there
        settings = merge(merge(below, self.scale.finetuning), self.point.variant.finetuning)
        if settings["alignment"]["method"] != "none":
            settings = merge(settings, {"alignment": {"foundation": self._foundation()}})
        return settings

    @property
    def published(self) -> Path | None:
        """The plain autoencoder, where it comes with the study; None where it is trained."""
        scale = self.scale
        settings = [merge(scale.plain, self.point.variant.plain), scale.image_size, scale.num_train]
        return PUBLISHED.get(short_hash(settings))

    def autoencoder(self) -> Path:
        """The run of the autoencoder that the generator works with."""
        return Path((self.finetuning or self.plain).run)

    @cached_property
    def cache(self) -> CacheConfig:
        """The latents of the pictures to train on."""
        return CacheConfig(
            out=str(self.autoencoder() / "latents"),
            autoencoder=str(self.autoencoder()),
            data=str(self.train),
            image_size=self.scale.image_size,
        )

    @cached_property
    def generator(self) -> SiTTrainConfig:
        """The generator. Its folder is told by all options: another version's is not gone on with."""
        config = build_config(SiTTrainConfig, self.generator_settings(), f"the generator of {self.point.name}")
        config.run = str(self.folder / f"generator-{short_hash(plain(config))}")
        return config

    def generator_settings(self) -> dict[str, Any]:
        """Of `generator`, but for its folder."""
        settings = merge(self.scale.generator, self.point.variant.generator)
        repa = {"foundation": self._foundation()} if settings["repa"]["weight"] else {}
        return merge(settings, {
            "run": "none", "seed": self.point.seed, "latents": self.cache.out, "repa": repa,
            "data": {"root": str(self.train), "image_size": self.scale.image_size},
        })  # fmt: skip

    @property
    def folder(self) -> Path:
        """What only this point has."""
        return self.root / "points" / self.point.name

    def identity(self) -> str:
        """Of all settings, wherever they are run."""
        scale = {part: getattr(self.scale, part) for part in PARTS}
        return short_hash({"scale": scale, "pictures": [self.scale.image_size, self.scale.num_train],
                           "variant": [vars(self.point.variant), self.point.seed]})  # fmt: skip

    def _foundation(self) -> dict[str, Any]:
        known = self.scale.foundations
        if self.point.variant.foundation not in known:
            raise UserError(f"{self.point.name}: the scale {self.scale.name} has no such foundation model")
        foundation = known[self.point.variant.foundation]
        if "weights" not in foundation and not foundation.get("random_weights"):
            raise UserError(f"--foundation-weights is missing: a weight file of {foundation['name']}")
        return foundation

    def _vae(self, kind: str, settings: dict[str, Any]) -> VAETrainConfig:
        """A run of stage 1, in the folder that runs of the same options share."""
        config = build_config(VAETrainConfig, settings | {"run": "none"}, f"{kind} of {self.point.name}")
        config.run = str(self.root / "autoencoders" / f"{kind}-{short_hash(plain(config))}")
        return config


def short_hash(settings: Any) -> str:
    """Ten hex digits of plain settings; folders and weights count by their names alone, wherever they lie."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.replace(str(ROOT), "").encode()).hexdigest()[:10]
