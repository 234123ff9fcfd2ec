// group_norm_silu's forward on CUDA, in three launches: the channels' moments in each chunk of pixels; the groups' mean
// and rstd from them; the outputs. Maps are read twice and written once. A large batch and a large single map both make
// many chunks, which do not depend on the batch. Every sum has a fixed order, so results repeat bit for bit.
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

// moments [B, chunks, 2, C]: the channels' means in each chunk, and their sums of squares around them. Forms s.
template <typename T, bool kResidual, bool kAligned>
__global__ void __launch_bounds__(kThreads, kAligned ? 3 : 2)
    moments_kernel(GroupNormSiluArgs<T> args, Tiling tiling, float* moments) {
  constexpr int kWidth = kVectorWidth<T>;
  constexpr int kNum = kResidual ? kBatch<kAligned> : 2 * kBatch<kAligned>;
  const Place<kWidth> place(args.shape, tiling, blockIdx.x);
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
  exchange(rows);
  MomentsOfParts channel(rows[0][0]);
  SENDVAE_UNROLL
  for (int row = 0; row < kWidth; ++row) {
    channel.add({static_cast<float>(place.rows_of(row)), rows[0][row], rows[1][row]});
  }
  const Moments chunk = channel.moments();
  store_parts(args.shape, tiling, place, chunk.mean, chunk.squares, moments);
}

// A block for each sample and group: mean and rstd from the moments of its channels in all chunks.
__global__ void __launch_bounds__(kJoinThreads) join_moments_kernel(GroupNormShape shape, Tiling tiling, float eps,
                                                                    const float* moments, float* mean, float* rstd) {
  const int64_t sample = blockIdx.x / shape.groups, width = shape.channels_per_group();
  const int64_t first_channel = blockIdx.x % shape.groups * width;
  const float* first = moments + sample * tiling.chunks * 2 * shape.channels + first_channel;
  const bool has_part = threadIdx.x < width && threadIdx.y < tiling.chunks;
  MomentsOfParts parts(has_part ? first[threadIdx.y * 2 * shape.channels + threadIdx.x] : 0.0f);
  for (uint32_t chunk = threadIdx.y; chunk < tiling.chunks; chunk += blockDim.y) {
    const float* means = first + chunk * 2 * shape.channels;
    const float pixels = static_cast<float>(pixels_in(shape, tiling, chunk));
    for (int64_t i = threadIdx.x; i < width; i += blockDim.x) parts.add({pixels, means[i], means[shape.channels + i]});
  }
  const Moments group = block_moments(parts.moments());
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    mean[blockIdx.x] = group.mean;
    rstd[blockIdx.x] = rstd_of(group.squares / group.count, eps);
  }
}

template <typename T, bool kSilu, bool kAligned>
__global__ void __launch_bounds__(kThreads, 3) output_kernel(GroupNormSiluArgs<T> args, Tiling tiling) {
  constexpr int kWidth = kVectorWidth<T>;
  constexpr int kNum = kBatch<kAligned>;
  // Last tile first: what was read last may still be in the L2 cache.
  const Place<kWidth> place(args.shape, tiling, gridDim.x - 1 - blockIdx.x);
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

template <typename T, bool kSilu, bool kAligned>
void launch_forward(const GroupNormSiluArgs<T>& args, const Tensor& x) {
  constexpr int kWidth = kVectorWidth<T>;
  const GroupNormShape& shape = args.shape;
  const char* op = GroupNormSilu::kName;
  const Tiling tiling = tiling_for(op, shape, kWidth, kThreadPixels);
  const dim3 blocks(checked_blocks(op, shape.batch * tiling.sample_blocks), tiling.column_tiles);
  const dim3 threads = tiling.block(kWidth);
  const uint32_t groups = checked_blocks(op, shape.batch * shape.groups);
  const dim3 join = join_threads(shape, tiling);
  const Tensor moments = workspace(x, shape.batch * tiling.chunks * 2 * shape.channels);
  const cudaStream_t stream = current_stream(x);
  if (args.residual) {
    moments_kernel<T, true, kAligned><<<blocks, threads, 0, stream>>>(args, tiling, mutable_data<float>(moments));
  } else {
    moments_kernel<T, false, kAligned><<<blocks, threads, 0, stream>>>(args, tiling, mutable_data<float>(moments));
  }
  check_launch(op);
  join_moments_kernel<<<groups, join, 0, stream>>>(shape, tiling, args.eps, data<float>(moments), args.mean, args.rstd);
  check_launch(op);
  output_kernel<T, kSilu, kAligned><<<blocks, threads, 0, stream>>>(args, tiling);
  check_launch(op);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_silu_cuda(const Tensor& x, const std::optional<Tensor>& residual,
                                                                const Tensor& weight, const Tensor& bias,
                                                                int64_t num_groups, double eps, bool silu) {
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
