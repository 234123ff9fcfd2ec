"""The Triton and CUDA backends of every op on a GPU: the matrix of the CPU tests, and what only a GPU has."""

from collections.abc import Callable

import pytest
import torch
from op_cases import (
    COSINE_CASES,
    DTYPES,
    NOISE_CASES,
    CosineCase,
    NoiseCase,
    check_cosine_align,
    check_noise_inject,
    require_backend,
)

from sendvae_fast.ops import cosine_align, noise_inject, noise_inject_reference, philox, use_backend

GIB = 2**30


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    for op in ("noise_inject", "cosine_align"):
        require_backend(op, request.param, "cuda")
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def ops(backend):
    return torch.ops.sendvae_triton if backend == "triton" else torch.ops.sendvae


def noise_inputs(shape=(4, 8, 9, 7), number=0, dtype=torch.float32):
    """A moments leaf, and the rest of noise_inject's arguments."""
    mean, spread, *rest = NoiseCase(shape).inputs(dtype, "cuda", number)
    return torch.cat((mean, spread), dim=1).requires_grad_(), rest


def cosine_inputs(shape=(4, 17, 300), number=0, dtype=torch.float32):
    return [x.requires_grad_() for x in CosineCase(shape).inputs(dtype, "cuda", number)]


def run_noise(moments: torch.Tensor, rest: list) -> tuple[torch.Tensor, ...]:
    """Forward and backward through a chunk of the moments: z, z_t, velocity, t, gradient."""
    out = noise_inject(*moments.chunk(2, dim=1), *rest)
    (grad,) = torch.autograd.grad((out.z * out.z_t).float().sum() + out.velocity.float().square().sum(), moments)
    return *out, grad


def run_cosine(features: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Forward and backward with the first token dropped: distance, gradients."""
    distance = cosine_align(features[:, 1:], target[:, 1:], reduction="none")
    return distance, *torch.autograd.grad(distance.square().sum(), (features, target))


def assert_all_equal(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> None:
    for x, y in zip(one, other, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", NOISE_CASES, ids=str)
def test_noise_inject_close_to_truth(backend, case, dtype):
    check_noise_inject(case, dtype, backend, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", COSINE_CASES, ids=str)
def test_cosine_align_close_to_truth(backend, case, dtype):
    check_cosine_align(case, dtype, backend, "cuda")


def test_noise_is_that_of_the_cpu(backend):
    inputs = NoiseCase((3, 8, 17, 9)).inputs(torch.float32, "cpu", 0)
    expected = noise_inject_reference(*inputs)
    out = noise_inject(*(x if x is None else x.cuda() for x in inputs))
    assert torch.equal(out.t.cpu(), expected.t)
    for one, other in zip(out, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-5)


def test_noise_does_not_depend_on_the_batch(backend):
    mean, spread, latent_mean, latent_std, key, ids, _ = NoiseCase((5, 4, 16, 17)).inputs(torch.float32, "cuda", 0)
    whole = noise_inject(mean, spread, latent_mean, latent_std, key, ids)
    order = torch.tensor([4, 1], device="cuda")
    part = noise_inject(mean[order], spread[order], latent_mean, latent_std, key, ids[order])
    assert_all_equal(tuple(x[order] for x in whole), part)


def test_philox_is_that_of_the_cpu():
    ids = torch.tensor([0, 5, 2**40, -1])
    for name in ("words", "uniform"):
        function = getattr(philox, name)
        on_cpu = function(philox.make_key(3, 4), philox.Stream.ORDER, ids, 9)
        on_gpu = function(philox.make_key(3, 4, "cuda"), philox.Stream.ORDER, ids.cuda(), 9)
        assert torch.equal(on_gpu.cpu(), on_cpu)


def test_repeats_bit_for_bit(backend):
    moments, rest = noise_inputs((16, 64, 16, 16))
    assert_all_equal(run_noise(moments, rest), run_noise(moments, rest))
    features, target = cosine_inputs((16, 257, 768))
    assert_all_equal(run_cosine(features, target), run_cosine(features, target))


def test_non_default_stream(backend):
    """The op runs on the current stream: after a long kernel there, and before a read there."""
    moments, rest = noise_inputs((16, 64, 16, 16))
    features, target = cosine_inputs((16, 257, 768))
    expected = run_noise(moments, rest), run_cosine(features, target)
    late_moments, late_features = torch.zeros_like(moments), torch.zeros_like(features)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late_moments.copy_(moments.detach())
        late_features.copy_(features.detach())
        actual = (
            run_noise(late_moments.requires_grad_(), rest), run_cosine(late_features.requires_grad_(), target)
        )  # fmt: skip
    stream.synchronize()
    for one, other in zip(actual, expected, strict=True):
        assert_all_equal(one, other)


def replayed(function: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...]]:
    """Warm up, then capture `function`; the graph and its static outputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph, outputs


def test_cuda_graph_of_noise_inject(backend):
    """A replay with another key, other ids and other moments in the same memory draws their noise."""
    moments, rest = noise_inputs((8, 8, 9, 7), number=0)
    graph, outputs = replayed(lambda: run_noise(moments, rest))
    for number in (1, 2):
        other_moments, other_rest = noise_inputs((8, 8, 9, 7), number=number)
        expected = run_noise(other_moments, other_rest)
        with torch.no_grad():
            moments.copy_(other_moments)
        for static, new in zip(rest[:4], other_rest[:4], strict=True):
            static.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert_all_equal(outputs, expected)


def test_cuda_graph_of_cosine_align(backend):
    features, target = cosine_inputs(number=0)
    graph, outputs = replayed(lambda: run_cosine(features, target))
    for number in (1, 2):
        others = cosine_inputs(number=number)
        expected = run_cosine(*others)
        with torch.no_grad():
            features.copy_(others[0])
            target.copy_(others[1])
        graph.replay()
        torch.cuda.synchronize()
        assert_all_equal(outputs, expected)


def close(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...], dtype: torch.dtype) -> None:
    tolerance = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=3e-2, atol=3e-2)
    for x, y in zip(one, other, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, **tolerance)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_noise_inject_compiles_into_one_graph(backend, dtype, dynamic):
    def function(moments, *rest):
        # A chunk of something the compiler may fuse and lay out as it likes.
        out = noise_inject(*(moments * 1.0).chunk(2, dim=1), *rest)
        return out.z * 1.0, out.z_t, out.velocity

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for shape in ((4, 8, 9, 7), (6, 8, 16, 16)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            moments, rest = noise_inputs(shape, dtype=dtype)
            moments = moments.detach().contiguous(memory_format=memory_format).requires_grad_()
            results = []
            for call in (function, compiled):
                out = call(moments, *rest)
                results.append((*out, *torch.autograd.grad(sum(x.float().square().sum() for x in out), moments)))
            close(*results, dtype)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cosine_align_compiles_into_one_graph(backend, dtype, dynamic):
    def function(features, target):
        return cosine_align((features * 1.0)[:, 1:], (target * 1.0)[:, 1:])

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for shape in ((4, 17, 300), (3, 9, 768)):
        inputs = cosine_inputs(shape, dtype=dtype)
        results = []
        for call in (function, compiled):
            distance = call(*inputs)
            results.append((distance, *torch.autograd.grad(distance, inputs)))
        close(*results, dtype)


def test_opcheck(ops):
    moments, rest = noise_inputs((2, 4, 3, 5))
    mean, spread = (x.detach().requires_grad_() for x in moments.chunk(2, dim=1))
    torch.library.opcheck(ops.noise_inject, (mean, spread, *rest, False))
    features, target = cosine_inputs((6, 48))
    torch.library.opcheck(ops.cosine_align, (features, target, 1e-8))


def require_memory(gib: float) -> None:
    free = torch.cuda.mem_get_info()[0] / GIB
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, there are {free:.0f}")


def test_noise_inject_beyond_int32(backend):
    """More than 2^31 elements in all: the last samples equal those of a small batch."""
    require_memory(60)
    shape = (2**16 + 3, 32, 32, 32)
    mean = torch.zeros(shape, dtype=torch.bfloat16, device="cuda").requires_grad_()
    spread = torch.zeros_like(mean).requires_grad_()
    rest = torch.zeros(32, device="cuda"), torch.ones(32, device="cuda"), philox.make_key(1, 2, "cuda")
    ids = torch.arange(shape[0], device="cuda")
    out = noise_inject(mean, spread, *rest, ids)
    grad_mean, grad_spread = torch.autograd.grad(out.z_t, (mean, spread), torch.ones_like(out.z_t))
    few_mean, few_spread = (x[-3:].detach().requires_grad_() for x in (mean, spread))
    few = noise_inject(few_mean, few_spread, *rest, ids[-3:])
    few_grads = torch.autograd.grad(few.z_t, (few_mean, few_spread), torch.ones_like(few.z_t))
    assert_all_equal(tuple(x[-3:] for x in (*out, grad_mean, grad_spread)), (*few, *few_grads))


def test_cosine_align_beyond_int32(backend):
    require_memory(30)
    features = torch.ones(2**22 + 5, 513, dtype=torch.bfloat16, device="cuda")
    target = torch.ones_like(features)
    features[-5:], target[-5:] = torch.randn(5, 513), torch.randn(5, 513)
    features.requires_grad_()
    distance = cosine_align(features, target, reduction="none")
    (grad,) = torch.autograd.grad(distance.sum(), features)
    few = features[-5:].detach().requires_grad_()
    few_distance = cosine_align(few, target[-5:], reduction="none")
    assert_all_equal((distance[-5:], grad[-5:]), (few_distance, *torch.autograd.grad(few_distance.sum(), few)))
