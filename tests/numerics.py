"""How tests judge an op's numbers, and the memory layouts they try.

The rule (FlashAttention's): measured against float64 truth, the largest error of an op is at most FORWARD_FACTOR times
that of plain PyTorch in the same dtype, BACKWARD_FACTOR for gradients. Plain PyTorch is the op's reference, which keeps
float32 inside: stricter than arithmetic in the low precision. Half a unit in the last place of the largest true value
is allowed on top, since a correctly rounded result has that error.
"""

from collections.abc import Sequence

import torch

FORWARD_FACTOR = 2.0
BACKWARD_FACTOR = 3.0


def assert_error_within(
    actual: Sequence[torch.Tensor],
    plain: Sequence[torch.Tensor],
    truth: Sequence[torch.Tensor],
    factor: float,
    what: str = "",
) -> None:
    """Apply the rule to the largest and the root-mean-square error over all tensors of the sequences together.

    Repeats of a small case go in one sequence: the largest of a handful of rounding errors is a matter of luck.
    """
    for one, other, true in zip(actual, plain, truth, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape == true.shape, what
        assert torch.equal(one.isnan(), true.isnan()), f"{what}: NaN in other places than the truth"
    actual_error, plain_error = (
        torch.cat([(x.double() - true).flatten() for x, true in zip(results, truth, strict=True)])
        for results in (actual, plain)
    )
    if actual_error.numel() == 0:
        return
    largest = max(float(t.abs().max()) for t in truth)
    floor = 0.5 * torch.finfo(actual[0].dtype).eps * largest
    for measure in (lambda x: x.abs().max(), lambda x: x.square().mean().sqrt()):
        ours, theirs = float(measure(actual_error)), float(measure(plain_error))
        assert ours <= factor * theirs + floor, f"{what}: error {ours:.3g}, plain PyTorch's {theirs:.3g}, {factor=}"


def as_layout(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of `x` in another memory layout, in storage of its own. The channels-last ones need 4 dimensions."""
    if layout == "contiguous":
        return x.clone(memory_format=torch.contiguous_format)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "chunk":  # the first half of the moments
        return torch.cat((x, torch.full_like(x, torch.nan)), dim=1)[:, : x.shape[1]]
    if layout == "channels_last_chunk":
        moments = torch.cat((x, torch.full_like(x, torch.nan)), dim=1)
        return moments.contiguous(memory_format=torch.channels_last)[:, : x.shape[1]]
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "offset":  # one element off any alignment
        return torch.cat((x.new_full((1,), torch.nan), x.flatten()))[1:].view(x.shape)
    if layout == "padded":  # rows at a stride of whole 16-byte vectors, whatever their width
        stride = (x.shape[-1] // 8 + 1) * 8
        return torch.cat((x, x.new_full((*x.shape[:-1], stride - x.shape[-1]), torch.nan)), dim=-1)[..., : x.shape[-1]]
    raise ValueError(layout)
