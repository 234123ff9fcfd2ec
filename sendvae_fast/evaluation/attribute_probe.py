"""Linear probes of a picture's attributes in its latent: the Send-VAE paper's measure of semantic disentanglement.

Protocol: latents flattened (the caller chooses mean or sample), standardised by the training set's mean and deviation;
one logistic regression per attribute with an L2 penalty; an attribute is predicted where its probability exceeds 0.5;
F1 of the positive class on the test set; the mean over attributes ("macro"). The paper gives no protocol beyond
"linear probing on the flattened latent" and F1; this one is scikit-learn's `LogisticRegression` at its defaults
and `f1_score(average="macro", zero_division=0)`.

Shape letters: n pictures, d features, A attributes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from sendvae_fast import checks
from sendvae_fast.errors import UserError


@dataclass(kw_only=True)
class ProbeConfig:
    """The logistic regressions. Raises `UserError` for a value out of range."""

    inverse_penalty: float = 1.0
    """C of the objective C Σ cross-entropy + |w|²/2 (the bias has no penalty), scikit-learn's default."""
    max_iterations: int = 1000
    """L-BFGS iterations for all attributes together."""
    tolerance: float = 1e-5
    """Largest entry of the gradient of the mean objective, per attribute, at which L-BFGS stops."""

    def __post_init__(self) -> None:
        checks.above(0, self, "inverse_penalty", "max_iterations", "tolerance", where="probe")


@dataclass(frozen=True)
class ProbeResult:
    """F1 of each attribute on the test set."""

    names: tuple[str, ...]
    f1: tuple[float, ...]

    @property
    def mean_f1(self) -> float:
        return sum(self.f1) / len(self.f1)


def probe_attributes(
    train_features: Tensor,
    train_attributes: Tensor,
    test_features: Tensor,
    test_attributes: Tensor,
    names: Sequence[str] | None = None,
    config: ProbeConfig | None = None,
) -> ProbeResult:
    """Train linear probes on one set of pictures and score them on another.

    features: [n, ...], flattened to [n, d]; computed in float64 if they are, else float32, on their device.
    attributes: [n, A] of 0 and 1. Raises UserError if the sizes do not match or an attribute has another value.
    """
    train_x, test_x = _float(train_features), _float(test_features)
    train_y, test_y = train_attributes.to(train_x), test_attributes.to(test_x)
    names = tuple(names) if names is not None else tuple(f"attribute {i}" for i in range(train_y.shape[1]))
    _check(train_x, train_y, test_x, test_y, names)
    mean, deviation = train_x.mean(dim=0), train_x.std(dim=0, correction=0)
    deviation = torch.where(deviation > 0, deviation, torch.inf)  # a feature constant in training becomes 0 everywhere
    weight, bias = fit_logistic((train_x - mean) / deviation, train_y, config or ProbeConfig())
    predicted = ((test_x - mean) / deviation @ weight.T + bias) > 0  # [n, A]
    return ProbeResult(names, tuple(f1_scores(predicted, test_y > 0.5).tolist()))


def fit_logistic(x: Tensor, y: Tensor, config: ProbeConfig) -> tuple[Tensor, Tensor]:
    """Logistic regressions for all attributes at once: x [n, d], y [n, A] to weight [A, d], bias [A].

    The sum of the attributes' objectives is minimised by L-BFGS with a strong-Wolfe line search; they share no
    parameter, so each reaches its own optimum, and every iteration is two matrix products for all of them.
    """
    num, num_attributes = y.shape
    weight = torch.zeros(num_attributes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(num_attributes, dtype=x.dtype, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=config.max_iterations,
        tolerance_grad=config.tolerance,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        solver.zero_grad()
        cross_entropy = binary_cross_entropy_with_logits(x @ weight.T + bias, y, reduction="sum") / num
        loss = cross_entropy + weight.square().sum() / (2 * config.inverse_penalty * num)
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(objective)
    return weight.detach(), bias.detach()


def f1_scores(predicted: Tensor, actual: Tensor) -> Tensor:
    """F1 of each column: bool [n, A] twice to float64 [A]; 0 where nothing is predicted and nothing is there."""
    hits = (predicted & actual).sum(dim=0).double()
    return 2 * hits / (predicted.sum(dim=0) + actual.sum(dim=0)).clamp(min=1)


def _float(features: Tensor) -> Tensor:
    features = features.detach().flatten(1)
    return features.to(torch.promote_types(features.dtype, torch.float32))


def _check(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, names: tuple[str, ...]) -> None:
    for part, x, y in (("training", train_x, train_y), ("test", test_x, test_y)):
        if len(x) != len(y) or len(x) == 0:
            raise UserError(f"attribute probe: {len(x)} {part} latents but {len(y)} rows of attributes; give one each")
        if not x.isfinite().all():
            raise UserError(f"attribute probe: {part} latents are not finite; the autoencoder's checkpoint is broken")
        if y.shape[1] != len(names):
            raise UserError(f"attribute probe: {y.shape[1]} {part} attributes but {len(names)} names; give one each")
        if not ((y == 0) | (y == 1)).all():
            raise UserError(f"attribute probe: {part} attributes must be 0 or 1")
    if train_x.shape[1] != test_x.shape[1]:
        raise UserError(
            f"attribute probe: latents of {train_x.shape[1]} and {test_x.shape[1]} numbers; use one autoencoder"
        )
