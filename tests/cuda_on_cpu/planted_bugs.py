"""Bugs that are planted into the kernels one at a time, and what must notice each.

They show in what the checks of a "checked" build say, whatever the results, or in the results ("error"), which for a
"plain" build are all there is, in the order of threads that is named. They are built for float32 alone, which takes a
third of the time. `make test` plants one bug for everything that can be noticed, in a kernel that compiles fast;
`make cuda-on-cpu` plants all.
"""

from collections.abc import Callable
from dataclasses import dataclass

from cuda_on_cpu.dtypes import with_dtypes

GROUP_NORM = "csrc/group_norm_silu/tiles.cuh"
GROUP_NORM_BACKWARD = "csrc/group_norm_silu/group_norm_silu_backward_cuda.cu"
COSINE = "csrc/cosine_align/cosine_align_cuda.cu"
COMMON = "csrc/common/cuda.cuh"
LAST_BLOCK = "csrc/common/last_block.cuh"
WHOLE_VECTORS = "csrc/common/whole_vectors.cuh"
ADALN_FORWARD = "csrc/adaln/adaln_forward_cuda.cu"
ADALN_BACKWARD = "csrc/adaln/adaln_backward_cuda.cu"
NOISE = "csrc/noise_inject/noise_inject_cuda.cu"
NORM = "csrc/global_norm/global_norm_cuda.cu"
ADAMW = "csrc/adamw_ema/adamw_ema_cuda.cu"

COSINE_MEAN = "2x9x96-contiguous-chunk-mean-margin0.5"  # three blocks

DTYPE = "torch.float32"


@dataclass(frozen=True)
class Bug:
    """`old` becomes `new` in `file`; then `kind` of build, run in `order`, fails `case` of `op` with `says`."""

    name: str
    op: str
    case: str
    file: str
    old: str
    new: str
    says: str
    kind: str = "checked"
    order: str = "forward"
    is_one_more: bool = False
    """Whether another bug of the list is noticed by the same part of the runtime; then `make test` leaves it out."""

    def read(self, read: Callable[[str], str]) -> Callable[[str], str]:
        """`read` of a source, with the bug."""

        def changed(path: str) -> str:
            text = read(path)
            if path != self.file:
                return text
            if self.old not in text:
                raise ValueError(f"{self.name}: {path} no longer has {self.old!r}")
            return text.replace(self.old, self.new)

        return with_dtypes((DTYPE,), changed)


BUGS = [
    # Barriers
    Bug(
        "no_barrier_before_the_next_exchange", "group_norm_silu", "3x6x5x7-2groups-contiguous-residual", GROUP_NORM,
        "if (number > 0) __syncthreads();", "",
        "races in shared memory", is_one_more=True,
    ),
    Bug(
        "no_barrier_in_the_tree", "group_norm_silu", "3x6x5x7-2groups-contiguous-residual", GROUP_NORM_BACKWARD,
        "    __syncthreads();\n  }\n  SENDVAE_UNROLL", "  }\n  SENDVAE_UNROLL",
        "races in shared memory", is_one_more=True,
    ),
    Bug(
        "no_barrier_before_the_channels_are_read", "group_norm_silu", "2x33x9x4-1groups-channels_last-norm", GROUP_NORM,
        "+ threadIdx.x] = floats[f];\n  }\n  __syncthreads();", "+ threadIdx.x] = floats[f];\n  }",
        "undefined shared memory", is_one_more=True,
    ),
    Bug(
        "one_buffer_in_place_of_two", "adaln", "5x31x96-contiguous-chunk", ADALN_BACKWARD,
        "buffer ^= 1", "buffer ^= 0",
        "races in shared memory", is_one_more=True,
    ),
    Bug(
        "no_barrier_for_the_sums_of_warps", "adaln", "4x64x384-contiguous-chunk", ADALN_BACKWARD,
        "= of_warp;\n  __syncthreads();", "= of_warp;",
        "undefined shared memory|races in shared memory", is_one_more=True,
    ),
    Bug(
        "no_barrier_after_the_key", "noise_inject", "2x7x1x13-chunk-channels_last", NOISE,
        "shared_t;\n  }\n  __syncthreads();", "shared_t;\n  }",
        "races in shared memory",
    ),
    Bug(
        "no_barrier_after_the_key", "noise_inject", "2x7x1x13-chunk-channels_last", NOISE,
        "shared_t;\n  }\n  __syncthreads();", "shared_t;\n  }",
        "NaN in other places|error", kind="plain", order="random:1", is_one_more=True,
    ),
    Bug(
        "no_barrier_in_block_sum", "global_norm", "31-33x3-contiguous-1", COMMON,
        "warp_sums[warp] = value;\n  __syncthreads();", "warp_sums[warp] = value;",
        "undefined shared memory", is_one_more=True,
    ),
    Bug(
        "two_barriers_where_one_must_be", "global_norm", "31-33x3-contiguous-1", COMMON,
        "  __syncthreads();\n  return warp == 0",
        "  if (warp == 0) __syncthreads();\n  if (warp != 0) __syncthreads(); return warp == 0",
        "wait at different barriers",
    ),
    # Bounds, alignment and what a kernel may write
    Bug(
        "one_pixel_too_many", "group_norm_silu", "2x33x9x4-1groups-channels_last-norm", GROUP_NORM,
        "(pixels - row + kWidth - 1) / kWidth", "(pixels - row + kWidth) / kWidth",
        "reads .* out of bounds, .* behind the end", is_one_more=True,
    ),
    Bug(
        "always_aligned", "cosine_align", "3x5x64-offset-none", COMMON,
        "return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % kVectorWidth<T> == 0;", "return true;",
        "misaligned access", is_one_more=True,
    ),
    Bug(
        "the_tail_of_a_row_read_whole", "cosine_align", "3x5x66-padded-none", WHOLE_VECTORS,
        " && width % kVectorWidth<T> == 0;", ";",
        "reads .* out of bounds, between the elements",
    ),
    Bug(
        "no_end_of_rows", "cosine_align", "7x3-contiguous-none", COSINE,
        "if (row >= args.rows) return;", "",
        "reads .* out of bounds, .* behind the end", is_one_more=True,
    ),
    Bug(
        "the_end_of_a_chunk_not_cut", "adamw_ema", "33-65-contiguous-ema-norm_1.0_2.0", "csrc/common/chunk_table.h",
        "end < size ? end : size", "end",
        "out of bounds", is_one_more=True,
    ),
    Bug(
        "a_local_array_overrun", "cosine_align", "7x3-contiguous-none", COSINE,
        "for (int j = 0; j < kVectorWidth<T>; ++j) {\n        dot",
        "for (int j = 0; j <= args.width + kVectorWidth<T>; ++j) {\n        dot",
        "index is out of the bounds of its array", is_one_more=True,
    ),
    Bug(
        "an_input_written", "adamw_ema", "33-65-contiguous-ema-norm_1.0_2.0", ADAMW,
        "store<kWhole>(entry.exp_avg + i, count, exp_avg);",
        "store<kWhole>(const_cast<float*>(reinterpret_cast<const float*>(entry.grad)) + i, count, exp_avg);",
        "writes an input",
    ),
    Bug(
        "what_the_kernel_writes_read_by_ldg", "adaln", "5x31x96-contiguous-chunk", ADALN_FORWARD,
        "store<kWhole>(out, count, y);", "store<kWhole>(out, count, y); load<kWhole>(out, count, y);",
        "reads by __ldg what this kernel writes", is_one_more=True,
    ),
    # Blocks and launches
    Bug(
        "blocks_share_their_partial_sums", "adaln", "5x31x96-contiguous-chunk", ADALN_BACKWARD,
        "static_cast<int64_t>(blockIdx.x) * kPartials * args.width + column",
        "static_cast<int64_t>(blockIdx.x) * 2 * args.width + column",
        "races in global memory", is_one_more=True,
    ),
    Bug(
        "no_fence_before_a_block_counts_itself", "cosine_align", COSINE_MEAN, LAST_BLOCK,
        "    __threadfence();\n    uint32_t*", "    uint32_t*",
        "races in global memory: it reads what thread 0 of block",
    ),
    Bug(
        "no_fence_after_a_block_counted_itself", "cosine_align", COSINE_MEAN, LAST_BLOCK,
        "if (is_last) __threadfence();", "",
        "races in global memory: it reads what thread 0 of block", is_one_more=True,
    ),
    Bug(
        "no_barrier_after_a_block_counted_itself", "cosine_align", COSINE_MEAN, LAST_BLOCK,
        "__threadfence();\n  }\n  __syncthreads();", "__threadfence();\n  }",
        "undefined shared memory|races in shared memory", is_one_more=True,
    ),
    Bug(
        "a_counter_that_is_not_set_back", "cosine_align", COSINE_MEAN, LAST_BLOCK,
        "gridDim.x - 1) == gridDim.x - 1", "gridDim.x) == gridDim.x - 1",
        "NaN in other places|error", kind="plain", is_one_more=True,
    ),
    Bug(
        "any_block_makes_the_mean", "cosine_align", COSINE_MEAN, LAST_BLOCK,
        "  return is_last;", "  return true;",
        "undefined global memory|races in global memory", is_one_more=True,
    ),
    Bug(
        "twice_the_threads", "cosine_align", "7x3-contiguous-none", COSINE,
        "<<<blocks, kThreads,", "<<<blocks, 2 * kThreads,",
        "launched with 512 threads, __launch_bounds__ allows 256", is_one_more=True,
    ),
    Bug(
        "no_block_at_all", "cosine_align", "7x3-contiguous-none", COSINE,
        "(rows + kRowsPerBlock - 1) / kRowsPerBlock", "rows / (2 * rows)",
        "invalid launch",
    ),
    Bug(
        "more_shared_memory_than_there_is", "global_norm", "31-33x3-contiguous-1", COMMON,
        "__shared__ T warp_sums[kWarps];", "__shared__ T warp_sums[kWarps * 1024];",
        "more than 49152 bytes of shared memory", is_one_more=True,
    ),
    # Warps
    Bug(
        "half_of_the_warp_not_summed", "cosine_align", "2x9x128-chunk-offset-none", COMMON,
        "int offset = 16;", "int offset = 8;",
        "error",
    ),
    Bug(
        "a_lane_absent_from_a_shuffle", "cosine_align", "7x3-contiguous-none", COSINE,
        "if (row < args.rows) {", "if (row < args.rows && threadIdx.x % kWarp != 31) {",
        "lane 31 of warp 0 is in the mask ffffffff of the shuffle but has ended",
    ),
]  # fmt: skip
