// adamw_ema: gradient clipping, AdamW and a moving average of the parameters, in place, in one pass over memory.
//
// With k the tensor's step after this one and grad_norm the norm of all gradients before clipping:
//
//   g   <- grad min(1, max_grad_norm / (grad_norm + 1e-6))
//   p   <- p (1 - lr weight_decay)
//   m   <- m + (1 - beta1)(g - m);   v <- beta2 v + (1 - beta2) g^2
//   p   <- p - lr / (1 - beta1^k)  m / (sqrt(v) / sqrt(1 - beta2^k) + eps)
//   ema <- ema + (1 - ema_decay)(p - ema)
//
// and nothing at all, step included, when grad_norm is not finite. Factors that depend on the step are computed in
// double.
#pragma once

#include <cmath>
#include <optional>

#include "../common/chunk_table.h"
#include "../common/tensor.h"

namespace sendvae {

constexpr int64_t kUpdateChunk = 8192;  // elements
constexpr int kUpdateCapacity = 64;     // tensors in a table: what fits the 4 KB of a kernel's arguments

// ---- The arithmetic ----

struct AdamWSettings {
  double lr, beta1, beta2, max_grad_norm;
};

// The weights that are the same at every step.
struct UpdateWeights {
  float param_decay;        // 1 - lr weight_decay
  float exp_avg_weight;     // 1 - beta1
  float exp_avg_sq_decay;   // beta2
  float exp_avg_sq_weight;  // 1 - beta2
  float eps;
  float ema_weight;  // 1 - ema_decay
};

// The factors of one tensor's update that depend on its step and the norm.
struct alignas(16) StepFactors {
  float step_size;   // lr / (1 - beta1^k)
  float root_scale;  // 1 / sqrt(1 - beta2^k)
  float grad_scale;  // the clip coefficient
  bool active;       // false: the update is skipped
};

// Counts the step unless the norm (null: none is given) forbids the update.
SENDVAE_HD StepFactors advance(int64_t* step, const float* norm, const AdamWSettings& settings) {
  if (norm && !(fabsf(*norm) < INFINITY)) return {0.0f, 0.0f, 0.0f, false};  // infinite or NaN
  // The 1e-6 is that of torch.nn.utils.clip_grad_norm_.
  const double ratio = settings.max_grad_norm > 0.0 ? settings.max_grad_norm / (*norm + 1e-6) : 1.0;
  const double k = static_cast<double>(++*step);
  return {static_cast<float>(settings.lr / (1.0 - pow(settings.beta1, k))),
          static_cast<float>(1.0 / sqrt(1.0 - pow(settings.beta2, k))), static_cast<float>(ratio < 1.0 ? ratio : 1.0),
          true};
}

struct UpdateState {
  float param, exp_avg, exp_avg_sq, ema;
};

// start + weight (end - start) in the form that is exact at the nearer end.
SENDVAE_HD float lerp(float start, float end, float weight) {
  const float difference = end - start;
  return weight < 0.5f ? start + weight * difference : end - (1.0f - weight) * difference;
}

SENDVAE_HD UpdateState updated(const UpdateState& old, float grad, const UpdateWeights& weights,
                               const StepFactors& factors) {
  const float g = grad * factors.grad_scale;
  const float exp_avg = lerp(old.exp_avg, g, weights.exp_avg_weight);
  const float exp_avg_sq = weights.exp_avg_sq_decay * old.exp_avg_sq + weights.exp_avg_sq_weight * g * g;
  const float denominator = sqrtf(exp_avg_sq) * factors.root_scale + weights.eps;
  const float param = weights.param_decay * old.param - factors.step_size * (exp_avg / denominator);
  return {param, exp_avg, exp_avg_sq, lerp(old.ema, param, weights.ema_weight)};
}

// ---- What a kernel is given ----

// One tensor's memory.
template <typename T>
struct UpdateEntry {
  float* param;
  const T* grad;
  float* exp_avg;
  float* exp_avg_sq;
  float* ema;  // null without a moving average
  int64_t size;
};

template <typename T>
using UpdateTable = ChunkTable<UpdateEntry<T>, kUpdateCapacity>;

// ---- From tensors to kernel arguments ----

// Holds the checked arguments of one call.
struct AdamWEMA {
  static constexpr const char* kName = "adamw_ema";
  using List = std::vector<Tensor>;
  const List &params, &grads, &exp_avg, &exp_avg_sq, &ema, &steps;
  const std::optional<Tensor>& grad_norm;
  AdamWSettings settings;
  UpdateWeights weights;

  AdamWEMA(const List& params_, const List& grads_, const List& exp_avg_, const List& exp_avg_sq_, const List& ema_,
           const List& steps_, const std::optional<Tensor>& grad_norm_, double lr, double beta1, double beta2,
           double eps, double weight_decay, double ema_decay, double max_grad_norm)
      : params(params_), grads(grads_), exp_avg(exp_avg_), exp_avg_sq(exp_avg_sq_), ema(ema_), steps(steps_),
        grad_norm(grad_norm_), settings{lr, beta1, beta2, max_grad_norm},
        weights{static_cast<float>(1.0 - lr * weight_decay),
                static_cast<float>(1.0 - beta1),
                static_cast<float>(beta2),
                static_cast<float>(1.0 - beta2),
                static_cast<float>(eps),
                static_cast<float>(1.0 - ema_decay)} {
    STD_TORCH_CHECK(!params.empty() && !grads.empty(), kName, ": params and grads must not be empty");
    check_list_like(kName, "params", params, ScalarType::Float, params);
    check_float_dtype(kName, "grads", grads[0]);
    check_list_like(kName, "grads", grads, grads[0].scalar_type(), params);
    check_list_like(kName, "exp_avg", exp_avg, ScalarType::Float, params);
    check_list_like(kName, "exp_avg_sq", exp_avg_sq, ScalarType::Float, params);
    if (has_ema()) check_list_like(kName, "ema", ema, ScalarType::Float, params);
    STD_TORCH_CHECK(steps.size() == params.size(), kName, ": steps has ", steps.size(), " tensors, not ",
                    params.size());
    for (const Tensor& step : steps) check_scalar("steps", step, ScalarType::Long);
    if (grad_norm.has_value()) check_scalar("grad_norm", *grad_norm, ScalarType::Float);
    STD_TORCH_CHECK(grad_norm.has_value() || max_grad_norm == 0.0, kName, ": clipping needs grad_norm");
  }

  bool has_ema() const { return !ema.empty(); }
  const float* norm_data() const { return grad_norm.has_value() ? data<float>(*grad_norm) : nullptr; }

  template <typename T>
  std::vector<UpdateEntry<T>> entries() const {
    std::vector<UpdateEntry<T>> list;
    list.reserve(params.size());
    for (size_t i = 0; i < params.size(); ++i) {
      list.push_back({mutable_data<float>(params[i]), data<T>(grads[i]), mutable_data<float>(exp_avg[i]),
                      mutable_data<float>(exp_avg_sq[i]), has_ema() ? mutable_data<float>(ema[i]) : nullptr,
                      params[i].numel()});
    }
    return list;
  }

 private:
  void check_scalar(const char* name, const Tensor& tensor, ScalarType dtype) const {
    check_dtype(kName, name, tensor, dtype);
    check_shape(kName, name, tensor, {});
    check_same_device(kName, name, tensor, params[0]);
  }
};

}  // namespace sendvae
