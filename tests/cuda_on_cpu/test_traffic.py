"""What the kernels' comments say of the memory that they move, by counting instead of timing.

A GPU moves whole sectors of 32 bytes: a warp that reads 512 bytes in one piece moves 16 of them, at a stride up to 128.
What is counted is what leaves the warps; caches may still save some of it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from cuda_on_cpu import build
from cuda_on_cpu.chosen import dtypes_of
from cuda_on_cpu.dtypes import with_dtypes
from cuda_on_cpu.runner import Counts, Runner

SECTOR = 32
FLOAT32 = "torch.float32"

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Claim:
    """Of tensors of so many bytes the kernel reads and writes so many, each byte once."""

    kernel: str
    tensor_bytes: int
    reads: int
    writes: int


@dataclass(frozen=True)
class Case:
    op: str
    case: str
    dtype: str
    claims: tuple[Claim, ...]


CASES = [
    Case(
        "adaln", "4x64x384-contiguous-chunk", "bfloat16",
        (
            Claim("forward_kernel<BFloat16, BFloat16, 3>", 4 * 64 * 384 * 2, 2, 2),
            Claim("backward_kernel<BFloat16, BFloat16, 1>", 4 * 64 * 384 * 2, 4, 2),
        ),
    ),
    Case(
        "cosine_align", "2x9x256-contiguous-none", "bfloat16",
        (
            Claim("forward_kernel<BFloat16, true>", 2 * 9 * 256 * 2, 2, 0),
            Claim("backward_kernel<BFloat16, true>", 2 * 9 * 256 * 2, 2, 2),
        ),
    ),
    # What a small map's kernels read again comes from a cache.
    Case(
        "group_norm_silu", "2x128x16x17-32groups-channels_last", "bfloat16",
        (
            Claim("whole_forward_kernel<BFloat16, true, true>", 2 * 128 * 272 * 2, 2, 1),
            Claim("whole_backward_kernel<BFloat16, true, true>", 2 * 128 * 272 * 2, 4, 1),
        ),
    ),
    Case(
        "group_norm_silu", "2x640x5x6-2groups-channels_last", "bfloat16",
        (
            Claim("moments_kernel<BFloat16, false, true>", 2 * 640 * 30 * 2, 1, 0),
            Claim("output_kernel<BFloat16, true, true>", 2 * 640 * 30 * 2, 1, 1),
            Claim("parameter_grads_kernel<BFloat16, true, true>", 2 * 640 * 30 * 2, 2, 0),
            Claim("input_grad_kernel<BFloat16, true, true>", 2 * 640 * 30 * 2, 2, 1),
        ),
    ),
    Case(
        "group_norm_silu", "1x640x9x8-2groups-channels_last-residual-norm", "bfloat16",
        (
            Claim("moments_kernel<BFloat16, true, true>", 640 * 72 * 2, 2, 1),
            Claim("output_kernel<BFloat16, false, true>", 640 * 72 * 2, 1, 1),
            Claim("parameter_grads_kernel<BFloat16, false, true>", 640 * 72 * 2, 2, 0),
            Claim("input_grad_kernel<BFloat16, false, true>", 640 * 72 * 2, 3, 1),
        ),
    ),
    Case(
        "noise_inject", "1x4x16x16-contiguous", "bfloat16",
        (
            Claim("forward_kernel<BFloat16, (Access)1>", 4 * 256 * 2, 2, 3),
            Claim("backward_kernel<BFloat16, (Access)1>", 4 * 256 * 2, 4, 2),
        ),
    ),
    Case(
        "noise_inject", "1x32x16x16-contiguous-patch1", "bfloat16",
        (
            Claim("forward_kernel<BFloat16, (Access)2>", 32 * 256 * 2, 2, 3),
            Claim("backward_kernel<BFloat16, (Access)2>", 32 * 256 * 2, 4, 2),
        ),
    ),
    Case(
        "adamw_ema", "16384-0-3-contiguous-ema-norm_1.0_0.5", "float32",
        (Claim("update_kernel<float, true>", 16384 * 4, 5, 4),),
    ),
    Case(
        "adamw_ema", "16384-0-3-contiguous-ema-norm_1.0_0.5", "bfloat16",
        (
            Claim("update_kernel<BFloat16, true>", 16384 * 4, 4, 4),
            Claim("update_kernel<BFloat16, true>", 16384 * 2, 1, 0),
        ),
    ),
    Case("global_norm", "65536-0-3-contiguous-1", "float32", (Claim("chunk_kernel<float>", 65536 * 4, 1, 0),)),
]  # fmt: skip


def counts_of(runner: Runner, case: Case, read: Callable[[str], str] | None = None) -> dict[str, Counts]:
    """What the case's kernels do; without `read` of the library that test_kernels.py has built."""
    library = build.op_library(case.op, "checked", read or with_dtypes(dtypes_of(case.op)))
    dtypes = [f"torch.{case.dtype}"]
    outcome = runner.run(case.op, library, cases=[case.case], dtypes=dtypes, raw_calls=False, count=True)
    assert not outcome.failures
    return outcome.counts


def coalescing(counts: Counts, claim: Claim) -> float:
    """The share of the bytes in the sectors moved of tensors of the claim's size that the warps use."""
    streams = [counts.streams[key] for key in counts.streams if key[0] == claim.tensor_bytes]
    return sum(stream.bytes for stream in streams) / (SECTOR * sum(stream.sectors for stream in streams))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.case}-{case.dtype}")
def test_each_byte_is_moved_once_in_whole_sectors(runner, case):
    all_counts = counts_of(runner, case)
    for claim in case.claims:
        counts = all_counts[claim.kernel]
        assert coalescing(counts, claim) > 0.95, claim
        for is_write, times in ((False, claim.reads), (True, claim.writes)):
            stream = counts.streams.get((claim.tensor_bytes, is_write))
            moved = SECTOR * stream.sectors / counts.launches if stream else 0.0
            assert times * claim.tensor_bytes <= moved <= 1.05 * times * claim.tensor_bytes, (claim, is_write)
    assert all(counts.bank_conflicts == 0 for counts in all_counts.values())


def test_counts_of_a_known_kernel(runner):
    """cosine_align's forward: a warp a row, three sums by five shuffles each."""
    case = next(case for case in CASES if case.op == "cosine_align")
    counts = counts_of(runner, case)["forward_kernel<BFloat16, true>"]
    rows = 2 * 9
    assert counts.launches == 8, "so many are needed for 128 distances"
    assert counts.shuffles == counts.launches * rows * 3 * 5
    assert counts.barriers == counts.shared_accesses == 0
    stream = counts.streams[rows * 256 * 2, False]
    assert stream.accesses == counts.launches * rows * 2, "256 elements are one vector for each lane, of two tensors"
    assert stream.sectors == stream.accesses * 512 // SECTOR


def test_strided_accesses_and_bank_conflicts_are_noticed(runner):
    def strided(path: str) -> str:  # each lane takes neighbouring vectors
        text = build.read_source(path).replace("kBatch = 4", "kBatch = 2")
        return text.replace("i * kStep", "(threadIdx.x % kWarp + i) * 4")

    case = Case("cosine_align", "2x9x256-contiguous-none", "float32", ())
    counts = counts_of(runner, case, with_dtypes((FLOAT32,), strided))["forward_kernel<float, true>"]
    assert coalescing(counts, Claim("", 2 * 9 * 256 * 4, 2, 0)) == 0.5

    def unpadded(path: str) -> str:  # neighbours read other channels of one column
        return build.read_source(path).replace("[kMaxThreads + kWarp / kWidth]", "[kMaxThreads]")

    shape = next(case.case for case in CASES if case.op == "group_norm_silu")
    counts = counts_of(runner, Case("group_norm_silu", shape, "float32", ()), with_dtypes((FLOAT32,), unpadded))
    assert counts["whole_forward_kernel<float, true, true>"].bank_conflicts > 0
