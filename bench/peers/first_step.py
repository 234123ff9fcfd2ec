"""The first step of a column: its losses and gradients, compared before anything is timed."""

import math
from dataclasses import dataclass

from torch import Tensor, nn

from bench.peers.case import Column, PeerCase
from sendvae_fast.errors import UserError

BOUNDS = {"fp32": (1e-4, 1e-3, 1e-2), "bf16": (2e-2, 1e-1, 0.5), "fp16": (2e-2, 1e-1, 0.5)}
"""By precision, how far may differ: a loss, relative to it or to the whole loss; all gradients together, as the norm
of the difference over the norm; a single parameter's likewise, but over no less than `FLOOR` of the norm of all."""
TIMES_ITS_OWN = 3.0
"""Gradients may differ by more where the peer's own do so by rounding alone: by three times that, as ops' may. A
discriminator and LPIPS amplify what the decoder rounds, REPA-E's to 4e-3 in float32 by a change of memory layout."""
CAPS = {"fp32": (1e-4, 2e-2, 1e-1), "bf16": (2e-2, 0.5, 1.0)}
"""What rounding may do to the peer's own step, as `BOUNDS`: beyond, a comparison with it says nothing."""
FLOOR = 1e-2
"""A parameter whose gradient is small beside all others' is the sum of what nearly cancels, so that rounding shows: the
bias of attention's keys, whose gradient is 0 but for rounding, is the extreme."""


@dataclass(frozen=True)
class FirstStep:
    """What the first step of a column computed."""

    losses: dict[str, float]
    """By ours' names for them."""
    gradients: dict[str, Tensor]
    """Before clipping, by ours' names of engine and parameter: float32 on the CPU."""


@dataclass(frozen=True)
class Difference:
    """How far a first step lies from another."""

    loss: float
    """The largest of any loss, relative to it or to the whole loss."""
    gradient: float
    """Of all gradients together: the norm of the difference over the norm."""
    parameter: float
    """The largest of any parameter's gradient, see `BOUNDS`."""
    where: tuple[str, str]
    """The loss and the parameter that differ the most."""


def gradients_of(module: nn.Module, prefix: str, scale: float = 1.0) -> dict[str, Tensor]:
    """The gradients that a module's parameters have, by prefix and name, over the scale that its loss was given."""
    return {
        prefix + name: parameter.grad.detach().float().cpu().clone() / scale
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def difference(step: FirstStep, truth: FirstStep) -> Difference:
    """How far `step` lies from `truth`.

    Raises:
        UserError: it lacks a loss or a parameter, or has one more.
    """
    if missing := sorted(truth.losses.keys() - step.losses.keys()):
        raise UserError(f"there is no loss {missing[0]}")
    if odd := sorted(truth.gradients.keys() ^ step.gradients.keys()):
        raise UserError(f"only one of both has a gradient of {odd[0]} ({len(odd)} such)")
    whole = abs(truth.losses["loss"])
    losses = {name: abs(step.losses[name] - wanted) / max(abs(wanted), whole) for name, wanted in truth.losses.items()}
    norms = {name: gradient.double().norm().item() for name, gradient in truth.gradients.items()}
    errors = {
        name: (step.gradients[name].double() - wanted.double()).norm().item()
        for name, wanted in truth.gradients.items()
    }
    norm = math.hypot(*norms.values())
    parameters = {name: error / max(norms[name], FLOOR * norm) for name, error in errors.items()}
    worst = tuple(max(parts, key=lambda name: _or_inf(parts[name])) for parts in (losses, parameters))
    return Difference(losses[worst[0]], math.hypot(*errors.values()) / norm, parameters[worst[1]], (worst[0], worst[1]))


def bounds_of(column: Column, own: Difference | None) -> tuple[float, float, float]:
    """The bounds of a column, see `BOUNDS`.

    own: what rounding to the column's precision does to the peer's own step; None where the column shows just that.
    """
    if own is None:
        return CAPS[column.precision]
    loss, gradient, parameter = BOUNDS[column.precision]
    return loss, max(gradient, TIMES_ITS_OWN * own.gradient), max(parameter, TIMES_ITS_OWN * own.parameter)


def check(
    case: PeerCase, column: Column, step: FirstStep, truth: FirstStep, bounds: tuple[float, float, float]
) -> Difference:
    """The difference of a column's first step from the truth.

    Raises:
        UserError: it is beyond the bounds, but for gradients where they differ by design.
    """
    try:
        found = difference(step, truth)
    except UserError as error:
        raise UserError(f"{case.label}: {column.name!r} does not compute the peer's step: {error}") from error
    names = (f"loss {found.where[0]!r}", "the gradient as a whole", f"the gradient of {found.where[1]}")
    values = (found.loss, found.gradient, found.parameter)
    held = 3 if case.equal or not column.ours else 1
    for name, value, bound in list(zip(names, values, bounds, strict=True))[:held]:
        if not value <= bound:  # NaN fails too
            raise UserError(
                f"{case.label}: {column.name!r} does not compute the peer's step: {name} differs by {value:.1e}, and "
                f"{bound:.0e} is what {column.precision} may; nothing was timed"
            )
    return found


def _or_inf(value: float) -> float:
    return math.inf if math.isnan(value) else value
