// adamw_ema on the CPU: chunks of all tensors spread over threads, each in one vectorised loop.
#include "adamw_ema.h"

#include <torch/csrc/stable/library.h>

#include "../common/cpu.h"

namespace sendvae {
namespace {

template <typename T, bool kHasEma>
SENDVAE_CPU_CLONES void update_chunk(const UpdateEntry<T>& entry, const UpdateWeights& weights_,
                                     const StepFactors& factors_, int64_t begin, int64_t end) {
  // Copies: what is written might otherwise alias them.
  const UpdateWeights weights = weights_;
  const StepFactors factors = factors_;
  float* __restrict__ param = entry.param;
  const T* __restrict__ grad = entry.grad;
  float* __restrict__ exp_avg = entry.exp_avg;
  float* __restrict__ exp_avg_sq = entry.exp_avg_sq;
  float* __restrict__ ema = entry.ema;
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const UpdateState old{param[i], exp_avg[i], exp_avg_sq[i], kHasEma ? ema[i] : 0.0f};
    const UpdateState now = updated(old, to_float(grad[i]), weights, factors);
    param[i] = now.param;
    exp_avg[i] = now.exp_avg;
    exp_avg_sq[i] = now.exp_avg_sq;
    if constexpr (kHasEma) ema[i] = now.ema;
  }
}

void adamw_ema_cpu(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                   const std::vector<Tensor>& exp_avg, const std::vector<Tensor>& exp_avg_sq,
                   const std::vector<Tensor>& ema, const std::vector<Tensor>& steps,
                   const std::optional<Tensor>& grad_norm, double lr, double beta1, double beta2, double eps,
                   double weight_decay, double ema_decay, double max_grad_norm) {
  const AdamWEMA call(params, grads, exp_avg, exp_avg_sq, ema, steps, grad_norm, lr, beta1, beta2, eps, weight_decay,
                      ema_decay, max_grad_norm);
  std::vector<StepFactors> factors;
  factors.reserve(steps.size());
  for (const Tensor& step : steps) {
    factors.push_back(advance(mutable_data<int64_t>(step), call.norm_data(), call.settings));
  }
  if (!factors[0].active) return;
  dispatch_float(grads[0].scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto update = call.has_ema() ? update_chunk<T, true> : update_chunk<T, false>;
    for_each_table<kUpdateCapacity>(call.entries<T>(), kUpdateChunk, [&](const UpdateTable<T>& table, int64_t offset) {
      torch::stable::parallel_for(0, table.num_chunks, 1, [&](int64_t first, int64_t last) {
        for (int64_t chunk = first; chunk < last; ++chunk) {
          const ChunkRange range = table.range(static_cast<int32_t>(chunk), kUpdateChunk);
          update(table.entries[range.entry], call.weights, factors[offset + range.entry], range.begin, range.end);
        }
      });
    });
  });
}

}  // namespace
}  // namespace sendvae

STABLE_TORCH_LIBRARY_IMPL(sendvae, CPU, library) { library.impl("adamw_ema", TORCH_BOX(&sendvae::adamw_ema_cpu)); }
