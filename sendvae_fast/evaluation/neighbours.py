"""Precision and recall by nearest neighbours (Kynkäänniemi et al., 2019), in blocks on the features' device.

Shape letters: N, M pictures of two sets, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sendvae_fast.errors import UserError

NEIGHBOUR = 3
"""k of the ADM evaluator."""
BLOCK_NUMBERS = 2**26
"""Distances held at once."""


def precision_recall(samples: Tensor, reference: Tensor, neighbour: int = NEIGHBOUR) -> tuple[float, float]:
    """Share of samples within the reference's manifold, and of the reference within the samples'.

    A set's manifold is the union of balls around its features, each as wide as the distance to the `neighbour`th
    nearest other one. In float32; the ADM evaluator takes float16 where distances do not overflow.

    Args:
        samples: [N, D].
        reference: [M, D], on the same device.
        neighbour: k.

    Raises:
        UserError: a set has no more than `neighbour` pictures.
    """
    for features in (samples, reference):
        if len(features) <= neighbour:
            raise UserError(
                f"precision and recall need more than {neighbour} pictures on each side, not {len(features)}"
            )
    centre = reference.float().mean(dim=0)  # distances do not change, and their rounding is less
    samples, reference = samples.float() - centre, reference.float() - centre
    return (
        _share_within(samples, reference, squared_radii(reference, neighbour)),
        _share_within(reference, samples, squared_radii(samples, neighbour)),
    )


def squared_radii(features: Tensor, neighbour: int) -> Tensor:
    """[N, D] to the squared distance of each row's `neighbour`th nearest other row, [N]."""
    radii = []
    for first, distances in _distance_blocks(features, features):
        rows = torch.arange(len(distances), device=features.device)
        distances[rows, rows + first] = -1  # itself, the nearest, whatever rounding says
        radii.append(distances.kthvalue(neighbour + 1, dim=1).values)
    return torch.cat(radii)


def _share_within(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of points [N, D] within any of the balls around centres [M, D] with squared radii [M]."""
    inside = sum(int((distances <= radii).any(dim=1).sum()) for _, distances in _distance_blocks(points, centres))
    return inside / len(points)


def _distance_blocks(x: Tensor, y: Tensor):
    """(first row, squared distances [<= n, M] of some rows of x [N, D] from all of y [M, D]) block by block."""
    norms = y.square().sum(dim=1)
    for first in range(0, len(x), rows := max(BLOCK_NUMBERS // len(y), 1)):
        block = x[first : first + rows]
        distances = torch.addmm(norms, block, y.T, alpha=-2)
        yield first, distances.add_(block.square().sum(dim=1, keepdim=True)).clamp_(min=0)
