import math

import pytest
import torch
import torch.nn.functional as F
from op_cases.adaln import AdalnCase
from op_cases.common import require_backend

from sendvae_fast.ops import adaln, adaln_reference, use_backend

BACKENDS = ("reference", "cpu", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request):
    require_backend("adaln", request.param)
    with use_backend(request.param):
        yield request.param


def make_inputs(shape=(2, 5, 48), dtype=torch.float32, **case):
    return {name: x.requires_grad_() for name, x in AdalnCase(shape, **case).inputs(dtype, "cpu", 0).items()}


def test_reference_is_the_block_of_sit():
    inputs = {name: x.double() for name, x in make_inputs().items()}
    x, shift, scale, branch, gate = (inputs[name] for name in ("x", "shift", "scale", "branch", "gate"))
    y, s = adaln_reference(**inputs)
    for sample in range(2):
        expected_s = x[sample] + gate[sample] * branch[sample]
        centred = expected_s - expected_s.mean(-1, keepdim=True)
        normalised = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6)
        torch.testing.assert_close(s[sample], expected_s)
        torch.testing.assert_close(y[sample], normalised * (1 + scale[sample]) + shift[sample])
    alone, same = adaln_reference(s, shift, scale)
    torch.testing.assert_close(alone, y)
    assert same is s


def test_reference_with_rms_is_the_block_of_lightningdit():
    inputs = {name: x.double() for name, x in make_inputs().items()}
    x, shift, scale, branch, gate = (inputs[name][0] for name in ("x", "shift", "scale", "branch", "gate"))
    y, s = (output[0] for output in adaln_reference(**inputs, rms=True))
    expected_s = x + gate * branch
    normalised = expected_s / torch.sqrt(expected_s.pow(2).mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(s, expected_s)
    torch.testing.assert_close(y, normalised * (1 + scale) + shift)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("has_branch", [True, False])
def test_reference_gradcheck(has_branch, rms):
    inputs = make_inputs((2, 3, 5), has_branch=has_branch)
    leaves = [x.detach().double().requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *args: adaln(**dict(zip(inputs, args, strict=True)), rms=rms), leaves)


def test_one_feature_and_constant_tokens(backend):
    """The variance is 0: y is the shift, and its gradient to x is 0 (one feature) or finite."""
    for width in (1, 4):
        x = torch.full((1, 2, width), 7.0, requires_grad=True)
        shift = torch.arange(1.0, width + 1).expand(1, width)
        y, _ = adaln(x, shift, torch.ones(1, width))
        assert torch.equal(y, shift.expand(1, 2, width))
        (grad,) = torch.autograd.grad(y[..., 0].sum(), x)
        assert grad.isfinite().all() and (width > 1 or grad.eq(0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_y_is_the_norm_of_the_returned_s(backend, dtype):
    inputs = make_inputs(dtype=dtype)
    y, s = adaln(**inputs)
    again, same = adaln(s.detach(), inputs["shift"], inputs["scale"])
    assert torch.equal(y, again) and same.data_ptr() == s.data_ptr()


@pytest.mark.parametrize("has_branch", [True, False])
def test_gradients_arrive_from_either_output(backend, has_branch):
    """A block uses both outputs, the final layer only y; each alone and both together are the reference's."""
    inputs = make_inputs(has_branch=has_branch)
    leaves = list(inputs.values())
    y, s = adaln(**inputs)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    true_y, true_s = adaln_reference(**dict(zip(inputs, doubles, strict=True)))
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)

    def loss(y, s, kind):
        w = weights.to(y.dtype)
        return {"y": (w * y).sum(), "s": (w * s.square()).sum(), "both": (w * y * s).sum()}[kind]

    for kind in ("y", "s", "both"):
        options = dict(retain_graph=True, materialize_grads=True)
        grads = torch.autograd.grad(loss(y, s, kind), leaves, **options)
        truth = torch.autograd.grad(loss(true_y, true_s, kind), doubles, **options)
        for name, grad, true in zip(inputs, grads, truth, strict=True):
            torch.testing.assert_close(
                grad.double(), true, rtol=1e-5, atol=2e-5, msg=lambda m, n=name, k=kind: f"{k}, {n}: {m}"
            )


def test_float_modulation_of_bfloat16_tokens(backend):
    inputs = make_inputs(dtype=torch.bfloat16, float_modulation=True)
    y, s = adaln(**inputs)
    assert y.dtype == s.dtype == torch.bfloat16
    grads = torch.autograd.grad((y.float().square().sum() + s.float().sum()), list(inputs.values()))
    assert [grad.dtype for grad in grads] == [x.dtype for x in inputs.values()]


def test_autocast_changes_nothing(backend):
    """PyTorch's layer_norm would give float32 under autocast."""
    inputs = make_inputs(dtype=torch.bfloat16)
    leaves = list(inputs.values())
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y, s = adaln(**inputs)
        results.append((y, s, *torch.autograd.grad((y, s), leaves, (s.detach(), y.detach()))))
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype == torch.bfloat16 and torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_activations(backend, dtype):
    """A mean of 1e4, a scale of 100: the statistics are those of plain PyTorch, and everything is finite."""
    inputs = make_inputs((2, 16, 384), dtype)
    with torch.no_grad():
        inputs["x"] += 1e4
        inputs["branch"] *= 1e2
        inputs["scale"] += 100
        inputs["gate"] *= 10
    y, s = adaln(**inputs)
    plain = F.layer_norm(s.detach().float(), (384,), eps=1e-6)
    truth = F.layer_norm(s.detach().double(), (384,), eps=1e-6)
    modulated = truth * (1 + inputs["scale"].double()[:, None]) + inputs["shift"].double()[:, None]
    rounding = torch.finfo(dtype).eps * modulated.abs().max()
    plain_error = 200 * (plain.double() - truth).abs().max()
    assert (y.double() - modulated).abs().max() <= rounding + 2 * plain_error
    grads = torch.autograd.grad((y.float().square().mean() + s.float().mean()), list(inputs.values()))
    assert all(x.isfinite().all() for x in (y, s, *grads))


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_mean_far_from_zero_is_exact(name):
    """With a mean of 1e4 and a deviation of 1 the error of y is that of the mean: at most half a unit, 2^-11."""
    require_backend("adaln", name)
    x = 1e4 + torch.randn((1, 32, 4096), generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(1, 4096)
    with use_backend(name):
        y, _ = adaln(x, zeros, zeros)
    error = (y.double() - F.layer_norm(x.double(), (4096,), eps=1e-6)).abs().max().item()
    assert error <= 1.05 * 2**-11


def test_nan_stays_in_its_token(backend):
    inputs = make_inputs()
    with torch.no_grad():
        inputs["branch"][1, 3, 7] = math.nan
    y, s = adaln(**inputs)
    assert y.isnan().sum() == 48 and y[1, 3].isnan().all()
    assert s.isnan().sum() == 1 and s[1, 3, 7].isnan()
    grads = dict(zip(inputs, torch.autograd.grad((y.sum() + s.sum()), list(inputs.values())), strict=True))
    for name in ("x", "branch"):
        assert grads[name][1, 3].isnan().all() and grads[name].isnan().sum() == 48, name
    for name in ("gate", "scale"):
        assert grads[name][1].isnan().all() and grads[name][0].isfinite().all(), name
    assert grads["shift"].isfinite().all()


def test_samples_do_not_depend_on_the_batch(backend):
    inputs = make_inputs((4, 18, 33))
    order = [3, 0]
    some = {name: x.detach()[order].requires_grad_() for name, x in inputs.items()}
    results = []
    for given in (inputs, some):
        y, s = adaln(**given)
        results.append((y, s, *torch.autograd.grad((y * s).sum(), list(given.values()))))
    for whole, part in zip(*results, strict=True):
        assert torch.equal(whole[order], part)


TOKENS, ROW = torch.zeros(2, 3, 4), torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=torch.zeros(2, 4)), "x must be"),
        (dict(x=torch.zeros(2, 3, 0), shift=torch.zeros(2, 0), scale=torch.zeros(2, 0)), "D > 0"),
        (dict(x=TOKENS.long()), "x must be float32"),
        (dict(shift=ROW.bfloat16(), scale=ROW.bfloat16()), "shift must be torch.float32"),
        (dict(scale=ROW.bfloat16()), "scale must be torch.float32"),
        (dict(shift=torch.zeros(2, 1, 4)), "shift must be"),
        (dict(scale=torch.zeros(1, 4)), "scale must be"),
        (dict(branch=TOKENS), "go together"),
        (dict(gate=ROW), "go together"),
        (dict(branch=TOKENS.bfloat16(), gate=ROW), "branch must be"),
        (dict(branch=TOKENS[:, 1:], gate=ROW), "branch must be"),
        (dict(branch=TOKENS, gate=ROW[:, 1:]), "gate must be"),
        (dict(scale=torch.zeros(2, 4, device="meta")), "one device"),
        (dict(eps=-1e-6), "eps"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        adaln(**{**dict(x=TOKENS, shift=ROW, scale=ROW), **changes})
