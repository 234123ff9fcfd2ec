"""The Triton and CUDA backends of every op on a GPU: the matrix of the CPU tests, and what only a GPU has."""

import pytest
import torch
from op_cases import ALL
from op_cases.common import Example, OpTests, by_turns, require_backend

from sendvae_fast.ops import dispatch, use_backend
from sendvae_fast.ops.registration import op_of

OPS_AND_BACKENDS = [
    (tests, backend) for tests in ALL for backend in ("triton", "cuda") if backend in dispatch.OPS[tests.op]
]
MATRIX = [
    pytest.param(tests, backend, case, dtype, id=f"{tests.op}-{backend}-{case}-{dtype}")
    for tests, backend in OPS_AND_BACKENDS
    # Triton compiles nearly every case anew: those that its interpreter runs on a CPU, and half precisions by turns.
    for number, case in enumerate(tests.few_cases if backend == "triton" else tests.cases)
    for dtype in (by_turns(tests.dtypes, number) if backend == "triton" else tests.dtypes)
]  # fmt: skip


@pytest.fixture(params=OPS_AND_BACKENDS, ids=lambda pair: f"{pair[0].op}-{pair[1]}")
def op_and_backend(request):
    tests, backend = request.param
    require_backend(tests.op, backend, "cuda")
    with use_backend(backend):
        yield tests, backend


def assert_all_equal(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> None:
    for x, y in zip(one, other, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(("tests", "backend", "case", "dtype"), MATRIX)
def test_close_to_truth(tests: OpTests, backend, case, dtype):
    require_backend(tests.op, backend, "cuda")
    tests.check(case, dtype, backend, "cuda")


def test_repeats_bit_for_bit(op_and_backend):
    tests, _ = op_and_backend
    assert_all_equal(*(tests.example(0, tests.dtypes[0], "cuda").run() for _ in range(2)))


def test_non_default_stream(op_and_backend):
    """The op runs on the current stream: after a long kernel there, and before a read there."""
    tests, _ = op_and_backend
    expected = tests.example(1, tests.dtypes[0], "cuda").run()
    early, late = (tests.example(number, tests.dtypes[0], "cuda") for number in (0, 1))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        early.overwrite(late)
        actual = early.run()
    stream.synchronize()
    assert_all_equal(actual, expected)


def replayed(example: Example) -> tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...]]:
    """Warm up, then capture a run; the graph and its static outputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            example.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = example.run()
    return graph, outputs


def test_cuda_graph(op_and_backend):
    """A replay computes what is in the same memory then: other values, other keys, other ids."""
    tests, _ = op_and_backend
    if tests.no_cuda_graph:
        pytest.skip(f"{tests.op} in no CUDA graph: {tests.no_cuda_graph}")
    static = tests.example(0, tests.dtypes[0], "cuda")
    graph, outputs = replayed(static)
    for number in (1, 2):
        other = tests.example(number, tests.dtypes[0], "cuda")
        expected = other.run()
        static.overwrite(other)
        graph.replay()
        torch.cuda.synchronize()
        assert_all_equal(outputs, expected)


@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.float32, True), (torch.bfloat16, False)], ids=str)
def test_compiles_into_one_graph(op_and_backend, dtype, dynamic):
    tests, _ = op_and_backend
    if dtype not in tests.dtypes:
        pytest.skip(f"{tests.op} does not take {dtype}")
    example = tests.example(0, dtype, "cuda")
    torch._dynamo.reset()
    compiled = example.run(torch.compile(example.function, fullgraph=True, dynamic=dynamic))
    tolerance = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=3e-2, atol=3e-2)
    for x, y in zip(compiled, example.run(), strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, **tolerance)


def test_opcheck(op_and_backend):
    tests, backend = op_and_backend
    for name, arguments in tests.raw_calls(backend, "cuda"):
        torch.library.opcheck(op_of(name, backend), arguments)
