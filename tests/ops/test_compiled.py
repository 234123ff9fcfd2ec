"""The compiled ops, called directly, against fp64 NumPy written out here and published Philox vectors."""

import hashlib
import os

import numpy as np
import pytest
import torch

from sendvae_fast.ops import library

pytestmark = pytest.mark.skipif(not library.load(), reason=f"compiled ops: {library.status()['cpu']}")

ops = torch.ops.sendvae
host = library.host()
needs_host = pytest.mark.skipif(host is None, reason=f"host module: {library.status()['host']}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASK64 = 2**64 - 1


# ---- What torch.compile keeps on the disk ----


def test_graphs_that_were_compiled_with_another_build_are_not_taken(monkeypatch, tmp_path):
    """PyTorch's key to them has its tag, and no more of an op than the name."""
    loaded = os.environ.get(library.ENVIRONMENT_VARIABLE) or library.LIBRARY_DIR / library.CPU_LIBRARY
    with open(loaded, "rb") as file:
        assert hashlib.sha256(file.read()).hexdigest()[:16] in torch.compiler.config.cache_key_tag
    tags = set()
    for build in (b"one", b"another"):
        (tmp_path / "library.so").write_bytes(build)
        monkeypatch.setattr(torch.compiler.config, "cache_key_tag", "the user's")
        library._set_compiled_graphs_apart(tmp_path / "library.so")
        tags.add(torch.compiler.config.cache_key_tag)
    assert len(tags) == 2 and all(tag.startswith("the user's sendvae_fast ") for tag in tags)


# ---- fp64 truth ----


def splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def philox_words(seed: int, step: int, stream: int, sample_id: int, num: int) -> np.ndarray:
    """uint32 [num], by the published algorithm on Python's and NumPy's integers."""
    key = splitmix64((splitmix64(seed & MASK64) + step) & MASK64)
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    c0 = np.arange(-(-num // 4), dtype=np.uint64)
    c1, c2, c3 = (np.full_like(c0, v) for v in (stream, sample_id & 0xFFFFFFFF, (sample_id >> 32) & 0xFFFFFFFF))
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ np.uint64(k0), p1 & low, (p0 >> shift) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).reshape(-1)[:num].astype(np.uint32)


def box_muller_fp64(word0: np.ndarray, word1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    u0, u1 = (((w >> np.uint32(9)) + 0.5) * 2.0**-23 for w in (word0, word1))
    radius = np.sqrt(-2.0 * np.log(u0))
    return radius * np.cos(2.0 * np.pi * u1), radius * np.sin(2.0 * np.pi * u1)


def normals(seed: int, step: int, stream: int, ids: list[int], shape: tuple[int, ...]) -> torch.Tensor:
    """float64 [B, *shape]."""
    num = int(np.prod(shape))
    out = np.empty((len(ids), num))
    for row, sample_id in zip(out, ids, strict=True):
        words = philox_words(seed, step, stream, sample_id, num + num % 2)
        row[:] = np.stack(box_muller_fp64(words[0::2], words[1::2]), axis=1).reshape(-1)[:num]
    return torch.from_numpy(out.reshape(len(ids), *shape))


def times(seed: int, step: int, ids: list[int]) -> torch.Tensor:
    words = np.array([philox_words(seed, step, 2, sample_id, 1)[0] for sample_id in ids], dtype=np.uint32)
    return torch.from_numpy(((words >> np.uint32(9)) + 0.5) * 2.0**-23)


SEED, STEP = -3, 2**40 + 7
IDS = [0, 5, 2**33 + 1]


class Case:
    """Inputs of noise_inject and its fp64 truth, forward and backward (by autograd on fp64)."""

    def __init__(self, shape=(3, 5, 6, 7), dtype=torch.float32, spread_is_std=False, given_t=False):
        generator = torch.Generator().manual_seed(sum(shape))
        channels = shape[1]
        self.mean = torch.randn(shape, generator=generator).to(dtype)
        spread = torch.randn(shape, generator=generator)
        self.spread = (spread.abs() + 0.1 if spread_is_std else spread).to(dtype)
        self.latent_mean = torch.randn(channels, generator=generator)
        self.latent_std = torch.rand(channels, generator=generator) + 0.5
        self.key = torch.tensor([SEED, STEP])
        self.ids = torch.tensor(IDS[: shape[0]], dtype=torch.int64)
        self.t = torch.rand(shape[0], generator=generator) if given_t else None
        self.spread_is_std, self.patch_size = spread_is_std, None
        self.grads = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]

    def forward(self):
        return ops.noise_inject(
            self.mean,
            self.spread,
            self.latent_mean,
            self.latent_std,
            self.key,
            self.ids,
            self.t,
            self.spread_is_std,
            self.patch_size,
            True,
            True,
        )

    def backward(self, t):
        return ops.noise_inject_backward(
            *self.grads, self.spread, self.latent_std, self.key, self.ids, t, self.spread_is_std, self.patch_size
        )

    def truth(self):
        """((z, z_t, velocity, t), (grad_mean, grad_spread)), float64."""
        ids, shape = self.ids.tolist(), self.mean.shape[1:]
        e1, e2 = (normals(SEED, STEP, stream, ids, shape) for stream in (0, 1))
        t = times(SEED, STEP, ids) if self.t is None else self.t.double()
        mean, spread = (x.double().requires_grad_() for x in (self.mean, self.spread))
        # Not torch.clamp: its gradient at the very ends has changed between versions; ours is 1 there.
        clamped = torch.where(spread < -30.0, -30.0, torch.where(spread > 20.0, 20.0, spread))
        std = spread if self.spread_is_std else torch.exp(0.5 * clamped)
        z = mean + std * e1
        n = (z - self.latent_mean.double()[:, None, None]) / self.latent_std.double()[:, None, None]
        level = t[:, None, None, None]
        out = (z, (1.0 - level) * n + level * e2, e2 - n)
        grads = torch.autograd.grad(out, (mean, spread), [g.double() for g in self.grads])
        return (*(x.detach() for x in out), t), grads


def assert_rounded(actual: torch.Tensor, truth: torch.Tensor, ulps: float) -> None:
    """The error is at most `ulps` units of rounding at the tensor's largest value."""
    assert actual.shape == truth.shape
    scale = float(truth.abs().max()) * torch.finfo(actual.dtype).eps
    assert float((actual.double() - truth).abs().max()) <= ulps * scale


# ---- Random numbers ----


@needs_host
@pytest.mark.parametrize(
    "counter, key, words",
    [
        ([0] * 4, [0] * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    """The vectors that come with Random123 (kat_vectors, philox4x32 10 rounds)."""
    assert host.philox4x32(counter, key) == words


@needs_host
@pytest.mark.slow
def test_every_radius_and_angle():
    """All 2^23 radii and all 2^23 angles: normals within a few ulp of Box-Muller in fp64."""
    rng = np.random.default_rng(0)
    every = np.arange(0, 2**23, dtype=np.uint32) << np.uint32(9)
    other = rng.permutation(every)
    for truth, actual in zip(box_muller_fp64(every, other), host.box_muller(every, other), strict=True):
        ulp = np.spacing(np.abs(truth).astype(np.float32))
        assert np.max(np.abs(actual - truth) / ulp) <= 4.0


@needs_host
def test_hooks_refuse_wrong_lengths():
    with pytest.raises(ValueError, match="counter has 4 words"):
        host.philox4x32([0, 0, 0], [0, 0])
    with pytest.raises(ValueError, match="of one length"):
        host.box_muller(np.zeros(2, np.uint32), np.zeros(3, np.uint32))


# ---- noise_inject ----


@pytest.mark.parametrize("given_t", [False, True])
@pytest.mark.parametrize("spread_is_std", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_inject(dtype, spread_is_std, given_t):
    case = Case(dtype=dtype, spread_is_std=spread_is_std, given_t=given_t)
    out, grads = case.truth()
    actual = case.forward()
    for one, true in zip(actual[:3], out[:3], strict=True):
        assert one.dtype == dtype and one.is_contiguous()
        assert_rounded(one, true, 2.0)
    assert torch.equal(actual[3].double(), out[3])  # t is exact
    for one, true in zip(case.backward(actual[3]), grads, strict=True):
        assert one.dtype == dtype and one.is_contiguous()
        assert_rounded(one, true, 2.0)


@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (1, 3, 1, 1), (2, 7, 1, 3), (1, 4, 33, 31), (3, 2, 16, 64)], ids=str)
def test_noise_inject_shapes(shape):
    """Odd sizes, channels that end inside a vector, samples of several tiles."""
    case = Case(shape)
    out, grads = case.truth()
    actual = case.forward()
    for one, true in zip((*actual[:3], *case.backward(actual[3])), (*out[:3], *grads), strict=True):
        assert_rounded(one, true, 2.0)


def test_noise_inject_layouts():
    """Halves of moments, channels-last and misaligned inputs give the same bits as packed ones."""
    case = Case()
    expected = case.forward()
    expected_grads = case.backward(expected[3])
    moments = torch.cat([case.mean, case.spread], dim=1)
    views = [
        moments.chunk(2, dim=1),
        moments.to(memory_format=torch.channels_last).chunk(2, dim=1),
        [torch.cat([torch.zeros(1), x.flatten()])[1:].view_as(x) for x in (case.mean, case.spread)],
    ]
    grads = case.grads
    for case.mean, case.spread in views:
        case.grads = [g.to(memory_format=torch.channels_last) for g in grads]
        for one, two in zip(case.forward(), expected, strict=True):
            assert torch.equal(one, two) and one.is_contiguous()
        for one, two in zip(case.backward(expected[3]), expected_grads, strict=True):
            assert torch.equal(one, two) and one.is_contiguous()


def test_noise_inject_expanded_gradients():
    """Gradients expanded from one number (after a sum, or zero for an unused output) equal full ones."""
    case = Case()
    t = case.forward()[3]
    full = [torch.full_like(case.mean, value) for value in (1.0, 0.0, -2.5)]
    case.grads = full
    expected = case.backward(t)
    case.grads = [torch.tensor(value).expand(case.mean.shape) for value in (1.0, 0.0, -2.5)]
    assert all(torch.equal(one, two) for one, two in zip(case.backward(t), expected, strict=True))


def test_noise_inject_ignores_batch_and_threads():
    """A sample's result is the same alone, and with any number of threads."""
    case = Case((3, 5, 40, 41))
    expected = case.forward()
    expected_grads = case.backward(expected[3])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert all(torch.equal(one, two) for one, two in zip(case.forward(), expected, strict=True))
        assert all(torch.equal(one, two) for one, two in zip(case.backward(expected[3]), expected_grads, strict=True))
    finally:
        torch.set_num_threads(threads)
    case.mean, case.spread, case.ids = case.mean[2:], case.spread[2:], case.ids[2:]
    assert all(torch.equal(one, two[2:]) for one, two in zip(case.forward(), expected, strict=True))


def test_noise_inject_clamps_log_variance():
    """Outside [-30, 20] the deviation is that of the end, the gradient 0; the ends themselves are inside."""
    case = Case((1, 1, 1, 6))
    case.spread = torch.tensor([-100.0, -30.0, -29.0, 19.0, 20.0, 100.0]).view(1, 1, 1, 6)
    case.mean = torch.zeros_like(case.spread)
    case.latent_mean = torch.zeros(1)
    out, grads = case.truth()
    actual = case.forward()
    assert torch.allclose(actual[0].double(), out[0], rtol=1e-6, atol=0)
    grad_spread = case.backward(actual[3])[1]
    assert torch.allclose(grad_spread.double(), grads[1], rtol=1e-5, atol=0)
    assert (grad_spread.flatten() == 0).tolist() == [True, False, False, False, False, True]


@pytest.mark.parametrize("shape", [(0, 4, 2, 2), (2, 0, 2, 2), (2, 4, 0, 2)], ids=str)
def test_noise_inject_empty(shape):
    case = Case(shape)
    z, z_t, velocity, t = case.forward()
    assert z.shape == z_t.shape == velocity.shape == shape
    assert torch.equal(t.double(), times(SEED, STEP, case.ids.tolist()))
    assert all(grad.shape == shape for grad in case.backward(t))


def test_noise_inject_nan_stays():
    case = Case((1, 1, 2, 4))
    case.mean[0, 0, 0, 0] = case.spread[0, 0, 1, 3] = torch.nan
    for out in case.forward()[:3]:
        assert out.isnan().flatten().tolist() == [True, *[False] * 6, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_value(dtype):
    """Each of the 2^16 numbers is read and written unchanged: std 0 and t 0 make z the mean."""
    mean = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(1, 1, 256, 256)
    one, zero = torch.ones(1), torch.zeros(1)
    z, z_t, *_ = ops.noise_inject(
        mean,
        torch.zeros_like(mean),
        zero,
        one,
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int64),
        zero,
        True,
        None,
        True,
        True,
    )
    assert torch.equal(z.isnan(), mean.isnan())
    numbers = ~mean.isnan()
    assert torch.equal(z[numbers], mean[numbers])
    finite = mean.isfinite()
    assert torch.equal(z_t[finite], mean[finite])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_to_nearest_even(dtype):
    """A gradient that is just grad_velocity / -latent_std rounds like PyTorch: ties, subnormals, overflow."""
    shape = (1, 1, 256, 256)
    value = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(shape)
    value = torch.where(value.isfinite(), value, torch.zeros_like(value))
    zero = torch.zeros((), dtype=dtype).expand(shape)
    for divisor in (2.0, 3.0, 0.7, 0.99):
        grad, _ = ops.noise_inject_backward(
            zero,
            zero,
            value,
            zero,
            torch.tensor([-divisor]),
            torch.zeros(2, dtype=torch.int64),
            torch.zeros(1, dtype=torch.int64),
            torch.zeros(1),
            True,
            None,
        )
        assert torch.equal(grad, (value.float() / divisor).to(dtype))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mean": torch.zeros(3, 5, 6)}, r"noise_inject: expected \[B, C, H, W\], got \[3, 5, 6\]"),
        ({"mean": torch.zeros(3, 5, 6, 7).double()}, "noise_inject: mean must be Float, BFloat16 or Half, got Double"),
        ({"spread": torch.zeros(3, 5, 6, 8)}, r"spread must have shape \[3, 5, 6, 7\], got \[3, 5, 6, 8\]"),
        ({"spread": torch.zeros(3, 5, 6, 7).half()}, "spread must be Float, got Half"),
        ({"latent_mean": torch.zeros(4)}, r"latent_mean must have shape \[5\], got \[4\]"),
        ({"latent_std": torch.zeros(5).double()}, "latent_std must be Float, got Double"),
        ({"key": torch.zeros(2)}, "key must be Long, got Float"),
        ({"ids": torch.zeros(2, dtype=torch.int64)}, r"sample_ids must have shape \[3\], got \[2\]"),
        ({"t": torch.zeros(3, 1)}, r"t must have shape \[3\], got \[3, 1\]"),
        ({"patch_size": 2}, r"patch_size 2 must be positive and divide the height and width of \[3, 5, 6, 7\]"),
        ({"patch_size": 0}, "patch_size 0 must be positive"),
    ],
)
def test_noise_inject_errors(change, message):
    case = Case()
    vars(case).update(change)
    with pytest.raises(RuntimeError, match=message):
        case.forward()


# ---- cosine_align ----


def cosine_truth(features, target, grad, eps):
    f, y = (x.double().requires_grad_() for x in (features, target))
    f_norm, y_norm = f.norm(dim=1), y.norm(dim=1)
    dot = (f * y).sum(1)
    distance = 1.0 - dot / (f_norm.clamp_min(eps) * y_norm.clamp_min(eps))
    grads = torch.autograd.grad(distance, (f, y), grad.double())
    return distance.detach(), torch.stack([dot, f_norm, y_norm], dim=1).detach(), grads


@pytest.mark.parametrize("shape", [(5, 768), (3, 1), (4, 7), (2, 1029)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cosine_align(dtype, shape):
    generator = torch.Generator().manual_seed(shape[1])
    features, target = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    grad = torch.randn(shape[0], generator=generator)
    distance, stats, grads = cosine_truth(features, target, grad, 1e-8)
    actual, actual_stats = ops.cosine_align(features, target, 1e-8, None, False)
    assert actual.dtype == actual_stats.dtype == torch.float32
    assert_rounded(actual, distance, 2.0)
    assert_rounded(actual_stats, stats, 4.0)
    both = ops.cosine_align_backward(grad, features, target, actual_stats, 1e-8, None, True)
    for one, true, other in zip(both, grads, (target, features), strict=True):
        assert one.dtype == dtype
        # A few fp32 roundings of the terms, which may cancel (with one component they do entirely), and one to dtype.
        terms = grad.abs() * other.double().abs().amax(1) / (stats[:, 1] * stats[:, 2])
        eps, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
        bound = 4 * torch.finfo(torch.float32).eps * terms[:, None] + eps * true.abs().clamp_min(smallest) / 2
        assert bool(((one.double() - true).abs() <= bound).all())
    alone, empty = ops.cosine_align_backward(grad, features, target, actual_stats, 1e-8, None, False)
    assert torch.equal(alone, both[0]) and empty.shape == (0,)


def test_cosine_align_small_norms():
    """A norm at or under eps is the constant eps, in value and gradient; a zero row gives distance 1."""
    eps = 0.5
    features = torch.tensor([[0.0, 0.0], [0.3, 0.4], [0.1, 0.2], [3.0, 4.0]])  # norms 0, eps, below, above
    target = torch.tensor([[1.0, 0.0], [0.2, -0.1], [0.0, 0.0], [1.0, 1.0]])
    grad = torch.tensor([1.0, 2.0, -1.0, 0.5])
    distance, stats = ops.cosine_align(features, target, eps, None, False)
    f_norm, y_norm = (x.double().norm(dim=1) for x in (features, target))
    a, b = f_norm.clamp_min(eps), y_norm.clamp_min(eps)
    dot = (features.double() * target.double()).sum(1)
    torch.testing.assert_close(distance.double(), 1.0 - dot / (a * b), rtol=1e-6, atol=1e-6)
    grad_features, grad_target = ops.cosine_align_backward(grad, features, target, stats, eps, None, True)
    for one, x, other, norm, clamped in (
        (grad_features, features, target, stats[:, 1], a),
        (grad_target, target, features, stats[:, 2], b),
    ):
        along = torch.where(norm > eps, dot / (a * b) / clamped**2, 0.0)
        truth = -grad.double()[:, None] * (other.double() / (a * b)[:, None] - along[:, None] * x.double())
        torch.testing.assert_close(one.double(), truth, rtol=1e-5, atol=1e-6)


def test_cosine_align_layouts_and_threads():
    """Rows of a larger tensor, transposed and expanded inputs, an expanded gradient, other threads: the same bits."""
    features, target = torch.randn(64, 300), torch.randn(64, 300)
    distance, stats = ops.cosine_align(features, target, 1e-8, None, False)
    grad = torch.full((64,), 0.25)
    grads = ops.cosine_align_backward(grad, features, target, stats, 1e-8, None, True)
    wide = torch.cat([features, target], dim=1)
    transposed = features.t().contiguous().t()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        for f, y in ((wide[:, :300], wide[:, 300:]), (transposed, target)):
            assert torch.equal(ops.cosine_align(f, y, 1e-8, None, False)[0], distance)
            again = ops.cosine_align_backward(torch.tensor(0.25).expand(64), f, y, stats, 1e-8, None, True)
            assert all(torch.equal(one, two) for one, two in zip(again, grads, strict=True))
    finally:
        torch.set_num_threads(threads)
    row = torch.randn(300)
    assert torch.equal(
        ops.cosine_align(features, row.expand(64, 300), 1e-8, None, False)[0],
        ops.cosine_align(features, row.repeat(64, 1), 1e-8, None, False)[0],
    )


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=str)
def test_cosine_align_empty(shape):
    x = torch.zeros(shape)
    distance, stats = ops.cosine_align(x, x, 1e-8, None, False)
    assert torch.equal(distance, torch.ones(shape[0])) and torch.equal(stats, torch.zeros(shape[0], 3))
    grads = ops.cosine_align_backward(torch.ones(shape[0]), x, x, stats, 1e-8, None, True)
    assert all(grad.shape == shape for grad in grads)


def test_cosine_align_nan_stays():
    features = torch.ones(3, 4)
    features[1, 2] = torch.nan
    distance, _ = ops.cosine_align(features, torch.ones(3, 4), 1e-8, None, False)
    assert distance.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    "features, target, message",
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), r"cosine_align: features must be \[M, D\], got \[2, 3, 4\]"),
        (torch.zeros(2, 3), torch.zeros(3, 2), r"cosine_align: target must have shape \[2, 3\], got \[3, 2\]"),
        (torch.zeros(2, 3), torch.zeros(2, 3).bfloat16(), "cosine_align: target must be Float, got BFloat16"),
        (torch.zeros(2, 3).int(), torch.zeros(2, 3).int(), "features must be Float, BFloat16 or Half, got Int"),
    ],
)
def test_cosine_align_errors(features, target, message):
    with pytest.raises(RuntimeError, match=message):
        ops.cosine_align(features, target, 1e-8, None, False)
