import math

import pytest
import torch
from op_cases.common import require_backend
from op_cases.noise_inject import NoiseCase
from scipy import stats

from sendvae_fast.ops import noise_inject, noise_inject_reference, philox, use_backend

BACKENDS = ("reference", "cpu", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request):
    require_backend("noise_inject", request.param)
    with use_backend(request.param):
        yield request.param


def make_inputs(shape=(3, 4, 6, 5), dtype=torch.float32, *, requires_grad=False):
    mean, spread, *rest = NoiseCase(shape).inputs(dtype, "cpu", 0)
    return mean.requires_grad_(requires_grad), spread.requires_grad_(requires_grad), *rest


def test_reference_is_the_formula():
    mean, logvar, latent_mean, latent_std, key, ids, _ = make_inputs()
    out = noise_inject_reference(mean.double(), logvar.double(), latent_mean, latent_std, key, ids)
    for b, sample_id in enumerate(ids):

        def scalar_normal(stream, element, sample_id=sample_id):
            words = philox.words(key, stream, sample_id[None], element // 4 * 4 + 4)[0].tolist()
            pair = element // 2 * 2
            u0, u1 = (((words[pair + i] >> 9) + 0.5) / 2**23 for i in (0, 1))
            trigonometric = math.cos if element % 2 == 0 else math.sin
            return math.sqrt(-2 * math.log(u0)) * trigonometric(2 * math.pi * u1)

        t = ((philox.words(key, philox.Stream.TIME, sample_id[None], 1).item() >> 9) + 0.5) / 2**23
        assert out.t[b].item() == t
        for element in (0, 1, 2, 3, 57, 119):
            c, h, w = element // 30, element // 5 % 6, element % 5
            std = math.exp(0.5 * min(max(logvar[b, c, h, w].item(), -30), 20))
            z = mean[b, c, h, w].item() + std * scalar_normal(0, element)
            n = (z - latent_mean[c].item()) / latent_std[c].item()
            noise = scalar_normal(1, element)
            expected = (z, (1 - t) * n + t * noise, noise - n)
            actual = [x[b, c, h, w].item() for x in out[:3]]
            assert actual == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_tokens_are_what_a_patch_embedding_reads(backend, patch_size):
    """The linear layer of the flattened kernel on the tokens is the convolution of the planes."""
    inputs = make_inputs((3, 4, 6, 12))
    planes, tokens = (noise_inject(*inputs, patch_size=size) for size in (None, patch_size))
    embed = torch.nn.Conv2d(4, 10, patch_size, stride=patch_size).double()
    expected = embed(planes.z_t.double()).flatten(2).transpose(1, 2)
    actual = torch.nn.functional.linear(tokens.z_t.double(), embed.weight.flatten(1), embed.bias)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert tokens.z_t.shape == (3, 72 // patch_size**2, 4 * patch_size**2) and tokens.z_t.is_contiguous()
    for name in ("z", "velocity", "t"):
        assert torch.equal(getattr(tokens, name), getattr(planes, name))


def test_gradient_of_tokens_is_that_of_planes(backend):
    mean, spread, *rest = make_inputs((3, 4, 6, 12), requires_grad=True)
    upstream = torch.randn(3, 4, 6, 12)
    grads = []
    for size, grad in ((None, upstream), (2, torch.nn.functional.pixel_unshuffle(upstream, 2).flatten(2).mT)):
        out = noise_inject(mean, spread, *rest, patch_size=size)
        grads.append(torch.autograd.grad((out.z_t, out.velocity), (mean, spread), (grad, upstream)))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("spread_is_std", [False, True])
def test_reference_gradcheck(spread_is_std):
    mean, _, *rest = make_inputs((2, 3, 2, 2))
    mean = mean.double().requires_grad_()
    # Beyond, inside and beyond the clamp of the log-variance.
    spread = torch.linspace(-31, 3, mean.numel(), dtype=torch.float64).view_as(mean)
    spread[-1] = 20.5
    spread = (spread.exp().clamp(max=3.0) if spread_is_std else spread).requires_grad_()

    def function(mean, spread):
        return noise_inject(mean, spread, *rest, spread_is_std=spread_is_std, patch_size=2)[:3]

    assert torch.autograd.gradcheck(function, (mean, spread))


def test_log_variance_is_clamped(backend):
    mean, _, *rest = make_inputs((1, 1, 1, 6))
    mean = torch.zeros_like(mean)
    spread = torch.tensor([-31.0, -30.0, 0.0, 19.0, 20.0, 21.0]).view_as(mean).requires_grad_()
    out = noise_inject(mean, spread, *rest)
    posterior_noise = philox.normal(rest[2], philox.Stream.POSTERIOR, rest[3], (1, 1, 6), dtype=torch.float64)
    std = torch.tensor([-30.0, -30.0, 0.0, 19.0, 20.0, 20.0], dtype=torch.float64).mul(0.5).exp()
    torch.testing.assert_close(out.z.double(), std * posterior_noise, rtol=1e-6, atol=0)
    out.z.sum().backward()
    inside = torch.tensor([0, 1, 1, 1, 1, 0])
    torch.testing.assert_close(spread.grad.double(), inside * 0.5 * std * posterior_noise, rtol=1e-6, atol=0)


@pytest.mark.parametrize("used", [("z",), ("z_t",), ("velocity",), ("z", "z_t"), ("z_t", "velocity")], ids="+".join)
def test_missing_gradients_are_zero(backend, used):
    mean, spread, *rest = make_inputs(requires_grad=True)
    grads = []
    for names in (used, ("z", "z_t", "velocity")):
        out = noise_inject(mean, spread, *rest)
        loss = sum((getattr(out, name) * (1.0 if name in used else 0.0)).square().sum() for name in names)
        grads.append(torch.autograd.grad(loss, (mean, spread)))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("patch_size", [None, 2])
@pytest.mark.parametrize("left_out", [("z",), ("velocity",), ("z", "velocity")], ids="+".join)
def test_what_is_not_needed_comes_empty(backend, left_out, patch_size):
    """And changes nothing of the rest, gradients included."""
    mean, spread, *rest = make_inputs((3, 4, 6, 10), requires_grad=True)
    kept = [name for name in ("z", "z_t", "velocity") if name not in left_out]
    whole = noise_inject(mean, spread, *rest, patch_size=patch_size)
    needs = {f"need_{name}": False for name in left_out}
    part = noise_inject(mean, spread, *rest, patch_size=patch_size, **needs)
    assert all(getattr(part, name).shape == (0,) and not getattr(part, name).requires_grad for name in left_out)
    assert torch.equal(part.t, whole.t) and all(torch.equal(getattr(part, n), getattr(whole, n)) for n in kept)
    grads = [
        torch.autograd.grad(sum(getattr(out, name).square().sum() for name in kept), (mean, spread))
        for out in (whole, part)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_latent_statistics_and_t_get_no_gradient(backend):
    mean, spread, latent_mean, latent_std, key, ids, _ = make_inputs(requires_grad=True)
    constants = [latent_mean.requires_grad_(), latent_std.requires_grad_(), torch.rand(3).requires_grad_()]
    out = noise_inject(mean, spread, *constants[:2], key, ids, constants[2])
    sum(x.sum() for x in out[:3]).backward()
    assert mean.grad is not None and all(x.grad is None for x in constants)
    assert not out.t.requires_grad


def test_zero_t_gives_the_normalised_latent(backend):
    mean, spread, latent_mean, latent_std, key, ids, _ = make_inputs()
    out = noise_inject(mean, spread, latent_mean, latent_std, key, ids, torch.zeros(3))
    expected = (out.z - latent_mean[:, None, None]) / latent_std[:, None, None]
    torch.testing.assert_close(out.z_t, expected, rtol=1e-6, atol=1e-6)
    assert out.t.eq(0).all()


def test_given_t_is_not_aliased(backend):
    *inputs, _ = make_inputs()
    t = torch.rand(3)
    out = noise_inject(*inputs, t)
    assert torch.equal(out.t, t) and out.t.data_ptr() != t.data_ptr()


def test_noise_does_not_depend_on_the_batch(backend):
    mean, spread, latent_mean, latent_std, key, ids, _ = make_inputs((5, 4, 6, 5))
    whole = noise_inject(mean, spread, latent_mean, latent_std, key, ids)
    order = torch.tensor([4, 1])
    part = noise_inject(mean[order], spread[order], latent_mean, latent_std, key, ids[order])
    for one, other in zip(whole, part, strict=True):
        assert torch.equal(one[order], other)


def test_noise_depends_on_seed_step_and_id(backend):
    mean, spread, latent_mean, latent_std, key, ids, _ = make_inputs((1, 4, 6, 5))
    base = noise_inject(mean, spread, latent_mean, latent_std, key, ids)
    for other_key, other_ids in (
        (philox.make_key(8, 0), ids), (philox.make_key(7, 1), ids), (key, ids + 1), (key, ids + 2**32),
    ):  # fmt: skip
        other = noise_inject(mean, spread, latent_mean, latent_std, other_key, other_ids)
        assert other.t != base.t
        assert (other.z != base.z).float().mean() > 0.9 and (other.velocity != base.velocity).float().mean() > 0.9


def test_noise_follows_the_logical_order(backend):
    mean, spread, *rest = make_inputs((2, 4, 6, 5))
    plain = noise_inject(mean, spread, *rest)
    last = noise_inject(*(x.contiguous(memory_format=torch.channels_last) for x in (mean, spread)), *rest)
    for one, other in zip(plain, last, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)  # Triton's interpreter is too slow
def test_statistics_of_time_and_noise(backend):
    batch, shape = 512, (4, 4, 4)
    zeros, ones = torch.zeros(batch, *shape), torch.ones(batch, *shape)
    key, ids = philox.make_key(3, 1), torch.arange(batch)
    out = noise_inject(zeros, ones, torch.zeros(4), torch.ones(4), key, ids, spread_is_std=True)
    posterior, noise = out.z, out.velocity + out.z  # n = z here
    assert stats.kstest(out.t, "uniform").pvalue > 1e-3
    for x in (posterior, noise):
        assert stats.kstest(x.flatten(), "norm").pvalue > 1e-3
    limit = 4.5 / math.sqrt(posterior.numel())
    assert abs(torch.corrcoef(torch.stack((posterior.flatten(), noise.flatten())))[0, 1]) < limit
    assert abs(torch.corrcoef(torch.stack((posterior[0::2].flatten(), posterior[1::2].flatten())))[0, 1]) < 2 * limit
    torch.testing.assert_close(
        out.z_t, (1 - out.t[:, None, None, None]) * posterior + out.t[:, None, None, None] * noise, rtol=0, atol=1e-5
    )


def test_nan_goes_through(backend):
    mean, spread, *rest = make_inputs((1, 1, 1, 5), requires_grad=True)
    with torch.no_grad():
        mean[..., 1] = math.nan
        spread[..., 3] = math.nan
        spread[..., 4] = math.inf
    expected = noise_inject_reference(mean, spread, *rest)
    out = noise_inject(mean, spread, *rest)
    for one, other in zip(out[:3], expected[:3], strict=True):
        assert one.isnan().flatten().tolist() == [False, True, False, True, False]
        assert torch.equal(one.isnan(), other.isnan())


@pytest.mark.slow
def test_reference_compiles_into_one_graph():
    mean, spread, *rest = make_inputs((3, 8, 6, 5))
    # Inductor takes a minute for the reference's Philox rounds; the graph is what matters here.
    compiled = torch.compile(noise_inject_reference, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(mean, spread, *rest), noise_inject_reference(mean, spread, *rest), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        dict(mean=torch.zeros(3, 4, 6)),
        dict(mean=torch.zeros(3, 4, 0, 5), spread=torch.zeros(3, 4, 0, 5)),
        dict(mean=torch.zeros(3, 4, 6, 5, dtype=torch.int32)),
        dict(spread=torch.zeros(3, 4, 6, 4)),
        dict(spread=torch.zeros(3, 4, 6, 5, dtype=torch.bfloat16)),
        dict(spread=torch.zeros(3, 4, 6, 5, device="meta")),
        dict(latent_mean=torch.zeros(5)),
        dict(latent_std=torch.zeros(4, dtype=torch.float64)),
        dict(key=torch.zeros(2)),
        dict(key=torch.zeros(3, dtype=torch.int64)),
        dict(sample_ids=torch.zeros(4, dtype=torch.int64)),
        dict(sample_ids=torch.zeros(3, dtype=torch.int32)),
        dict(t=torch.zeros(2)),
        dict(t=torch.zeros(3, dtype=torch.float64)),
        dict(patch_size=0),
        dict(patch_size=2),  # of 6 x 5
        dict(patch_size=6),
    ],
    ids=lambda change: "-".join(
        f"{name}_{x.dtype}_{x.device}_{list(x.shape)}" if isinstance(x, torch.Tensor) else f"{name}_{x}"
        for name, x in change.items()
    ),
)
def test_bad_input_is_named(change):
    names = ("mean", "spread", "latent_mean", "latent_std", "key", "sample_ids", "t")
    inputs = dict(zip(names, make_inputs(), strict=True)) | change
    with pytest.raises(ValueError, match=next(iter(change))):
        noise_inject(**inputs)
