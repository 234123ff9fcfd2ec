"""Every attention library that this GPU and environment have, against float64 truth; the choice on a GPU."""

import pytest
import torch
from op_cases.attention import CASES, check

from sendvae_fast.errors import UserError
from sendvae_fast.ops import (
    AttentionShape,
    attention,
    attention_reference,
    available_attention,
    tune_attention,
    use_attention,
)
from sendvae_fast.ops.attention import table as attention_table
from sendvae_fast.ops.attention.backends import BACKENDS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def require(name: str) -> None:
    reason = available_attention("cuda")[name]
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SENDVAE_ATTENTION", raising=False)
    attention_table.choices.cache_clear()
    yield
    attention_table.choices.cache_clear()


def inputs(shape, dtype=torch.bfloat16):
    return [torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_close_to_truth(case, backend, dtype):
    require(backend)
    try:
        check(case, dtype, backend, "cuda")
    except UserError as error:  # a head dim or a dtype that the library has no kernel for
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("head_dim", "heads", "backends"), [(64, 12, ("cudnn", "flash", "efficient")), (72, 16, ("flash", "efficient"))]
)
def test_the_kernels_of_sit_run(head_dim, heads, backends):
    """That the matrix above skips nothing that matters: these PyTorch has on every GPU from Ampere on."""
    for name in backends:
        require(name)
        with use_attention(name):
            q, k, v = inputs((2, heads, 256, head_dim))
            torch.autograd.grad(attention(q, k, v).sum(), (q, k, v))


@pytest.mark.parametrize("training", [False, True])
def test_tuning_and_what_follows(training):
    shapes = [
        AttentionShape(8, 16, 256, 72, torch.bfloat16, training),
        AttentionShape(4, 1, 256, 512, torch.bfloat16, training),
    ]  # fmt: skip
    for measurement in tune_attention(shapes):
        assert measurement.times_us, measurement.failures
        assert not any(reason.startswith("wrong result") for reason in measurement.failures.values()), measurement
        shape = measurement.shape
        q, k, v = inputs((shape.batch, shape.heads, shape.tokens, shape.head_dim))
        with torch.set_grad_enabled(training):
            out = attention(q, k, v)
        torch.testing.assert_close(out, attention_reference(q, k, v), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic):
    shape = AttentionShape(8, 16, 256, 72, torch.bfloat16, True)
    tune_attention([shape])
    torch._dynamo.reset()
    q, k, v = inputs((8, 16, 256, 72))
    out = torch.compile(attention, fullgraph=True, dynamic=dynamic)(q, k, v)
    grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    expected = attention_reference(q, k, v)
    expected_grads = torch.autograd.grad(expected.float().square().sum(), (q, k, v))
    for one, other in zip((out, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_cuda_graph():
    """The choice reads nothing from the device, so it can be captured, with a table or without."""
    tune_attention([AttentionShape(8, 16, 256, 72, torch.bfloat16, False)])
    q, k, v = (x.detach() for x in inputs((8, 16, 256, 72)))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            attention(q, k, v)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v)
    new = [torch.randn_like(x) for x in (q, k, v)]
    for x, y in zip((q, k, v), new, strict=True):
        x.copy_(y)
    graph.replay()
    assert torch.equal(out, attention(*new))
