// adamw_ema on CUDA: a small launch counts the steps and computes what depends on them and on the norm, then a launch
// per table of tensors updates them, a chunk per block in 16-byte vectors. The second kind only reads what the first
// one left, so no block depends on another.
#include "adamw_ema.h"

#include <cstring>
#include <type_traits>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../common/cuda.cuh"

namespace sendvae {
namespace {

constexpr int kThreads = 256;
constexpr int kStepCapacity = 384;  // pointers: what fits the 4 KB of a kernel's arguments
constexpr int kStepThreads = 128;

struct StepTable {
  int64_t* steps[kStepCapacity];
  int32_t count;
};

__global__ void __launch_bounds__(kStepThreads) step_kernel(const __grid_constant__ StepTable table, const float* norm,
                                                            AdamWSettings settings, StepFactors* factors) {
  const int i = static_cast<int>(blockIdx.x) * kStepThreads + threadIdx.x;
  if (i < table.count) factors[i] = advance(table.steps[i], norm, settings);
}

// A thread takes four elements at a time: 16 bytes of each fp32 array, so that a warp reads and writes whole sectors
// whatever the gradients' type.
constexpr int kWidth = 4;

// kWhole: all four are there, and aligned. Else there are `count`, and the rest become 0. Everything is used once: so
// the loads and stores of whole vectors are those that leave the caches first. (Plain ones nvcc would join with the
// other branch's, one number at a time.)
template <bool kWhole, typename T>
__device__ __forceinline__ void load(const T* data, int count, float (&out)[kWidth]) {
  if constexpr (kWhole) {
    using Bits = std::conditional_t<sizeof(T) == 2, uint2, uint4>;
    const Bits bits = __ldcs(reinterpret_cast<const Bits*>(data));
    T values[kWidth];
    memcpy(values, &bits, sizeof bits);
    unpack(values, out);
  } else {
    SENDVAE_UNROLL
    for (int i = 0; i < kWidth; ++i) out[i] = i < count ? to_float(data[i]) : 0.0f;
  }
}

template <bool kWhole>
__device__ __forceinline__ void store(float* data, int count, const float (&values)[kWidth]) {
  if constexpr (kWhole) {
    uint4 bits;
    memcpy(&bits, values, sizeof bits);
    __stcs(reinterpret_cast<uint4*>(data), bits);
  } else {
    SENDVAE_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      if (i < count) data[i] = values[i];
    }
  }
}

// The elements from `i` on.
template <bool kWhole, bool kHasEma, typename T>
__device__ __forceinline__ void update(const UpdateEntry<T>& entry, int i, int count, const UpdateWeights& weights,
                                       const StepFactors& factors) {
  float grad[kWidth], param[kWidth], exp_avg[kWidth], exp_avg_sq[kWidth], ema[kWidth] = {};
  load<kWhole>(entry.grad + i, count, grad);
  load<kWhole>(entry.param + i, count, param);
  load<kWhole>(entry.exp_avg + i, count, exp_avg);
  load<kWhole>(entry.exp_avg_sq + i, count, exp_avg_sq);
  if constexpr (kHasEma) load<kWhole>(entry.ema + i, count, ema);
  SENDVAE_UNROLL
  for (int j = 0; j < kWidth; ++j) {
    const UpdateState now = updated({param[j], exp_avg[j], exp_avg_sq[j], ema[j]}, grad[j], weights, factors);
    param[j] = now.param;
    exp_avg[j] = now.exp_avg;
    exp_avg_sq[j] = now.exp_avg_sq;
    ema[j] = now.ema;
  }
  store<kWhole>(entry.param + i, count, param);
  store<kWhole>(entry.exp_avg + i, count, exp_avg);
  store<kWhole>(entry.exp_avg_sq + i, count, exp_avg_sq);
  if constexpr (kHasEma) store<kWhole>(entry.ema + i, count, ema);
}

// factors: of the table's tensors.
template <typename T, bool kHasEma>
__global__ void __launch_bounds__(kThreads, 4) update_kernel(const __grid_constant__ UpdateTable<T> table,
                                                             UpdateWeights weights, const StepFactors* table_factors) {
  const ChunkRange range = table.range(static_cast<int32_t>(blockIdx.x), kUpdateChunk);
  const StepFactors factors = table_factors[range.entry];
  if (!factors.active) return;
  UpdateEntry<T> entry = table.entries[range.entry];
  entry.param += range.begin;
  entry.grad += range.begin;
  entry.exp_avg += range.begin;
  entry.exp_avg_sq += range.begin;
  if constexpr (kHasEma) entry.ema += range.begin;
  // A null ema counts as aligned.
  const bool aligned = is_vector_aligned(entry.param, 0) && is_vector_aligned(entry.grad, 0) &&
                       is_vector_aligned(entry.exp_avg, 0) && is_vector_aligned(entry.exp_avg_sq, 0) &&
                       is_vector_aligned(entry.ema, 0);
  const int size = static_cast<int>(range.end - range.begin);
  const int whole_end = aligned ? size - (kWidth - 1) : 0;
  for (int i = threadIdx.x * kWidth; i < size; i += kThreads * kWidth) {
    if (i < whole_end) {
      update<true, kHasEma>(entry, i, kWidth, weights, factors);
    } else {
      update<false, kHasEma>(entry, i, size - i, weights, factors);
    }
  }
}

void launch_steps(const AdamWEMA& call, StepFactors* factors, cudaStream_t stream) {
  for (size_t first = 0; first < call.steps.size(); first += kStepCapacity) {
    StepTable table{};
    table.count = static_cast<int32_t>(std::min<size_t>(kStepCapacity, call.steps.size() - first));
    for (int32_t i = 0; i < table.count; ++i) table.steps[i] = mutable_data<int64_t>(call.steps[first + i]);
    const int blocks = (table.count + kStepThreads - 1) / kStepThreads;
    step_kernel<<<blocks, kStepThreads, 0, stream>>>(table, call.norm_data(), call.settings, factors + first);
    check_launch(call.kName);
  }
}

template <typename T, bool kHasEma>
void launch_updates(const AdamWEMA& call, const StepFactors* factors, cudaStream_t stream) {
  for_each_table<kUpdateCapacity>(call.entries<T>(), kUpdateChunk, [&](const UpdateTable<T>& table, int64_t first) {
    if (table.num_chunks == 0) return;
    update_kernel<T, kHasEma><<<table.num_chunks, kThreads, 0, stream>>>(table, call.weights, factors + first);
    check_launch(call.kName);
  });
}

void adamw_ema_cuda(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                    const std::vector<Tensor>& exp_avg, const std::vector<Tensor>& exp_avg_sq,
                    const std::vector<Tensor>& ema, const std::vector<Tensor>& steps,
                    const std::optional<Tensor>& grad_norm, double lr, double beta1, double beta2, double eps,
                    double weight_decay, double ema_decay, double max_grad_norm) {
  const AdamWEMA call(params, grads, exp_avg, exp_avg_sq, ema, steps, grad_norm, lr, beta1, beta2, eps, weight_decay,
                      ema_decay, max_grad_norm);
  const torch::stable::accelerator::DeviceGuard guard(params[0].get_device_index());
  const cudaStream_t stream = current_stream(params[0]);
  const auto count = static_cast<int64_t>(steps.size());
  constexpr auto kFloats = static_cast<int64_t>(sizeof(StepFactors) / sizeof(float));
  const Tensor buffer = empty_on(params[0], {count, kFloats}, ScalarType::Float);
  StepFactors* factors = mutable_data<StepFactors>(buffer);
  launch_steps(call, factors, stream);
  dispatch_float(grads[0].scalar_type(), [&](auto type) {
    using T = decltype(type);
    call.has_ema() ? launch_updates<T, true>(call, factors, stream) : launch_updates<T, false>(call, factors, stream);
  });
}

}  // namespace
}  // namespace sendvae

STABLE_TORCH_LIBRARY_IMPL(sendvae, CUDA, library) { library.impl("adamw_ema", TORCH_BOX(&sendvae::adamw_ema_cuda)); }
