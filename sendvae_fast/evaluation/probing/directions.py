"""Directions of attributes in latent space, from linear probes.

Shape letters: n pictures, d features, A attributes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sendvae_fast.evaluation.probing.linear_fit import LinearModel
from sendvae_fast.evaluation.probing.rows import Rows
from sendvae_fast.evaluation.settings import Direction


def attribute_directions(model: LinearModel, rows: Rows, kind: Direction) -> Tensor:
    """Steps [A, d] in latents, each of which moves its attribute's logit by one deviation of that logit over `rows`.

    ``weight`` is the shortest such step in standardised latents, along the probe's weights. Weights also cancel what is
    in latents beside the attribute, and mean little to a decoder where features are many; ``pattern`` is the covariance
    of latents with the logit over its variance: how latents of pictures with more of the attribute differ (Haufe et
    al., "On the interpretation of weight vectors of linear models in multivariate neuroimaging", NeuroImage 2014).

    Args:
        model: the probes.
        rows: features [n, d] that directions are taken from.
        kind: of the step.
    """
    logits = model.logits(rows).double().to(rows.device)
    centred = logits - logits.mean(dim=0)
    deviation = centred.square().mean(dim=0).sqrt()  # [A]
    scale = torch.where(model.deviation.isfinite(), model.deviation, 0.0).double()  # a constant feature stays
    if kind == "weight":
        weight = model.weight.double() * (scale > 0)
        steps = weight * (deviation / weight.square().sum(dim=1).clamp(min=1e-30))[:, None] * scale
    else:
        covariance = torch.zeros(logits.shape[1], rows.dim, dtype=torch.float64, device=rows.device)
        for place, block in rows.blocks():
            covariance += centred[place].T @ (block - model.mean).double()
        steps = covariance / len(rows) / deviation.clamp(min=1e-30)[:, None] * (scale > 0)
    return steps.float()
