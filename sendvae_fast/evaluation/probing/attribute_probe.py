"""Linear probes of a picture's attributes in its latent: the Send-VAE paper's measure of semantic disentanglement.

Protocol: flattened posterior means, standardised by the training pictures' mean and deviation; one logistic regression
per attribute with scikit-learn's default L2 penalty; F1 of the positive class on the test pictures, once predicting
where the probability exceeds 0.5, once above the threshold of each attribute that is best on the validation pictures;
averaged over attributes ("macro") and over all decisions ("micro"); 95 % intervals over resamples of the test pictures.
The paper gives "linear probing on the flattened latent" and F1, and leaves the rest open.

Shape letters: n pictures, A attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.probing.linear_fit import LinearModel, fit_linear
from sendvae_fast.evaluation.probing.rows import Rows
from sendvae_fast.evaluation.probing.scores import F1, Estimate, best_thresholds, f1_scores, top_recall
from sendvae_fast.evaluation.settings import ProbeConfig


@dataclass(frozen=True)
class Labelled:
    """Features of pictures and their attributes."""

    rows: Rows
    values: Tensor
    """[n, A] of 0 and 1."""


@dataclass(frozen=True)
class ProbeScores:
    """How well attributes are read off the test pictures' features."""

    names: tuple[str, ...]
    at_half: F1
    """Predicted where the probability exceeds 0.5."""
    tuned: F1
    """Predicted above the thresholds that are best on the validation pictures."""
    thresholds: list[float]
    """Those, as probabilities, by attribute."""
    top_recall: Estimate | None
    """Of the k most probable attributes, where k was given."""
    model: LinearModel


def probe_attributes(
    train: Labelled,
    validation: Labelled,
    test: Labelled,
    names: Sequence[str],
    config: ProbeConfig | None = None,
    *,
    top_k: int | None = None,
    seed: int = 0,
    distributed: Distributed | None = None,
) -> ProbeScores:
    """Fit linear probes on the training pictures, tune thresholds on the validation ones, score on the test ones.

    Args:
        train: what the probes are fitted to.
        validation: what thresholds are tuned on.
        test: what is scored.
        names: of the A attributes.
        config: penalty and when to stop.
        top_k: guesses a picture for `ProbeScores.top_recall`.
        seed: of the resamples.
        distributed: the ranks; all must call and all get the scores.

    Raises:
        UserError: sizes do not match, an attribute is neither 0 nor 1, or a feature is not finite.
    """
    for part, what in ((train, "training"), (validation, "validation"), (test, "test")):
        _check(part, what, len(names), train.rows.dim)
    model = fit_linear(train.rows, train.values, len(names), config or ProbeConfig(), distributed=distributed)
    thresholds = best_thresholds(model.logits(validation.rows), validation.values.cpu() > 0)
    logits, actual = model.logits(test.rows), test.values.cpu() > 0
    return ProbeScores(
        names=tuple(names),
        at_half=f1_scores(logits > 0, actual, seed),
        tuned=f1_scores(logits > thresholds, actual, seed),
        thresholds=thresholds.sigmoid().tolist(),
        top_recall=None if top_k is None else top_recall(logits, actual, top_k, seed),
        model=model,
    )


def held_out(num: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split range(num) at random: (ids that stay, ids held out), both ascending; at least one of each.

    Raises:
        UserError: there are not two.
    """
    if num < 2:
        raise UserError(f"{num} pictures cannot be split into two sets; give more")
    order = np.random.default_rng(seed).permutation(num)
    size = min(max(1, round(num * fraction)), num - 1)
    return np.sort(order[size:]), np.sort(order[:size])


def _check(part: Labelled, what: str, num_names: int, dim: int) -> None:
    rows, values = part.rows, part.values
    if len(rows) != len(values) or len(rows) == 0:
        raise UserError(
            f"attribute probe: {len(rows)} {what} latents but {len(values)} rows of attributes; give one each"
        )
    if values.shape[1] != num_names:
        raise UserError(f"attribute probe: {values.shape[1]} {what} attributes but {num_names} names; give one each")
    if not ((values == 0) | (values == 1)).all():
        raise UserError(f"attribute probe: {what} attributes must be 0 or 1")
    if rows.dim != dim:
        raise UserError(f"attribute probe: latents of {dim} and {rows.dim} numbers; use one autoencoder")
