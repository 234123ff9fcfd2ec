"""The CUDA kernels run on the CPU: right results in any order of threads, nothing for the checks to find.

`make test` runs chosen cases and plants chosen bugs, `make planted-bugs` plants all, `make cuda-on-cpu` runs all cases
too, in more orders.
"""

import re

import pytest
from everything import EVERYTHING
from op_cases import ALL as OP_TESTS

from cuda_on_cpu import build
from cuda_on_cpu.chosen import CHOSEN, dtypes_of
from cuda_on_cpu.dtypes import with_dtypes
from cuda_on_cpu.planted_bugs import BUGS, COSINE_MEAN, DTYPE, LAST_BLOCK, Bug
from sendvae_fast.ops import dispatch

RUNS = [("checked", "random:1")]
MORE_RUNS = [("plain", "forward"), ("plain", "random:2"), ("plain", "random:3"), ("checked", "forward")]
PLANTED = [bug for bug in BUGS if EVERYTHING or not bug.is_one_more]

pytestmark = pytest.mark.slow


def test_what_the_compiler_does_not_know_is_an_error_with_file_and_line(compiler):
    def read(path: str) -> str:
        return build.read_source(path).replace("warp_sum(dot)", "rcbrtf(warp_sum(dot))")

    with pytest.raises(build.BuildError, match=r"csrc/cosine_align/cosine_align_cuda\.cu:\d+:\d+: error: .*rcbrtf"):
        build.op_library("cosine_align", "checked", read)


def test_every_op_with_cuda_kernels_is_here():
    with_cuda = {op for op, backends in dispatch.OPS.items() if "cuda" in backends}
    assert set(build.ops()) == with_cuda == CHOSEN.keys()
    names = {tests.op: {str(case) for case in tests.cases} for tests in OP_TESTS}
    assert not {op: missing for op, chosen in CHOSEN.items() if (missing := set(chosen) - names[op])}


@pytest.mark.parametrize(("kind", "order"), RUNS + MORE_RUNS * EVERYTHING)
@pytest.mark.parametrize("op", build.ops())
def test_right_and_clean(runner, op, kind, order):
    if EVERYTHING:
        outcome = runner.run(op, build.op_library(op, kind), order, seconds=7200)
    else:
        library = build.op_library(op, kind, with_dtypes(dtypes_of(op)))
        outcome = runner.run(op, library, order, cases=CHOSEN[op], dtypes=dtypes_of(op))
    assert not outcome.failures, "\n".join(outcome.failures)
    assert outcome.num_calls > 0
    assert not outcome.unused, "no case runs these kernels"


def test_a_mean_is_right_where_all_counters_are_taken(runner):
    """The launch clears one of its own then."""

    def read(path: str) -> str:
        text = build.read_source(path)
        assert path != LAST_BLOCK or "kNumCounters = 65536" in text
        return text.replace("kNumCounters = 65536", "kNumCounters = 0")

    library = build.op_library("cosine_align", "checked", with_dtypes((DTYPE,), read))
    outcome = runner.run("cosine_align", library, cases=[COSINE_MEAN], dtypes=[DTYPE], raw_calls=False)
    assert outcome.num_calls == 1 and not outcome.failures


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: f"{bug.name}-{bug.kind}")
def test_planted_bug_is_noticed(runner, bug: Bug):
    library = build.op_library(bug.op, bug.kind, bug.read(build.read_source))
    outcome = runner.run(bug.op, library, bug.order, cases=[bug.case], dtypes=[DTYPE], raw_calls=False)
    assert outcome.num_calls == 1
    assert outcome.failures and re.search(bug.says, outcome.failures[0]), outcome.failures
