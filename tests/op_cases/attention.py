"""Shapes of `attention` and their comparison with float64 truth. Not in `ALL`: its backends are not the ops'."""

from dataclasses import dataclass

import torch

from op_cases.common import Results, assert_op_within, num_repeats
from sendvae_fast.ops import attention, attention_reference, use_attention


@dataclass(frozen=True)
class AttentionCase:
    """q, k, v [B, heads, N, head_dim].

    Layouts: "packed" as they are; "qkv" of a transformer's [B, N, 3, heads, head_dim]; "planes" of convolutions,
    [B, heads, head_dim, N] with N innermost; "offset" one element off any alignment.
    """

    shape: tuple[int, int, int, int]
    layout: str = "qkv"

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))}-{self.layout}"

    def inputs(self, dtype: torch.dtype, device: str, number: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(3000 + number)
        qkv = torch.randn((3, *self.shape), generator=generator).to(device, dtype)
        if self.layout == "qkv":
            qkv = qkv.permute(1, 3, 0, 2, 4).contiguous().permute(2, 0, 3, 1, 4)
        elif self.layout == "planes":
            qkv = qkv.mT.contiguous().mT
        elif self.layout == "offset":
            qkv = torch.cat((qkv.new_zeros(1), qkv.flatten()))[1:].view(qkv.shape)
        return list(qkv.unbind())


CASES = [
    AttentionCase((0, 3, 5, 64)),
    AttentionCase((2, 3, 0, 64), "packed"),
    AttentionCase((1, 1, 1, 64)),
    AttentionCase((3, 2, 1, 72)),
    AttentionCase((1, 1, 1, 512), "packed"),
    AttentionCase((1, 1, 2, 8)),
    AttentionCase((2, 3, 7, 16)),
    AttentionCase((2, 3, 31, 32), "packed"),
    AttentionCase((2, 2, 33, 40)),
    AttentionCase((2, 2, 17, 64), "planes"),
    AttentionCase((2, 2, 17, 64), "offset"),
    AttentionCase((2, 2, 64, 64)),
    AttentionCase((2, 2, 65, 64)),
    AttentionCase((2, 2, 63, 72)),
    AttentionCase((2, 2, 64, 72), "packed"),
    AttentionCase((1, 2, 127, 72), "planes"),
    AttentionCase((1, 2, 129, 80)),
    AttentionCase((1, 2, 100, 96), "offset"),
    AttentionCase((1, 2, 64, 128)),
    AttentionCase((2, 1, 25, 256), "planes"),
    AttentionCase((2, 1, 36, 512), "planes"),
    AttentionCase((1, 1, 65, 512), "packed"),
    AttentionCase((1, 1, 256, 512), "planes"),  # the middle of an f16 autoencoder
    AttentionCase((2, 12, 256, 64)),  # mapper, SiT-B
    AttentionCase((1, 16, 256, 72)),  # SiT-XL
]


def check(case: AttentionCase, dtype: torch.dtype, backend: str, device: str) -> None:
    """Forward and backward of a backend against truth, with plain PyTorch's error as the measure."""
    actual, plain, truth = Results(), Results(), Results()
    for number in range(num_repeats(torch.Size(case.shape).numel())):
        inputs = case.inputs(dtype, device, number)
        grad = torch.randn(case.shape, generator=torch.Generator().manual_seed(number)).to(device, dtype)
        for results, function, compute in (
            (actual, attention, dtype),
            (plain, attention_reference, dtype),
            (truth, attention_reference, torch.float64),
        ):
            leaves = [x.to(compute).detach().requires_grad_() for x in inputs]
            with use_attention(backend):
                out = function(*leaves)
            grads = torch.autograd.grad(out, leaves, grad.to(compute))
            grads = dict(zip("qkv", grads, strict=True))
            if case.shape[2] == 1:
                assert_zero_within_rounding(grads.pop("q"), leaves[1], leaves[2], grad)
                assert_zero_within_rounding(grads.pop("k"), leaves[0], leaves[2], grad)
            results.add({"out": out}, grads)
    assert_op_within(actual, plain, truth)


def assert_zero_within_rounding(grad_q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor) -> None:
    """The gradient of a lone token's q (or k, given q in its place): (grad.v - grad.out) k / sqrt(D), where out = v.

    Plain PyTorch subtracts a number from itself. Who sums the two products over D in different orders, as flash
    attention does, is off by D float32 roundings of their terms at most.
    """
    head_dim = v.shape[-1]
    terms = (grad.double() * v.double()).abs().sum(-1, keepdim=True)
    bound = head_dim * torch.finfo(torch.float32).eps * terms * k.double().abs() / head_dim**0.5
    assert bool((grad_q.double().abs() <= bound).all())
