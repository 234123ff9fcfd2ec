// cosine_align on the CPU: a row at a time, rows spread over threads, the sums of a row in vector lanes. A row's result
// depends on nothing but the row.
#include "cosine_align.h"

#include <algorithm>

#include <torch/csrc/stable/library.h>

#include "../common/cpu.h"

namespace sendvae {
namespace {

constexpr int64_t kGrainElements = 8192;  // elements a thread takes at least

template <typename T>
SENDVAE_CPU_CLONES void forward_rows(const CosineAlignArgs<T>& args, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const T* __restrict__ features = args.features.data + row * args.features.stride;
    const T* __restrict__ target = args.target.data + row * args.target.stride;
    float dot = 0.0f, features_square = 0.0f, target_square = 0.0f;
    // Lets the compiler reorder these three sums, and nothing else.
#pragma omp simd reduction(+ : dot, features_square, target_square)
    for (int64_t i = 0; i < args.width; ++i) {
      const float f = to_float(features[i]), y = to_float(target[i]);
      dot += f * y;
      features_square += f * f;
      target_square += y * y;
    }
    const RowStats stats = stats_from_sums({dot, features_square, target_square});
    args.stats[row] = stats;
    args.distance[row] = distance_of(stats, args.eps, args.margin);
  }
}

template <typename T>
SENDVAE_CPU_CLONES void backward_rows(const CosineAlignBackwardArgs<T>& args, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const T* __restrict__ features = args.features.data + row * args.features.stride;
    const T* __restrict__ target = args.target.data + row * args.target.stride;
    const RowGradFactors factors = args.row_factors(row);
    T* __restrict__ grad_features = args.grad_features + row * args.width;
    for (int64_t i = 0; i < args.width; ++i) {
      const float f = to_float(features[i]), y = to_float(target[i]);
      grad_features[i] = from_float<T>(factors.scale * (factors.features_projection * f - y));
    }
    if (!args.grad_target) continue;
    T* __restrict__ grad_target = args.grad_target + row * args.width;
    for (int64_t i = 0; i < args.width; ++i) {
      const float f = to_float(features[i]), y = to_float(target[i]);
      grad_target[i] = from_float<T>(factors.scale * (factors.target_projection * y - f));
    }
  }
}

template <typename Args>
void for_all_rows(const Args& args, void (*rows)(const Args&, int64_t, int64_t)) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, args.width));
  torch::stable::parallel_for(0, args.rows, grain, [&](int64_t first, int64_t last) { rows(args, first, last); });
}

// One after the other, so that it does not depend on the number of threads.
float mean_of(const float* values, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += values[i];
  return static_cast<float>(sum / static_cast<double>(count));
}

std::tuple<Tensor, Tensor> cosine_align_cpu(const Tensor& features, const Tensor& target, double eps,
                                            const std::optional<double>& margin, bool mean) {
  const CosineAlign call(features, target, eps, margin, mean);
  dispatch_float(features.scalar_type(), [&](auto type) {
    using T = decltype(type);
    CosineAlignArgs<T> args = call.args<T>();
    if (!mean) return for_all_rows(args, forward_rows<T>);
    const Tensor of_rows = empty_on(features, {args.rows}, ScalarType::Float);
    args.distance = mutable_data<float>(of_rows);
    for_all_rows(args, forward_rows<T>);
    *mutable_data<float>(call.distance) = mean_of(args.distance, args.rows);
  });
  return call.outputs();
}

std::tuple<Tensor, Tensor> cosine_align_backward_cpu(const Tensor& grad, const Tensor& features, const Tensor& target,
                                                     const Tensor& stats, double eps,
                                                     const std::optional<double>& margin, bool need_target) {
  const CosineAlignBackward call(grad, features, target, stats, eps, margin, need_target);
  dispatch_float(features.scalar_type(), [&](auto type) {
    using T = decltype(type);
    for_all_rows(call.args<T>(), backward_rows<T>);
  });
  return call.outputs();
}

}  // namespace
}  // namespace sendvae

STABLE_TORCH_LIBRARY_IMPL(sendvae, CPU, library) {
  library.impl("cosine_align", TORCH_BOX(&sendvae::cosine_align_cpu));
  library.impl("cosine_align_backward", TORCH_BOX(&sendvae::cosine_align_backward_cpu));
}
