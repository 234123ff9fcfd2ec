import itertools
import math

import pytest
import torch
from scipy import stats
from torch.overrides import TorchFunctionMode

from sendvae_fast.ops import philox
from sendvae_fast.ops.philox import Stream

M32 = 0xFFFFFFFF
# Random123's known-answer file kat_vectors: counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((M32, M32, M32, M32), (M32, M32), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox_python(counter, key):
    """The ten rounds in Python integers, which cannot overflow."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & M32, p0 >> 32 ^ c[3] ^ k[1], p0 & M32]
        k = [(k[0] + 0x9E3779B9) & M32, (k[1] + 0xBB67AE85) & M32]
    return tuple(c)


def splitmix64_python(x):
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def words_python(seed, step, stream, sample_id, num):
    mixed = splitmix64_python((splitmix64_python(seed % 2**64) + step) % 2**64)
    key, sample_id = (mixed & M32, mixed >> 32), sample_id % 2**64
    blocks = (philox_python((i, stream, sample_id & M32, sample_id >> 32), key) for i in range(-(-num // 4)))
    return list(itertools.chain.from_iterable(blocks))[:num]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    assert philox_python(counter, key) == expected
    actual = philox.philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(map(int, actual)) == expected


def test_splitmix64():
    values = [0, 1, 2**63, 2**64 - 1, 0x123456789ABCDEF0]
    actual = philox.splitmix64(torch.tensor([value - 2**64 if value >= 2**63 else value for value in values]))
    assert [int(x) % 2**64 for x in actual] == [splitmix64_python(value) for value in values]
    # The first outputs of java.util.SplittableRandom's generator for seeds 0 and 1234567.
    assert splitmix64_python(0) == 0xE220A8397B1DCDAF
    assert splitmix64_python(1234567) == 6457827717110365317


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("step", [0, 12345, 2**40])
def test_words_are_the_definition(seed, step):
    ids = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, -1]
    key = philox.make_key(seed, step)
    for num in (1, 2, 5, 8):
        actual = philox.words(key, Stream.TIME, torch.tensor(ids), num)
        assert actual.tolist() == [words_python(seed, step, 2, sample_id, num) for sample_id in ids]


def test_uniform_is_exact_and_open():
    key, ids = philox.make_key(5, 9), torch.arange(4)
    word, u = philox.words(key, Stream.TIME, ids, 1000), philox.uniform(key, Stream.TIME, ids, 1000)
    assert u.dtype == torch.float32
    assert torch.equal(u.double(), ((word >> 9).double() + 0.5) * 2**-23)
    extremes = philox._to_uniform(torch.tensor([0, M32]), torch.float32)
    assert extremes.tolist() == [2**-24, 1 - 2**-24]


def test_normal_is_box_muller():
    key, ids = philox.make_key(5, 9), torch.tensor([3, 2**40])
    normal = philox.normal(key, Stream.POSTERIOR, ids, (3, 5))
    assert normal.shape == (2, 3, 5) and normal.dtype == torch.float32
    expected = []
    for row in philox.words(key, Stream.POSTERIOR, ids, 16).tolist():
        u = [((word >> 9) + 0.5) / 2**23 for word in row]
        for u0, u1 in zip(u[::2], u[1::2], strict=True):
            radius = math.sqrt(-2 * math.log(u0))
            expected += [radius * math.cos(2 * math.pi * u1), radius * math.sin(2 * math.pi * u1)]
    expected = torch.tensor(expected, dtype=torch.float64).view(2, 16)[:, :15].view(2, 3, 5)
    exact = philox.normal(key, Stream.POSTERIOR, ids, (3, 5), dtype=torch.float64)
    torch.testing.assert_close(exact, expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(normal.double(), expected, rtol=0, atol=3e-6)


def test_normal_moments_and_distribution():
    x = philox.normal(philox.make_key(1, 2), Stream.INTERPOLANT, torch.arange(64), (4096,), dtype=torch.float64)
    n = x.numel()
    # Four standard errors of the mean, variance, skewness and excess kurtosis of n normals.
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs(stats.skew(x.flatten())) < 4 * math.sqrt(6 / n)
    assert abs(stats.kurtosis(x.flatten())) < 4 * math.sqrt(24 / n)
    assert stats.kstest(x.flatten(), "norm").pvalue > 1e-3


def test_uniform_distribution():
    u = philox.uniform(philox.make_key(1, 2), Stream.TIME, torch.arange(20000), 1)
    assert stats.kstest(u.flatten(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("varied", ["element", "id", "id_high", "step", "seed", "stream"])
def test_neighbours_are_uncorrelated(varied):
    num = 40000
    first = dict(seed=1, step=2, stream=Stream.POSTERIOR, sample_id=3)
    second = dict(first)
    if varied == "id":
        second["sample_id"] = 4
    elif varied == "id_high":
        second["sample_id"] = 3 + 2**32
    elif varied != "element":
        second[varied] += 1

    def draw(seed, step, stream, sample_id):
        return philox.normal(philox.make_key(seed, step), stream, torch.tensor([sample_id]), (num + 1,))[0]

    x, y = draw(**first)[:-1], draw(**second)
    y = y[1:] if varied == "element" else y[:-1]
    for f, g in ((x, y), (x.square(), y.square())):
        assert abs(torch.corrcoef(torch.stack((f, g)))[0, 1]) < 4.5 / math.sqrt(num)
    assert (x == y).sum() < 5


def test_seeds_and_steps_do_not_meet():
    """(seed, step) and (seed + 1, step - 1) must be different keys."""
    keys = {
        tuple(int(x) for x in philox.derive_key(philox.make_key(seed, step)))
        for seed in range(40)
        for step in range(40)
    }
    assert len(keys) == 1600


def test_integers():
    key, ids = philox.make_key(3, 4), torch.arange(1000)
    draws = philox.integers(key, Stream.SAMPLER_LABEL, ids, 30, 7)
    assert draws.dtype == torch.int64 and draws.shape == (1000, 30)
    counts = torch.bincount(draws.flatten(), minlength=7)
    assert len(counts) == 7 and stats.chisquare(counts).pvalue > 1e-3
    word = philox.words(key, Stream.SAMPLER_LABEL, ids[:3], 5)
    for high in (1, 2**31):
        actual = philox.integers(key, Stream.SAMPLER_LABEL, ids[:3], 5, high)
        assert actual.tolist() == [[w * high // 2**32 for w in row] for row in word.tolist()]


def test_empty():
    key, none = philox.make_key(0, 0), torch.zeros(0, dtype=torch.int64)
    assert philox.normal(key, 0, none, (2, 3)).shape == (0, 2, 3)
    assert philox.normal(key, 0, torch.arange(2), (0, 3)).shape == (2, 0, 3)
    assert philox.uniform(key, 0, torch.arange(2), 0).shape == (2, 0)


def test_batch_does_not_matter():
    key, ids = philox.make_key(3, 4), torch.tensor([9, 2, 5])
    assert torch.equal(philox.normal(key, 0, ids, (7,))[1:], philox.normal(key, 0, ids[1:], (7,)))


@pytest.mark.slow
@pytest.mark.parametrize("backend", [
    "aot_eager", pytest.param("inductor", marks=pytest.mark.repeats("ops/test_philox.py::test_compiles_into_one_graph"))
])  # fmt: skip
def test_compiles_into_one_graph(backend):
    """The graph is what matters; Inductor takes ten seconds for the rounds."""
    key, ids = philox.make_key(2**64 - 3, 5), torch.tensor([0, 2**40 + 1, -1])
    compiled = torch.compile(lambda key, ids: philox.words(key, Stream.ORDER, ids, 9), fullgraph=True, backend=backend)
    assert torch.equal(compiled(key, ids), philox.words(key, Stream.ORDER, ids, 9))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda key, ids: philox.words(key.float(), 0, ids, 4), "key"),
        (lambda key, ids: philox.words(key[:1], 0, ids, 4), "key"),
        (lambda key, ids: philox.words(key, 0, ids.int(), 4), "sample_ids"),
        (lambda key, ids: philox.words(key, 0, ids[None], 4), "sample_ids"),
        (lambda key, ids: philox.words(key, 0, ids.to("meta"), 4), "one device"),
        (lambda key, ids: philox.integers(key, 0, ids, 4, 0), "high"),
        (lambda key, ids: philox.integers(key, 0, ids, 4, 2**31 + 1), "high"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(philox.make_key(0, 0), torch.arange(3))


class CallNotes(TorchFunctionMode):
    """Notes the keyword arguments of every call of PyTorch."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls[function.__name__] = kwargs
        return function(*args, **kwargs or {})


def test_a_key_goes_to_a_device_without_waiting_for_it():
    """A tensor that is made there, or moved there in the usual way, waits for the device's queue: once a step."""
    with CallNotes() as notes:
        key = philox.make_key(1, 2, "meta")
    assert key.is_meta and key.dtype == torch.int64
    assert notes.calls["tensor"]["device"] == "cpu" and notes.calls["to"] == {"non_blocking": True}
