"""What the results say: values by point, differences from controls seed by seed, correlations over points."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sendvae_fast.evaluation.correlation import Correlation, correlations
from sendvae_fast.evaluation.intervals import interval_over_runs

MAIN_BATCHES = ("alignment", "remedies", "parts", "methods", "foundation", "start")
"""Of variants.yaml, see `of_main_size`."""

Result = Mapping[str, Any]
"""A point's result, as in its file."""


@dataclass(frozen=True)
class Measure:
    """A number of a result."""

    key: str
    title: str
    of: Callable[[Result], float | None]
    digits: int = 2
    lower_is_better: bool | None = None


def last(result: Result) -> Mapping[str, Any]:
    """The generator's end."""
    return result["curve"][-1]


def of_pictures(name: str, sampling: str = "unguided", decoder: str = "own") -> Callable[[Result], float | None]:
    """A measure of generated pictures by its key."""
    return lambda result: last(result)[sampling]["decoders"][decoder][name]


def of_autoencoder(*keys: str) -> Callable[[Result], float | None]:
    """A measure of the autoencoder by its keys; None where it was not made."""

    def value(result: Result) -> float | None:
        found = result["autoencoder"]
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found  # pyright: ignore[reportReturnType] - the last key's value is a number

    return value


def _over_linear(result: Result) -> float:
    return last(result)["mean_of_gaussian"]


def _velocity_loss(result: Result) -> float:
    return last(result)["mean_velocity_loss"]


def _cost_of_error(result: Result) -> float:
    errors = result["autoencoder"]["with_error"]
    return errors["0.4"] - errors["0"]


def _share_of_class_accuracy(result: Result) -> float:
    return last(result)["unguided"]["class_accuracy_of_latents"] / result["autoencoder"]["class_probe"]


def _helped_by_noise(result: Result) -> float:
    decoders = last(result)["unguided"]["decoders"]
    return decoders["tuned_noise"]["frechet"] - decoders["tuned"]["frechet"]


MEASURES = {
    measure.key: measure
    for measure in (
        Measure("frechet", "Fréchet distance", of_pictures("frechet"), 2, True),
        Measure("frechet_guided", "with guidance", of_pictures("frechet", "guided"), 2, True),
        Measure("from_decoded", "from decoded latents", of_pictures("frechet_from_decoded"), 2, True),
        Measure("floor", "floor", of_autoencoder("floor", "frechet"), 2, True),
        Measure("kid", "KID", of_pictures("kid"), 3, True),
        Measure("class_accuracy", "class accuracy", of_pictures("class_accuracy"), 3, False),
        Measure("class_accuracy_guided", "with guidance", of_pictures("class_accuracy", "guided"), 3, False),
        Measure("nearer_to_train", "nearer to a training picture", of_pictures("nearer_to_train"), 3),
        Measure("tuned", "decoder tuned", of_pictures("frechet", decoder="tuned"), 2, True),
        Measure("tuned_noise", "tuned with noise", of_pictures("frechet", decoder="tuned_noise"), 2, True),
        Measure("helped_by_noise", "tuned with noise - tuned", _helped_by_noise, 2, True),
        Measure("mean_of_gaussian", "velocity loss over the linear estimate's", _over_linear, 3, True),
        Measure("mean_velocity_loss", "velocity loss", _velocity_loss, 3),
        Measure("latent_accuracy", "class accuracy of generated latents", _share_of_class_accuracy, 3, False),
        Measure("f1", "attribute F1", of_autoencoder("f1"), 3, False),
        Measure("class_probe", "class probe", of_autoencoder("class_probe"), 3, False),
        Measure("psnr", "PSNR, dB", of_autoencoder("psnr", "0"), 2, False),
        Measure("kl", "KL, nats", of_autoencoder("kl"), 0),
        Measure("mean_share", "share of the mean over the map", of_autoencoder("mean_share"), 3),
        Measure("effective_rank", "effective rank", of_autoencoder("effective_rank"), 1),
        Measure("sensitivity", "sensitivity of the decoder", of_autoencoder("sensitivity", "0.1"), 3),
        Measure("cost_of_error", "cost of an error of 0.4", _cost_of_error, 2, True),
    )
}  # fmt: skip


def read_results(folder: Path) -> list[Result]:
    """All results of a scale, in the order of their names."""
    files = sorted(folder.glob("*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def of_main_size(results: Sequence[Result]) -> list[Result]:
    """Those of one size of latents, whose generators, without REPA, have one size and one number of steps."""
    return [result for result in results if result["batch"] in MAIN_BATCHES]


def by_variant(results: Sequence[Result]) -> dict[str, dict[int, Result]]:
    """By variant and seed."""
    found: dict[str, dict[int, Result]] = {}
    for result in results:
        found.setdefault(result["variant"], {})[result["seed"]] = result
    return found


class Estimate(NamedTuple):
    """A mean over seeds with its 95 % interval by Student's t; None of one seed."""

    value: float
    interval: tuple[float, float] | None
    num_seeds: int

    @property
    def leaves_out_zero(self) -> bool:
        """Whether 0 is outside the interval."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def mean_over_seeds(values: Sequence[float]) -> Estimate:
    """Of a value of each seed."""
    return Estimate(float(np.mean(values)), interval_over_runs(values), len(values))


def values_of(measure: Measure, results: Mapping[int, Result]) -> dict[int, float]:
    """By seed, where it was made."""
    found = {seed: measure.of(result) for seed, result in sorted(results.items())}
    return {seed: value for seed, value in found.items() if value is not None}


def difference(measure: Measure, results: Mapping[int, Result], controls: Mapping[int, Result]) -> Estimate | None:
    """The mean over the seeds that both have of the difference from the control; None without any."""
    ours, theirs = values_of(measure, results), values_of(measure, controls)
    both = sorted(ours.keys() & theirs.keys())
    return mean_over_seeds([ours[seed] - theirs[seed] for seed in both]) if both else None


def correlation_with_distance(
    results: Sequence[Result], keys: Sequence[str], distance: str = "frechet"
) -> dict[str, Correlation]:
    """Pearson of measures with a distance over points; empty where there are fewer than three."""
    table = {
        result["point"]: {key: value for key in (distance, *keys) if (value := MEASURES[key].of(result)) is not None}
        for result in results
    }
    return correlations(table, distance) if len(table) > 2 else {}


def correlation_of_differences(
    results: Sequence[Result], control_of: Mapping[str, str | None], key: str
) -> Correlation | None:
    """Pearson of a measure with the Fréchet distance, both minus those of the control with the same seed.

    None where fewer than three points have one. `control_of`: by variant.
    """
    variants, table = by_variant(results), {}
    for result in results:
        control = variants.get(control_of[result["variant"]] or "", {}).get(result["seed"])
        if control is not None:
            estimates = {name: difference(MEASURES[name], {0: result}, {0: control}) for name in (key, "frechet")}
            table[result["point"]] = {name: found.value for name, found in estimates.items() if found is not None}
    return correlations(table, "frechet").get(key) if len(table) > 2 else None
