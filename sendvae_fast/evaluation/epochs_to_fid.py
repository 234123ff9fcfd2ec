"""EP_FID@k: the epochs of training after which pictures drawn without guidance have a FID of k."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sendvae_fast.evaluation.result import Result


class Curve(NamedTuple):
    """A distance over training, from results of one metric by one protocol on as many pictures."""

    metric: str
    epochs: list[float]
    values: list[float]
    num_samples: int


class Reached(NamedTuple):
    """When a distance was reached."""

    epochs: float
    at_first: bool
    """Whether the first evaluation was there already, so that it may have been reached before."""


def epochs_to(epochs: Sequence[float], values: Sequence[float], k: float) -> Reached | None:
    """When `values` first are at most `k`, on the straight lines between evaluations; None where they never are.

    Nothing is extrapolated: before the first evaluation nothing is known, and after the last one neither.

    Args:
        epochs: of the evaluations, increasing.
        values: distances there, the smaller the better.
        k: the distance to reach.
    """
    before = None
    for epoch, value in zip(epochs, values, strict=True):
        if value <= k:
            if before is None:
                return Reached(epoch, at_first=True)
            last_epoch, last_value = before
            share = (last_value - k) / (last_value - value)
            return Reached(last_epoch + share * (epoch - last_epoch), at_first=False)
        before = epoch, value
    return None


def unguided_curve(results: Iterable[Result], epochs_per_step: float) -> Curve | None:
    """The Fréchet distance of a run's pictures without guidance, as it was measured while it trained.

    FID where there is one, else the distance with other features. Where evaluations differ in the number of pictures,
    protocol or sampling, those like the last one are taken: a curve must not fall because more pictures were drawn.

    Args:
        results: of the run, oldest first.
        epochs_per_step: pictures in a step over pictures in the data.
    """
    drawn = [result for result in results if result.while_training and _is_unguided_distance(result)]
    if not drawn:
        return None
    last = next((result for result in reversed(drawn) if result.metric == "fid"), drawn[-1])
    alike = {result.step: result for result in drawn if _kind(result) == _kind(last)}
    steps = sorted(step for step in alike if step is not None)
    return Curve(
        metric=last.metric,
        epochs=[step * epochs_per_step for step in steps],
        values=[alike[step].value for step in steps],
        num_samples=last.counts.get("samples", 0),
    )


def _is_unguided_distance(result: Result) -> bool:
    is_distance = result.metric == "fid" or result.metric.startswith("frechet_")
    samples = result.pictures.get("samples")
    return is_distance and samples is not None and samples.settings.get("guidance_scale") == 1.0


def _kind(result: Result) -> tuple:
    samples, reference = result.pictures["samples"], result.pictures.get("reference")
    return (
        result.metric,
        result.protocol,
        tuple(sorted(result.counts.items())),
        str(sorted(samples.settings.items())),
        None if reference is None else reference.sha256,
    )
