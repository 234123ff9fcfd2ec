"""`GroupNormSiLU`, `AdaLayerNorm` and `AdaRMSNorm` against the plain PyTorch that they replace."""

import pytest
import torch
import torch.nn.functional as F
from numerics import BACKWARD_FACTOR, FORWARD_FACTOR, assert_error_within
from torch import nn
from torch.testing import assert_close

from sendvae_fast.nn import AdaLayerNorm, AdaRMSNorm, GroupNormSiLU

DTYPES = [torch.float32, torch.bfloat16]


def results(function, inputs, dtype):
    """Outputs and gradients, of a fixed projection of the outputs."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    generator = torch.Generator().manual_seed(7)
    loss = sum((y * torch.randn(y.shape, generator=generator).to(dtype)).sum() for y in outputs)
    return [y.detach() for y in outputs], torch.autograd.grad(loss, leaves)


def assert_as_plain(ours, plain, inputs, dtype):
    rounded = [x.to(dtype) for x in inputs]
    actual, reference, truth = (
        results(ours, rounded, dtype), results(plain, rounded, dtype), results(plain, rounded, torch.float64)
    )  # fmt: skip
    for part, factor in ((0, FORWARD_FACTOR), (1, BACKWARD_FACTOR)):
        assert_error_within(actual[part], reference[part], truth[part], factor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_group_norm_silu(silu, with_residual, dtype):
    torch.manual_seed(0)
    module = GroupNormSiLU(4, 24, silu=silu)
    x, residual = torch.randn(2, 3, 24, 9, 7).unbind()
    weight, bias = 1 + 0.3 * torch.randn(24), torch.randn(24)

    def ours(x, weight, bias, *residual):
        y = torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x, *residual))
        return y if residual else (y,)

    def plain(x, weight, bias, *residual):
        s = x + residual[0] if residual else x
        y = F.group_norm(s, 4, weight, bias)  # with torch's default eps, as ours
        y = F.silu(y) if silu else y
        return (y, s) if residual else (y,)

    inputs = (x, weight, bias, residual) if with_residual else (x, weight, bias)
    assert_as_plain(ours, plain, inputs, dtype)


def test_state_dicts_are_group_norms():
    torch.manual_seed(0)
    ours, theirs = GroupNormSiLU(2, 6, eps=1e-6), nn.GroupNorm(2, 6, eps=1e-6)
    for parameter in (*ours.parameters(), *theirs.parameters()):
        nn.init.normal_(parameter)
    x = torch.randn(2, 6, 5, 5)
    ours.load_state_dict(theirs.state_dict())
    assert_close(ours(x), F.silu(theirs(x)))
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    assert_close(ours(x), F.silu(theirs(x)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ada_layer_norm(dtype):
    torch.manual_seed(0)
    x, branch = torch.randn(2, 2, 5, 24).unbind()
    shift, scale, gate = torch.randn(3, 2, 24).unbind()

    def plain(x, shift, scale):
        y = F.layer_norm(x, (24,), eps=1e-6)
        return y * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1), x

    def plain_with_branch(x, shift, scale, branch, gate):
        return plain(x + gate.unsqueeze(1) * branch, shift, scale)

    assert_as_plain(AdaLayerNorm(), plain, (x, shift, scale), dtype)
    assert_as_plain(AdaLayerNorm(), plain_with_branch, (x, shift, scale, branch, gate), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ada_rms_norm(dtype):
    torch.manual_seed(0)
    module = AdaRMSNorm(24)
    x, branch = (3 + torch.randn(2, 2, 5, 24)).unbind()
    shift, scale, gate = torch.randn(3, 2, 24).unbind()
    weight = 1 + 0.3 * torch.randn(24)

    def ours(x, weight, shift, scale, *branch_and_gate):
        return torch.func.functional_call(module, {"weight": weight}, (x, shift, scale, *branch_and_gate))

    def plain(x, weight, shift, scale):
        y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
        return y * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1), x

    def plain_with_branch(x, weight, shift, scale, branch, gate):
        return plain(x + gate.unsqueeze(1) * branch, weight, shift, scale)

    assert_as_plain(ours, plain, (x, weight, shift, scale), dtype)
    assert_as_plain(ours, plain_with_branch, (x, weight, shift, scale, branch, gate), dtype)


def test_they_compile_into_one_graph():
    torch.manual_seed(0)
    norm, ada, rms = GroupNormSiLU(2, 6), AdaLayerNorm(), AdaRMSNorm(6)
    x, tokens, (shift, scale) = torch.randn(2, 6, 4, 4), torch.randn(2, 5, 6), torch.randn(2, 2, 6).unbind()
    for module, inputs in ((norm, (x,)), (ada, (tokens, shift, scale)), (rms, (tokens, shift, scale))):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for ours, eager in zip(compiled(*inputs), module(*inputs), strict=True):
            assert torch.equal(ours, eager)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="num_groups"):
        GroupNormSiLU(4, 6)
    with pytest.raises(ValueError, match=r"\[B, C, H, W\].*\[2, 6, 9\]"):
        GroupNormSiLU(2, 6)(torch.randn(2, 6, 9))
    with pytest.raises(ValueError, match="shift must be"):
        AdaLayerNorm()(torch.randn(2, 5, 6), torch.randn(2, 7), torch.randn(2, 7))
