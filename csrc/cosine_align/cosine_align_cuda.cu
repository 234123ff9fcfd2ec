// cosine_align on CUDA: a warp takes one row in 16-byte vectors. Forward reads both tensors once; backward reads them
// once and writes one or two. The mean is made by the last block that has finished, of the blocks' sums. The order of
// every sum is fixed, so results repeat bit for bit.
#include "cosine_align.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../common/last_block.cuh"
#include "../common/whole_vectors.cuh"

namespace sendvae {
namespace {

constexpr int kWarp = 32;
constexpr int kRowsPerBlock = 8;  // one warp each
constexpr int kThreads = kWarp * kRowsPerBlock;
constexpr int kBatch = 4;  // vectors of a row that a lane has on their way before it uses the first
constexpr int kSums = 16;  // of blocks, that a thread of the last one has on their way

__device__ __forceinline__ int64_t warp_row() {
  return static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
}

// Calls body(column, count) for each batch of a lane's vectors: the first one's column, and the elements from there to
// the row's end, as far as the batch reaches. Negative past it.
template <typename T, typename Body>
__device__ __forceinline__ void for_batches(int64_t width, const Body& body) {
  constexpr int kStep = kWarp * kVectorWidth<T>;
  const int first = threadIdx.x % kWarp * kVectorWidth<T>;
#pragma unroll 1
  for (int64_t begin = 0; begin < width; begin += kBatch * kStep) {
    const int64_t left = width - begin;
    body(begin + first, static_cast<int>(left < kBatch * kStep ? left : kBatch * kStep) - first);
  }
}

// A batch of a row's vectors.
template <bool kWhole, typename T>
__device__ __forceinline__ void read_batch(const T* data, int count, Vector<T> (&out)[kBatch]) {
  constexpr int kStep = kWarp * kVectorWidth<T>;
  SENDVAE_UNROLL
  for (int i = 0; i < kBatch; ++i) out[i] = read<kWhole>(data + i * kStep, count - i * kStep);
}

// ---- Forward ----

// What the mean is made with.
struct MeanWork {
  float* blocks;  // the sum of each block's distances
  BlockCounter counter;
};

// In all lanes.
template <bool kWhole, typename T>
__device__ __forceinline__ RowStats row_stats(const CosineAlignArgs<T>& args, int64_t row) {
  const T* features = args.features.data + row * args.features.stride;
  const T* target = args.target.data + row * args.target.stride;
  float dot = 0.0f, features_square = 0.0f, target_square = 0.0f;
  for_batches<T>(args.width, [&](int64_t column, int count) {
    Vector<T> packed_f[kBatch], packed_y[kBatch];
    read_batch<kWhole>(features + column, count, packed_f);
    read_batch<kWhole>(target + column, count, packed_y);
    SENDVAE_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      float f[kVectorWidth<T>], y[kVectorWidth<T>];
      unpack(packed_f[i].values, f);
      unpack(packed_y[i].values, y);
      SENDVAE_UNROLL
      for (int j = 0; j < kVectorWidth<T>; ++j) {
        dot += f[j] * y[j];
        features_square += f[j] * f[j];
        target_square += y[j] * y[j];
      }
    }
  });
  return stats_from_sums({warp_sum(dot), warp_sum(features_square), warp_sum(target_square)});
}

// From the distance of each warp's row, 0 where there is none.
template <typename T>
__device__ __forceinline__ void write_mean(const CosineAlignArgs<T>& args, float distance, const MeanWork& work) {
  __shared__ float of_warps[kRowsPerBlock];
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = distance;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0.0f;
    SENDVAE_UNROLL
    for (int i = 0; i < kRowsPerBlock; ++i) sum += of_warps[i];
    work.blocks[blockIdx.x] = sum;
  }
  if (!is_last_block(work.counter)) return;
  double sum = 0.0;
  for (uint32_t first = threadIdx.x; first < gridDim.x; first += kSums * kThreads) {
    float sums[kSums];
    SENDVAE_UNROLL
    for (int i = 0; i < kSums; ++i) {
      const uint32_t block = first + i * kThreads;
      sums[i] = block < gridDim.x ? __ldcg(work.blocks + block) : 0.0f;
    }
    SENDVAE_UNROLL
    for (int i = kSums / 2; i > 0; i /= 2) {
      SENDVAE_UNROLL
      for (int j = 0; j < i; ++j) sums[j] += sums[j + i];
    }
    sum += sums[0];
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) *args.distance = static_cast<float>(sum / static_cast<double>(args.rows));
}

template <typename T, bool kWhole>
__global__ void __launch_bounds__(kThreads) forward_kernel(CosineAlignArgs<T> args, MeanWork mean_work) {
  const int64_t row = warp_row();
  float distance = 0.0f;
  if (row < args.rows) {
    const RowStats stats = row_stats<kWhole>(args, row);
    distance = distance_of(stats, args.eps, args.margin);
    if (threadIdx.x % kWarp == 0) {
      args.stats[row] = stats;
      if (!args.is_mean) args.distance[row] = distance;
    }
  }
  if (args.is_mean) write_mean(args, distance, mean_work);
}

// ---- Backward ----

template <typename T, bool kWhole>
__global__ void __launch_bounds__(kThreads) backward_kernel(CosineAlignBackwardArgs<T> args) {
  const int64_t row = warp_row();
  if (row >= args.rows) return;
  const T* features = args.features.data + row * args.features.stride;
  const T* target = args.target.data + row * args.target.stride;
  const RowGradFactors factors = args.row_factors(row);
  for_batches<T>(args.width, [&](int64_t column, int count) {
    constexpr int kWidth = kVectorWidth<T>, kStep = kWarp * kWidth;
    Vector<T> packed_f[kBatch], packed_y[kBatch];
    read_batch<kWhole>(features + column, count, packed_f);
    read_batch<kWhole>(target + column, count, packed_y);
    SENDVAE_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      const int64_t offset = row * args.width + column + i * kStep;
      float f[kWidth], y[kWidth], grad[kWidth];
      unpack(packed_f[i].values, f);
      unpack(packed_y[i].values, y);
      Vector<T> out;
      SENDVAE_UNROLL
      for (int j = 0; j < kWidth; ++j) grad[j] = factors.scale * (factors.features_projection * f[j] - y[j]);
      pack(grad, out.values);
      write<kWhole>(args.grad_features + offset, count - i * kStep, out);
      if (!args.grad_target) continue;
      SENDVAE_UNROLL
      for (int j = 0; j < kWidth; ++j) grad[j] = factors.scale * (factors.target_projection * y[j] - f[j]);
      pack(grad, out.values);
      write<kWhole>(args.grad_target + offset, count - i * kStep, out);
    }
  });
}

// ---- Launches ----

uint32_t blocks_for(const char* op, int64_t rows) {
  const int64_t blocks = (rows + kRowsPerBlock - 1) / kRowsPerBlock;
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), op, ": too many rows for one launch: ", rows);
  return static_cast<uint32_t>(blocks);
}

template <typename T>
bool are_whole(const Rows<T>& features, const Rows<T>& target, int64_t width) {
  return is_whole(features.data, features.stride, width) && is_whole(target.data, target.stride, width);
}

std::tuple<Tensor, Tensor> cosine_align_cuda(const Tensor& features, const Tensor& target, double eps,
                                             const std::optional<double>& margin, bool mean) {
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const CosineAlign call(features, target, eps, margin, mean);
  const int64_t rows = features.size(0);
  if (rows == 0 && !mean) return call.outputs();
  const uint32_t blocks = std::max(1u, blocks_for(call.kName, rows));  // the mean of no rows is NaN
  const cudaStream_t stream = current_stream(features);
  const Tensor sums = empty_on(features, {mean ? blocks + 1 : 0}, ScalarType::Float);  // and a spare counter
  MeanWork work{mutable_data<float>(sums), {}};
  if (mean) work.counter = counter_for(call.kName, stream, mutable_data<uint32_t>(sums) + blocks);
  dispatch_float(features.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const CosineAlignArgs<T> args = call.args<T>();
    const bool whole = are_whole(args.features, args.target, args.width);
    const auto kernel = whole ? forward_kernel<T, true> : forward_kernel<T, false>;
    kernel<<<blocks, kThreads, 0, stream>>>(args, work);
    check_launch(call.kName);
  });
  return call.outputs();
}

std::tuple<Tensor, Tensor> cosine_align_backward_cuda(const Tensor& grad, const Tensor& features, const Tensor& target,
                                                      const Tensor& stats, double eps,
                                                      const std::optional<double>& margin, bool need_target) {
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const CosineAlignBackward call(grad, features, target, stats, eps, margin, need_target);
  dispatch_float(features.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const CosineAlignBackwardArgs<T> args = call.args<T>();
    if (args.rows == 0) return;
    // A null grad_target counts as whole.
    const bool whole = are_whole(args.features, args.target, args.width) &&
                       is_whole(args.grad_features, args.width, args.width) &&
                       is_whole(args.grad_target, args.width, args.width);
    const auto kernel = whole ? backward_kernel<T, true> : backward_kernel<T, false>;
    kernel<<<blocks_for(call.kName, args.rows), kThreads, 0, current_stream(features)>>>(args);
    check_launch(call.kName);
  });
  return call.outputs();
}

}  // namespace
}  // namespace sendvae

STABLE_TORCH_LIBRARY_IMPL(sendvae, CUDA, library) {
  library.impl("cosine_align", TORCH_BOX(&sendvae::cosine_align_cuda));
  library.impl("cosine_align_backward", TORCH_BOX(&sendvae::cosine_align_backward_cuda));
}
