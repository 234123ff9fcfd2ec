// group_norm_silu's forward on CUDA, in three launches: the channels' moments in each chunk of pixels; the groups' mean
// and rstd from them; the outputs. Maps are read twice and written once. A map of which a block can hold all pixels is
// one launch, that reads it once. A large batch and a large single map both make many blocks; how a sample is cut does
// not depend on the batch. Every sum has a fixed order, so results repeat bit for bit.
#include "group_norm_silu.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "moments.cuh"
#include "tiles.cuh"

namespace sendvae {
namespace {

// Turns rows of x into those of s, and writes them.
template <bool kAligned, typename T, int kNum>
__device__ __forceinline__ void add_residual(const GroupNormSiluArgs<T>& args, const Place<kVectorWidth<T>>& place,
                                             int64_t offset, int rows, Packed (&x)[kNum]) {
  Packed residual[kNum];
  load_rows<kAligned>(args.residual + offset, place, rows, residual);
  SENDVAE_UNROLL
  for (int row = 0; row < kNum; ++row) {
    if (row >= rows) continue;
    float values[kVectorWidth<T>], others[kVectorWidth<T>];
    unpack<T>(x[row], values);
    unpack<T>(residual[row], others);
    SENDVAE_UNROLL
    for (int i = 0; i < kVectorWidth<T>; ++i) values[i] += others[i];
    x[row] = pack<T>(values);
    store_packed<kAligned>(args.s + offset + row * place.step, place.count, x[row]);
  }
}

// The moments of the exchanged channel in the thread's chunk, from kNum pixels at a time. Forms s.
template <int kMaxThreads, int kNum, bool kResidual, bool kAligned, typename T>
__device__ __forceinline__ Moments chunk_moments(const GroupNormSiluArgs<T>& args,
                                                 const Place<kVectorWidth<T>>& place) {
  constexpr int kWidth = kVectorWidth<T>;
  // As in MomentsOfParts: distances from a thread's first pixel.
  float centres[kWidth] = {}, sums[kWidth] = {}, squares[kWidth] = {};
  bool is_first = true;
  for_batches<kNum>(place, [&](int64_t offset, int rows) {
    Packed x[kNum];
    load_rows<kAligned>(args.x + offset, place, rows, x);
    if constexpr (kResidual) add_residual<kAligned>(args, place, offset, rows, x);
    if (is_first) unpack<T>(x[0], centres);
    is_first = false;
    SENDVAE_UNROLL
    for (int row = 0; row < kNum; ++row) {
      if (row >= rows) continue;
      float values[kWidth];
      unpack<T>(x[row], values);
      SENDVAE_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        const float distance = values[i] - centres[i];
        sums[i] += distance;
        squares[i] += distance * distance;
      }
    }
  });
  const float per_row = 1.0f / static_cast<float>(max(place.rows, 1));
  float rows[2][kWidth];  // means and squares
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    const float shift = sums[i] * per_row;
    rows[0][i] = centres[i] + shift;
    rows[1][i] = squares[i] - sums[i] * shift;
  }
  exchange<kMaxThreads>(rows);
  MomentsOfParts channel(rows[0][0]);
  SENDVAE_UNROLL
  for (int row = 0; row < kWidth; ++row) {
    channel.add({static_cast<float>(place.rows_of(row)), rows[0][row], rows[1][row]});
  }
  return channel.moments();
}

__device__ __forceinline__ void write_statistics(const Moments& moments, float eps, float* mean, float* rstd) {
  *mean = moments.mean;
  *rstd = rstd_of(moments.squares / moments.count, eps);
}

// From mean and rstd of the groups.
template <bool kSilu, bool kAligned, typename T>
__device__ __forceinline__ void write_outputs(const GroupNormSiluArgs<T>& args, const Tiling& tiling,
                                              const Place<kVectorWidth<T>>& place) {
  constexpr int kWidth = kVectorWidth<T>;
  constexpr int kNum = kBatch<kAligned>;
  const T* map = args.residual ? args.s : args.x;
  Normalisation normalisation[kWidth];
  const auto of_channel = [&](uint32_t channel, int64_t group) { return normalisation_of(args, channel, group); };
  for_channels(args.shape, tiling, place, of_channel, normalisation);
  for_batches<kNum>(place, [&](int64_t offset, int rows) {
    Packed x[kNum];
    load_rows<kAligned>(map + offset, place, rows, x);
    SENDVAE_UNROLL
    for (int row = 0; row < kNum; ++row) {
      if (row >= rows) continue;
      float values[kWidth];
      unpack<T>(x[row], values);
      SENDVAE_UNROLL
      for (int i = 0; i < kWidth; ++i) values[i] = group_norm_silu<T, kSilu>(values[i], normalisation[i]);
      store_packed<kAligned>(args.y + offset + row * place.step, place.count, pack<T>(values));
    }
  });
}

// ---- A map of any size: three launches ----

// moments [B, chunks, 2, C]: the channels' means in each chunk, and their sums of squares around them.
template <typename T, bool kResidual, bool kAligned>
__global__ void __launch_bounds__(kThreads, kAligned ? 3 : 2)
    moments_kernel(GroupNormSiluArgs<T> args, Tiling tiling, float* moments) {
  // With a residual, two loads a pixel: four at a time would spill on sm_100.
  constexpr int kNum = kResidual ? (kAligned ? 3 : 2) : 2 * kBatch<kAligned>;
  const Place<kVectorWidth<T>> place(args.shape, tiling, blockIdx.x);
  const Moments chunk = chunk_moments<kThreads, kNum, kResidual, kAligned>(args, place);
  store_parts(args.shape, tiling, place, chunk.mean, chunk.squares, moments);
}

// A block for each sample and group: mean and rstd from the moments of its channels in all chunks.
__global__ void __launch_bounds__(kJoinThreads) join_moments_kernel(GroupNormShape shape, Tiling tiling, float eps,
                                                                    const float* moments, float* mean, float* rstd) {
  const int64_t sample = blockIdx.x / shape.groups, first_channel = blockIdx.x % shape.groups * tiling.group_channels;
  const Moments group =
      block_moments(moments_for_member(shape, tiling, moments, sample, first_channel, threadIdx.x, blockDim.x));
  if (threadIdx.x == 0) write_statistics(group, eps, mean + blockIdx.x, rstd + blockIdx.x);
}

template <typename T, bool kSilu, bool kAligned>
__global__ void __launch_bounds__(kThreads, 3) output_kernel(GroupNormSiluArgs<T> args, Tiling tiling) {
  // Last tile first: what was read last may still be in the L2 cache.
  const Place<kVectorWidth<T>> place(args.shape, tiling, gridDim.x - 1 - blockIdx.x);
  write_outputs<kSilu, kAligned>(args, tiling, place);
}

// ---- A small map: one launch, and what is read again comes from a cache ----

template <typename T, bool kSilu, bool kAligned>
__global__ void __launch_bounds__(kWholeThreads, kAligned ? 2 : 1)
    whole_forward_kernel(GroupNormSiluArgs<T> args, Tiling tiling, float* moments) {
  const GroupNormShape& shape = args.shape;
  const Place<kVectorWidth<T>> place(shape, tiling, blockIdx.x);
  // With a residual, two pixels at a time would spill.
  const Moments chunk = args.residual ? chunk_moments<kWholeThreads, 1, true, kAligned>(args, place)
                                      : chunk_moments<kWholeThreads, kBatch<kAligned>, false, kAligned>(args, place);
  store_parts(shape, tiling, place, chunk.mean, chunk.squares, moments);
  __syncthreads();
  for_groups(shape, tiling, place, [&](int64_t first_channel, int64_t group, uint32_t lane) {
    const Moments of_group =
        warp_moments(moments_for_member(shape, tiling, moments, place.sample, first_channel, lane, kWarp));
    if (lane == 0) write_statistics(of_group, args.eps, args.mean + group, args.rstd + group);
  });
  __syncthreads();
  write_outputs<kSilu, kAligned>(args, tiling, place);
}

// ---- Launches ----

template <typename T, bool kSilu, bool kAligned>
void launch_forward(const GroupNormSiluArgs<T>& args, const Tensor& x) {
  constexpr int kWidth = kVectorWidth<T>;
  const GroupNormShape& shape = args.shape;
  const char* op = GroupNormSilu::kName;
  const std::optional<Tiling> whole = whole_tiling(op, shape, kWidth);
  const Tiling tiling = whole ? *whole : wide_tiling(op, shape, kWidth);
  const dim3 blocks(checked_blocks(op, shape.batch * tiling.sample_blocks), tiling.column_tiles);
  const dim3 threads = tiling.block(kWidth);
  const Tensor workspace = new_floats(x, shape.batch * tiling.chunks * 2 * shape.channels);
  float* moments = mutable_data<float>(workspace);
  const cudaStream_t stream = current_stream(x);
  if (whole) {
    whole_forward_kernel<T, kSilu, kAligned><<<blocks, threads, 0, stream>>>(args, tiling, moments);
    return check_launch(op);
  }
  const uint32_t groups = checked_blocks(op, shape.batch * shape.groups);
  const uint32_t join = join_threads(static_cast<int64_t>(tiling.chunks) * tiling.group_channels);
  if (args.residual) {
    moments_kernel<T, true, kAligned><<<blocks, threads, 0, stream>>>(args, tiling, moments);
  } else {
    moments_kernel<T, false, kAligned><<<blocks, threads, 0, stream>>>(args, tiling, moments);
  }
  check_launch(op);
  join_moments_kernel<<<groups, join, 0, stream>>>(shape, tiling, args.eps, moments, args.mean, args.rstd);
  check_launch(op);
  output_kernel<T, kSilu, kAligned><<<blocks, threads, 0, stream>>>(args, tiling);
  check_launch(op);
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_cuda(const Tensor& x, const std::optional<Tensor>& residual,
                                                        const Tensor& weight, const Tensor& bias, int64_t num_groups,
                                                        double eps, bool silu) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const GroupNormSilu call(x, residual, weight, bias, num_groups, eps);
  if (call.shape.batch == 0) return call.outputs();
  dispatch_float(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const GroupNormSiluArgs<T> args = call.args<T>();
    const int64_t channels = args.shape.channels;
    // A null residual, and the s that comes with it, count as aligned.
    const bool aligned = is_vector_aligned(args.x, channels) && is_vector_aligned(args.residual, channels) &&
                         is_vector_aligned(args.y, channels) && is_vector_aligned(args.s, channels);
    dispatch_flags(silu, aligned, [&](auto with_silu, auto is_aligned) {
      launch_forward<T, with_silu.value, is_aligned.value>(args, x);
    });
  });
  return call.outputs();
}

}  // namespace
}  // namespace sendvae

STABLE_TORCH_LIBRARY_IMPL(sendvae, CUDA, library) {
  library.impl("group_norm_silu", TORCH_BOX(&sendvae::group_norm_silu_cuda));
}
