// cosine_align on CUDA: a warp takes one row in 16-byte vectors. Forward reads both tensors once; backward reads them
// once and writes one or two. The order of every sum is fixed, so results repeat bit for bit.
#include "cosine_align.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../common/cuda.cuh"

namespace sendvae {
namespace {

constexpr int kWarp = 32;
constexpr int kRowsPerBlock = 4;  // one warp each

__device__ __forceinline__ int64_t warp_row() {
  return static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
}

template <typename T>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock) forward_kernel(CosineAlignArgs<T> args, bool aligned) {
  constexpr int kWidth = kVectorWidth<T>;
  const int64_t row = warp_row();
  if (row >= args.rows) return;
  const int lane = threadIdx.x % kWarp;
  const T* features = args.features.data + row * args.features.stride;
  const T* target = args.target.data + row * args.target.stride;
  float dot = 0.0f, features_square = 0.0f, target_square = 0.0f;
  for (int64_t i = lane * kWidth; i < args.width; i += kWarp * kWidth) {
    float f[kWidth], y[kWidth];
    load_vector(features + i, args.width - i, aligned, f);
    load_vector(target + i, args.width - i, aligned, y);
    SENDVAE_UNROLL
    for (int j = 0; j < kWidth; ++j) {
      dot += f[j] * y[j];
      features_square += f[j] * f[j];
      target_square += y[j] * y[j];
    }
  }
  const RowStats stats = stats_from_sums({warp_sum(dot), warp_sum(features_square), warp_sum(target_square)});
  if (lane == 0) {
    args.stats[row] = stats;
    args.distance[row] = distance_of(stats, args.eps, args.margin);
  }
}

template <typename T>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock) backward_kernel(CosineAlignBackwardArgs<T> args, bool aligned) {
  constexpr int kWidth = kVectorWidth<T>;
  const int64_t row = warp_row();
  if (row >= args.rows) return;
  const int lane = threadIdx.x % kWarp;
  const T* features = args.features.data + row * args.features.stride;
  const T* target = args.target.data + row * args.target.stride;
  const RowGradFactors factors = grad_factors(args.grad[row], args.stats[row], args.eps, args.margin);
  for (int64_t i = lane * kWidth; i < args.width; i += kWarp * kWidth) {
    const int64_t count = args.width - i;
    float f[kWidth], y[kWidth], grad[kWidth];
    load_vector(features + i, count, aligned, f);
    load_vector(target + i, count, aligned, y);
    SENDVAE_UNROLL
    for (int j = 0; j < kWidth; ++j) grad[j] = factors.scale * (factors.features_projection * f[j] - y[j]);
    store_vector(args.grad_features + row * args.width + i, count, aligned, grad);
    if (!args.grad_target) continue;
    SENDVAE_UNROLL
    for (int j = 0; j < kWidth; ++j) grad[j] = factors.scale * (factors.target_projection * y[j] - f[j]);
    store_vector(args.grad_target + row * args.width + i, count, aligned, grad);
  }
}

uint32_t blocks_for(const char* op, int64_t rows) {
  const int64_t blocks = (rows + kRowsPerBlock - 1) / kRowsPerBlock;
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), op, ": too many rows for one launch: ", rows);
  return static_cast<uint32_t>(blocks);
}

template <typename T>
bool is_aligned(const Rows<T>& rows) {
  return is_vector_aligned(rows.data, rows.stride);
}

std::tuple<Tensor, Tensor> cosine_align_cuda(const Tensor& features, const Tensor& target, double eps,
                                             const std::optional<double>& margin) {
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const CosineAlign call(features, target, eps, margin);
  dispatch_float(features.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const CosineAlignArgs<T> args = call.args<T>();
    if (args.rows == 0) return;
    const bool aligned = is_aligned(args.features) && is_aligned(args.target);
    const uint32_t blocks = blocks_for(call.kName, args.rows);
    forward_kernel<T><<<blocks, kWarp * kRowsPerBlock, 0, current_stream(features)>>>(args, aligned);
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
    // A null grad_target counts as aligned.
    const bool aligned = is_aligned(args.features) && is_aligned(args.target) &&
                         is_vector_aligned(args.grad_features, args.width) &&
                         is_vector_aligned(args.grad_target, args.width);
    const uint32_t blocks = blocks_for(call.kName, args.rows);
    backward_kernel<T><<<blocks, kWarp * kRowsPerBlock, 0, current_stream(features)>>>(args, aligned);
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
