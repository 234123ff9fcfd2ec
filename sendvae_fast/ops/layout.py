"""The memory layout of [B, C, H, W] tensors, for kernels that read them in place."""

import torch

MEMORY_FORMAT = torch.channels_last
"""The format of pictures and feature maps, and of convolutions' weights where an engine allows it. A convolution whose
weights have another format than its input converts them at every call."""


def plane_strides(x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """`x` [B, C, H, W], copied only if its plane has no single stride, and its (batch, channel, plane) strides."""
    height, width = x.shape[2:]
    stride_b, stride_c, stride_h, stride_w = x.stride()
    if height == 1:
        return x, (stride_b, stride_c, stride_w)
    if width == 1 or stride_h == width * stride_w:
        return x, (stride_b, stride_c, stride_h if width == 1 else stride_w)
    x = x.contiguous()
    return x, (x.stride(0), x.stride(1), 1)


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether `x` is [B, C, H, W] without gaps and channels-last, and not contiguous as well."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def common_memory_format(*tensors: torch.Tensor) -> torch.memory_format:
    """channels_last if the channels of every [B, C, H, W] tensor lie side by side, else contiguous_format."""
    side_by_side = all(x.shape[1] > 1 and x.stride(1) == 1 for x in tensors)
    return torch.channels_last if side_by_side else torch.contiguous_format
