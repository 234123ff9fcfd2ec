// global_norm on CUDA: a launch per table of tensors leaves one sum per chunk, a last block adds these up. The order of
// every sum is fixed, so results repeat bit for bit.
#include "global_norm.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../common/cuda.cuh"

namespace sendvae {
namespace {

constexpr int kTableCapacity = 128;  // tensors: what fits the 4 KB of a kernel's arguments
constexpr int kThreads = 256;
constexpr int kFinishThreads = 1024;

template <typename T>
using NormTable = ChunkTable<NormEntry<T>, kTableCapacity>;

template <typename T>
__global__ void __launch_bounds__(kThreads) chunk_kernel(const __grid_constant__ NormTable<T> table, double* sums) {
  constexpr int kWidth = kVectorWidth<T>;
  const ChunkRange range = table.range(static_cast<int32_t>(blockIdx.x), kNormChunk);
  const T* data = table.entries[range.entry].data;
  const bool aligned = is_vector_aligned(data, 0);
  double sum = 0.0;
  for (int64_t i = range.begin + threadIdx.x * kWidth; i < range.end; i += kThreads * kWidth) {
    float x[kWidth];
    load_vector(data + i, range.end - i, aligned, x);
    SENDVAE_UNROLL
    for (int j = 0; j < kWidth; ++j) sum += square(x[j]);
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const double* sums, int64_t count, float* norm) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kFinishThreads) sum += sums[i];
  sum = block_sum<kFinishThreads>(sum);
  if (threadIdx.x == 0) *norm = norm_from_sum(sum);
}

Tensor global_norm_cuda(const std::vector<Tensor>& tensors) {
  const GlobalNorm call(tensors);
  const torch::stable::accelerator::DeviceGuard guard(tensors[0].get_device_index());
  const cudaStream_t stream = current_stream(tensors[0]);
  const Tensor sums = empty_on(tensors[0], {call.num_chunks}, ScalarType::Double);
  double* next = mutable_data<double>(sums);
  dispatch_float(tensors[0].scalar_type(), [&](auto type) {
    using T = decltype(type);
    for_each_table<kTableCapacity>(call.entries<T>(), kNormChunk, [&](const NormTable<T>& table, int64_t) {
      if (table.num_chunks == 0) return;
      chunk_kernel<T><<<table.num_chunks, kThreads, 0, stream>>>(table, next);
      check_launch(call.kName);
      next += table.num_chunks;
    });
  });
  finish_kernel<<<1, kFinishThreads, 0, stream>>>(data<double>(sums), call.num_chunks, mutable_data<float>(call.norm));
  check_launch(call.kName);
  return call.norm;
}

}  // namespace
}  // namespace sendvae

STABLE_TORCH_LIBRARY_IMPL(sendvae, CUDA, library) {
  library.impl("global_norm", TORCH_BOX(&sendvae::global_norm_cuda));
}
