"""What holds for every op on the CPU, compiled and in Triton's interpreter. Cases and truth are in tests/op_cases."""

import pytest
import torch
from everything import EVERYTHING, in_turn
from op_cases import ALL
from op_cases.common import OpTests, require_backend

from sendvae_fast.ops import dispatch, use_backend
from sendvae_fast.ops.registration import op_of

pytestmark = pytest.mark.slow

BACKENDS = ("cpu", "triton")
OPCHECKS = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
OPS_AND_BACKENDS = [(tests, backend) for tests in ALL for backend in BACKENDS if backend in dispatch.OPS[tests.op]]


def of(backend: str) -> list:
    """(tests, case, dtype) of every op with this backend, as parameters with readable names.

    The dtypes take turns from case to case; in Triton's interpreter, which takes a second for every few programs, the
    cases are fewer.
    """
    return [
        pytest.param(tests, case, dtype, id=f"{tests.op}-{case}-{dtype}")
        for tests, its_backend in OPS_AND_BACKENDS if its_backend == backend
        for number, case in enumerate(tests.few_cases if backend == "triton" else tests.cases)
        for dtype in in_turn(tests.dtypes, number)
    ]  # fmt: skip


@pytest.fixture(params=OPS_AND_BACKENDS, ids=lambda pair: f"{pair[0].op}-{pair[1]}")
def op_and_backend(request):
    tests, backend = request.param
    require_backend(tests.op, backend)
    with use_backend(backend):
        yield tests, backend


def test_every_op_is_here():
    assert {tests.op for tests in ALL} == set(dispatch.OPS)


@pytest.mark.parametrize("tests", ALL, ids=lambda tests: tests.op)
def test_enough_shapes(tests):
    assert len(tests.cases) >= 20


@pytest.mark.parametrize(("tests", "case", "dtype"), of("cpu"))
def test_cpu_close_to_truth(tests: OpTests, case, dtype):
    require_backend(tests.op, "cpu")
    tests.check(case, dtype, "cpu", "cpu")


@pytest.mark.parametrize(("tests", "case", "dtype"), of("triton"))
def test_triton_close_to_truth(tests: OpTests, case, dtype):
    require_backend(tests.op, "triton")
    tests.check(case, dtype, "triton", "cpu")


def test_repeats_bit_for_bit(op_and_backend):
    tests, backend = op_and_backend
    if backend == "triton":
        pytest.skip("the interpreter runs one program after another: a GPU can differ, see tests/gpu")
    one, other = (tests.example(0, torch.float32, "cpu").run() for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_threads_change_nothing(op_and_backend):
    tests, backend = op_and_backend
    if backend == "triton":
        pytest.skip("the interpreter has one thread")
    threads = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            results.append(tests.example(0, torch.float32, "cpu").run())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


TRACED = "aot_eager_decomp_partition_crossref"
"""Traces as for Inductor, then compares each call of an op with what its fake promised: number, shape, dtype, strides.
Inductor stumbles over few of the wrong ones."""
WRITES = "adamw_ema"
"""Writes into the tensors it is given, and returns none that could be compared."""
BY_INDUCTOR = ("cosine_align", WRITES)
"""What `make test` compiles, which takes seconds: of ops that return new tensors one will do."""


@pytest.mark.parametrize("dtype", in_turn((torch.bfloat16, torch.float32), 0), ids=str)
def test_compiles_into_one_graph(op_and_backend, dtype):
    """In bfloat16, where a fake of another dtype than the op's shows; test_opcheck traces each op in float32."""
    tests, backend = op_and_backend
    if backend == "triton" and tests.op != "cosine_align":
        pytest.skip("both namespaces are registered in one place, test_opcheck traces each op, the interpreter is slow")
    example = tests.example(0, dtype, "cpu")
    eager = example.run()
    # The compiler may round what surrounds the op in other places.
    tolerance = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=3e-2, atol=3e-2)
    compilers = [TRACED] * (tests.op != WRITES) + ["inductor"] * (EVERYTHING or tests.op in BY_INDUCTOR)
    for compiler in compilers:
        torch._dynamo.reset()
        compiled = example.run(torch.compile(example.function, fullgraph=True, backend=compiler))
        for x, y in zip(compiled, eager, strict=True):
            assert x.dtype == y.dtype
            torch.testing.assert_close(x, y, **tolerance)


def test_opcheck(op_and_backend):
    """Tracing a gradient takes most of the time in the interpreter, and is registered for both namespaces in one place:
    of Triton's it is tried on one op, on all by `make triton-build`.
    """
    tests, backend = op_and_backend
    checks = OPCHECKS
    if backend == "triton" and tests.op != "cosine_align" and not EVERYTHING:
        checks = [check for check in OPCHECKS if check != "test_aot_dispatch_dynamic"]
    for name, arguments in tests.raw_calls(backend, "cpu"):
        torch.library.opcheck(op_of(name, backend), arguments, test_utils=checks)
