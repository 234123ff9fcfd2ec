"""What only one op can be asked on a GPU: agreement with the CPU, and sizes beyond 32-bit indices."""

import pytest
import torch
from op_cases.adamw_ema import SETTINGS
from op_cases.common import require_backend
from op_cases.noise_inject import NoiseCase

from sendvae_fast.engine.streams import ToHost
from sendvae_fast.ops import (
    adaln,
    adamw_ema_,
    cosine_align,
    global_norm,
    group_norm_silu,
    group_norm_silu_reference,
    noise_inject,
    noise_inject_reference,
    philox,
    use_backend,
)

GIB = 2**30
one_at_a_time = pytest.mark.usefixtures("much_of_the_memory")


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    require_backend("noise_inject", request.param, "cuda")
    with use_backend(request.param):
        yield request.param


def assert_all_equal(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> None:
    for x, y in zip(one, other, strict=True):
        assert torch.equal(x, y)


def test_a_key_is_made_without_waiting_for_the_gpu():
    torch.cuda.set_sync_debug_mode("error")
    try:
        key = philox.make_key(2**63 + 5, 7, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(key.cpu(), torch.tensor([5 - 2**63, 7]))


def test_a_number_is_on_the_host_before_what_was_queued_after_it_is_done():
    on_its_way = ToHost(torch.full((), 3.0, device="cuda"))
    torch.cuda._sleep(2 * 10**9)  # cycles: about a second
    assert on_its_way.wait() == 3.0 and not torch.cuda.current_stream().query()


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


def require_memory(gib: float) -> None:
    torch.cuda.empty_cache()  # what earlier tests of this process gave back
    free = torch.cuda.mem_get_info()[0] / GIB
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, there are {free:.0f}")


@one_at_a_time
@pytest.mark.parametrize("patch_size", [None, 2])
def test_noise_inject_beyond_int32(backend, patch_size):
    """More than 2^31 elements in all: the last samples equal those of a small batch."""
    require_memory(60)
    shape = (2**16 + 3, 32, 32, 32)
    mean = torch.zeros(shape, dtype=torch.bfloat16, device="cuda").requires_grad_()
    spread = torch.zeros_like(mean).requires_grad_()
    rest = torch.zeros(32, device="cuda"), torch.ones(32, device="cuda"), philox.make_key(1, 2, "cuda")
    ids = torch.arange(shape[0], device="cuda")
    out = noise_inject(mean, spread, *rest, ids, patch_size=patch_size)
    grad_mean, grad_spread = torch.autograd.grad(out.z_t, (mean, spread), torch.ones_like(out.z_t))
    few_mean, few_spread = (x[-3:].detach().requires_grad_() for x in (mean, spread))
    few = noise_inject(few_mean, few_spread, *rest, ids[-3:], patch_size=patch_size)
    few_grads = torch.autograd.grad(few.z_t, (few_mean, few_spread), torch.ones_like(few.z_t))
    assert_all_equal(tuple(x[-3:] for x in (*out, grad_mean, grad_spread)), (*few, *few_grads))


@one_at_a_time
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


def test_means_of_calls_side_by_side(backend):
    """On streams of their own and in graphs replayed beside them: no call counts another's blocks."""
    pairs = [torch.randn(2, 3001, 40, generator=torch.Generator().manual_seed(i)).cuda() for i in range(4)]
    expected = [cosine_align(*pair, reduction="none").double().mean() for pair in pairs]
    streams, graphs, means = [torch.cuda.Stream() for _ in pairs], [], []
    for pair in pairs:
        graphs.append(torch.cuda.CUDAGraph())
        cosine_align(*pair)  # Triton compiles at a first call
        with torch.cuda.graph(graphs[-1]):
            means.append(cosine_align(*pair))
    torch.cuda.synchronize()
    queued = [[] for _ in pairs]
    for _ in range(200):
        for pair, stream, graph, found in zip(pairs, streams, graphs, queued, strict=True):
            with torch.cuda.stream(stream):
                found.append(cosine_align(*pair))
                graph.replay()
    torch.cuda.synchronize()
    for mean, found, wanted in zip(means, queued, expected, strict=True):
        assert all(torch.equal(mean, other) for other in found)
        torch.testing.assert_close(mean.double(), wanted, rtol=2e-7, atol=0)


@one_at_a_time
def test_global_norm_beyond_int32():
    require_backend("global_norm", "cuda", "cuda")
    require_memory(10)
    x = torch.zeros(2**31 + 9, dtype=torch.bfloat16, device="cuda")
    x[0], x[-1] = 3.0, 4.0
    assert global_norm([x]) == 5.0


@one_at_a_time
def test_adamw_ema_beyond_int32():
    """The last elements of a tensor of more than 2^31 are updated as they are alone."""
    require_backend("adamw_ema", "cuda", "cuda")
    require_memory(50)

    def update(tensors: list[torch.Tensor]) -> None:
        step = torch.tensor(4, device="cuda")
        adamw_ema_(*([x] for x in tensors), [step], **SETTINGS, ema_decay=0.9)

    many = [torch.ones(2**31 + 9, device="cuda") for _ in range(5)]
    few = [torch.rand(13, device="cuda") for _ in many]
    for x, values in zip(many, few, strict=True):
        x[-13:] = values
    update(many)
    update(few)
    assert_all_equal(tuple(x[-13:] for x in many), tuple(few))
    first = [x[:1].clone() for x in many]
    assert_all_equal(tuple(x[-14:-13] for x in many), tuple(first))
    assert first[0] < 1


@one_at_a_time
def test_group_norm_silu_beyond_int32(backend):
    """More than 2^31 elements, in a batch and in one sample: the last sample, and the end of the map, are right."""
    require_memory(40)
    weight, bias = torch.rand(64, device="cuda") + 0.5, torch.randn(64, device="cuda")
    batch = torch.zeros((33, 64, 1024, 1024), dtype=torch.bfloat16, device="cuda")
    batch = batch.to(memory_format=torch.channels_last)
    batch[-1] = torch.randn((64, 1024, 1024), device="cuda")
    y, alone = (group_norm_silu(x, weight, bias, 4) for x in (batch, batch[-1:]))
    assert torch.equal(y[-1:], alone)
    del y
    tall = batch.permute(0, 2, 3, 1).reshape(1, 33 * 1024, 1024, 64).permute(0, 3, 1, 2).requires_grad_()
    y = group_norm_silu(tall, weight, bias, 4)
    (grad,) = torch.autograd.grad(y, tall, torch.ones_like(y))
    end = tall[:, :, -2:].detach().double()
    # All but one in 33 pixels are 0: the moments of the map from those of its end.
    filled = batch[-1].double().reshape(4, -1)
    mean = filled.mean(1) / 33
    std = (filled.square().mean(1) / 33 - mean.square() + 1e-6).sqrt()
    mean, std = (x.repeat_interleave(16).view(1, -1, 1, 1) for x in (mean, std))
    z = (end - mean) / std * weight.double().view(1, -1, 1, 1) + bias.double().view(1, -1, 1, 1)
    torch.testing.assert_close(y[:, :, -2:].double(), z * z.sigmoid(), rtol=1e-2, atol=1e-2)
    assert grad[:, :, -2:].isfinite().all() and grad[:, :, -2:].any()


def test_group_norm_silu_large_mean(backend):
    """The bound of tests/ops/test_group_norm_silu.py, with many tiles."""
    x = (1e4 + torch.randn((2, 64, 128, 128), device="cuda")).to(memory_format=torch.channels_last)
    weight, bias = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")
    y = group_norm_silu(x, weight, bias, 4, silu=False)
    truth = group_norm_silu_reference(x.double(), weight, bias, 4, silu=False)
    eps = torch.finfo(torch.float32).eps
    assert (y.double() - truth).abs().max().item() <= eps * 1e4 + 8 * eps * truth.abs().max().item()


@one_at_a_time
def test_adaln_beyond_int32(backend):
    """More than 2^31 elements in all: the last samples are those of a small batch, but for the chunks of their sums."""
    require_memory(60)
    x = torch.ones(2**15 + 3, 64, 1032, dtype=torch.bfloat16, device="cuda")
    x[-3:] = torch.randn(3, 64, 1032)
    modulation = torch.randn(2**15 + 3, 3 * 1032, dtype=torch.bfloat16, device="cuda").requires_grad_()
    x.requires_grad_()

    def run(x, modulation):
        shift, scale, gate = modulation.chunk(3, dim=1)
        y, s = adaln(x, shift, scale, branch=x, gate=gate)
        return y, s, *torch.autograd.grad(y, (x, modulation), torch.ones_like(y))

    few = run(*(t[-3:].detach().requires_grad_() for t in (x, modulation)))
    for whole, part in zip(run(x, modulation), few, strict=True):
        torch.testing.assert_close(whole[-3:], part, rtol=2e-2, atol=2e-2)
