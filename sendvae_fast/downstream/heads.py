"""Linear heads on patch tokens for segmentation and depth, and their scores.

Heads see directions of tokens alone (each divided by its norm): alignment by cosine says nothing of lengths. A head is
fitted to patches, to the share of each segment or the mean logarithm of the distance, and its outputs are brought to
pixels bilinearly. Shape letters: n pictures, N = G G tokens, D features, K segments, S picture size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sendvae_fast.downstream.dense_data import VOID
from sendvae_fast.evaluation.probing.scores import Estimate, estimate_of_means

L2 = 1e-5
"""Penalty of the mean squared weight beside the mean loss of a patch, on standardised features."""
STEPS = 100
"""Of L-BFGS at most, for the segmentation head."""


class LinearHead(NamedTuple):
    """A linear map of standardised directions of tokens."""

    weight: Tensor  # [D, K]
    bias: Tensor  # [K]
    mean: Tensor  # [D]
    std: Tensor  # [D]

    def __call__(self, tokens: Tensor, size: int) -> Tensor:
        """Tokens [n, N, D] to outputs [n, K, size, size], brought to pixels bilinearly."""
        x = (F.normalize(tokens.float(), dim=-1) - self.mean) / self.std
        grid = round(tokens.shape[1] ** 0.5)
        outputs = (x @ self.weight + self.bias).transpose(1, 2).unflatten(2, (grid, grid))
        return F.interpolate(outputs, size=(size, size), mode="bilinear", align_corners=False)

    def segments(self, tokens: Tensor, size: int) -> Tensor:
        """The likeliest segment of each pixel, uint8 [n, size, size]."""
        return self(tokens, size).argmax(dim=1).to(torch.uint8)

    def distances(self, tokens: Tensor, size: int) -> Tensor:
        """The distance at each pixel, float32 [n, size, size]."""
        return self(tokens, size)[:, 0].exp()


def fit_segmentation(tokens: Tensor, segments: Tensor, num_segments: int) -> LinearHead:
    """Multinomial logistic regression of patches' shares of segments, without the pixels that are `VOID`.

    Args:
        tokens: [n, N, D].
        segments: uint8 [n, S, S].
        num_segments: K.
    """
    x, mean, std = _standardised(tokens)
    grid = round(tokens.shape[1] ** 0.5)
    maps = torch.stack([segments == number for number in range(num_segments)], dim=1).float()
    shares = F.adaptive_avg_pool2d(maps, grid).flatten(2).transpose(1, 2).flatten(0, 1)  # [n N, K]
    weight = torch.zeros(x.shape[1], num_segments, device=x.device, requires_grad=True)
    bias = torch.zeros(num_segments, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = -(shares * F.log_softmax(x @ weight + bias, dim=1)).sum(dim=1)
        loss = losses.mean() + L2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType] - a closure may return a tensor
    return LinearHead(weight.detach(), bias.detach(), mean, std)


def fit_depth(tokens: Tensor, distances: Tensor) -> LinearHead:
    """Ridge regression of patches' mean logarithm of the distance, in closed form.

    Args:
        tokens: [n, N, D].
        distances: float32 [n, S, S], above 0.
    """
    x, mean, std = _standardised(tokens)
    grid = round(tokens.shape[1] ** 0.5)
    y = F.adaptive_avg_pool2d(distances.log()[:, None], grid).flatten().double()
    x, bias = x.double(), y.mean()
    gram = x.T @ x / len(x) + L2 * torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
    weight = torch.linalg.solve(gram, x.T @ (y - bias) / len(x))
    return LinearHead(weight[:, None].float(), bias[None].float(), mean, std)


def _standardised(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Directions of all tokens [n N, D] with mean 0 and deviation 1, and what mean [D] and deviation [D] were."""
    x = F.normalize(tokens.float(), dim=-1).flatten(0, 1)
    mean, std = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
    return (x - mean) / std, mean, std


class SegmentationScore(NamedTuple):
    """Of predicted segments."""

    miou: Estimate
    """Mean over segments of intersection over union, all pixels of all pictures counted together. A segment that is
    neither there nor predicted is left out."""
    each: list[float]
    """Intersection over union by segment; NaN where it is neither there nor predicted."""


def segmentation_score(predicted: Tensor, actual: Tensor, num_segments: int) -> SegmentationScore:
    """Score segments uint8 [n, S, S] against the actual ones, whose `VOID` pixels are not counted."""
    counted = actual != VOID
    parts = []
    for number in range(num_segments):
        p, a = (predicted == number) & counted, (actual == number) & counted
        parts.append(torch.stack([(p & a).sum(dim=(1, 2)), (p | a).sum(dim=(1, 2))], dim=1))
    counts = torch.stack(parts, dim=1).flatten(1).double().cpu()  # [n, K 2]

    def ious(means: Tensor) -> Tensor:
        intersection, union = means.unflatten(1, (num_segments, 2)).unbind(dim=2)
        return intersection / union  # NaN of 0 / 0

    return SegmentationScore(
        estimate_of_means(counts, lambda means: ious(means).nanmean(dim=1)), ious(counts.mean(dim=0)[None])[0].tolist()
    )


def abs_rel(predicted: Tensor, actual: Tensor) -> Estimate:
    """Mean over pixels of |predicted - actual| / actual, of distances [n, S, S]."""
    each = ((predicted - actual).abs() / actual).mean(dim=(1, 2)).cpu()
    return estimate_of_means(each[:, None], lambda means: means[:, 0])
