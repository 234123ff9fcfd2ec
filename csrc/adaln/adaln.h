// adaln: gated residual, LayerNorm or RMSNorm without affine, modulation, as one.
//
//   s = x + gate branch, rounded to the type of x (or s = x);  h = (s - mean) rstd;  y = h (1 + scale) + shift
//   g = grad_y (1 + scale);  grad_x = grad_s + rstd (g - mean(g) - h mean(g h));  grad_branch = grad_x gate
//   grad_gate, grad_scale, grad_shift = sums over N of grad_x branch, grad_y h, grad_y
//
// In RMSNorm the means of s and of g count as 0: the kernels multiply their sums by `mean_factor`.
//
// Arithmetic is fp32. The sums over N are made in two steps, first over chunks of tokens and then over the chunks, so
// that the order is the same whatever ran first. Shapes: B batch, N tokens, D width; T type of the tokens, M of the
// modulation (T or float).
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "../common/tensor.h"

namespace sendvae {

// ---- The arithmetic of one element ----

// The numbers of a token that the backward needs besides s; stored in this order.
struct LayerNormStats {
  float mean, rstd;
};

template <typename T>
SENDVAE_HD float gated_sum(float x, float gate, float branch) {
  return to_float(from_float<T>(x + gate * branch));  // y is the norm of what is stored
}

// From the sums over D of d = s - center and of d^2. The center is the mean up to rounding; the rest is corrected here.
template <typename Args>
SENDVAE_HD LayerNormStats stats_from_deviations(float center, float sum, float square_sum, const Args& args) {
  const float correction = sum * args.mean_factor;
  const float variance = square_sum * args.inverse_width - correction * correction;
  // Not below 0, and NaN stays.
  return {center + correction, 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance) + args.eps)};
}

SENDVAE_HD float normalised(float s, LayerNormStats stats) { return (s - stats.mean) * stats.rstd; }

// Means over D of g and of g h.
struct LayerNormGradMeans {
  float g, gh;
};

SENDVAE_HD float layer_norm_grad(float g, float h, LayerNormGradMeans means, float rstd) {
  return rstd * (g - means.g - h * means.gh);
}

// ---- What a kernel is given ----

// A [B, N, D] tensor with stride 1 along D.
template <typename T>
struct Tokens {
  T* data;
  int64_t batch_stride, token_stride;
  SENDVAE_HD T* at(int64_t sample, int64_t token) const { return data + sample * batch_stride + token * token_stride; }
};

// A [B, D] tensor with stride 1 along D.
template <typename M>
struct ModulationRows {
  const M* data;
  int64_t stride;
  SENDVAE_HD const M* at(int64_t sample) const { return data + sample * stride; }
};

template <typename T, typename M>
struct AdalnArgs {
  Tokens<const T> x, branch;
  ModulationRows<M> gate, shift, scale;
  bool has_branch;        // else branch, gate and s are null
  T* y;                   // [B, N, D], packed
  T* s;                   // [B, N, D], packed
  LayerNormStats* stats;  // [B, N]
  int64_t batch, tokens, width;
  float inverse_width, mean_factor;  // 1 / D both, but that of a mean is 0 in RMSNorm
  float eps;
};

template <typename T, typename M>
struct AdalnBackwardArgs {
  Tokens<const T> grad_y, grad_s, s, branch;
  ModulationRows<M> gate, scale;
  bool has_grad_s;              // else grad_s is null, and counts as 0
  bool has_branch;              // else branch, gate and their gradients are null
  const LayerNormStats* stats;  // [B, N]
  T* grad_x;                    // [B, N, D], packed
  T* grad_branch;               // [B, N, D], packed
  M *grad_gate, *grad_shift, *grad_scale;  // [B, D], packed
  float* partials;                         // [B, chunks, 3, D]: sums over a chunk for shift, scale, gate
  int64_t batch, tokens, width, chunks, chunk_tokens;
  float inverse_width, mean_factor;
};

constexpr int kShiftPartial = 0, kScalePartial = 1, kGatePartial = 2, kPartials = 3;

// ---- From tensors to kernel arguments ----

inline Tensor unit_stride_last(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) == 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor checked_tokens(const char* op, const char* name, const Tensor& tensor, const Tensor& first) {
  check_same_device(op, name, tensor, first);
  check_dtype(op, name, tensor, first.scalar_type());
  check_shape(op, name, tensor, {first.size(0), first.size(1), first.size(2)});
  return unit_stride_last(tensor);
}

inline Tensor checked_modulation(const char* op, const char* name, const Tensor& tensor, const Tensor& first,
                                 ScalarType dtype) {
  check_same_device(op, name, tensor, first);
  check_dtype(op, name, tensor, dtype);
  check_shape(op, name, tensor, {first.size(0), first.size(2)});
  return unit_stride_last(tensor);
}

// Checks the first tokens of a call, by which the other arguments are measured, and the modulation's type.
inline void check_first_tokens(const char* op, const char* name, const Tensor& tokens, ScalarType modulation,
                               bool has_branch, bool has_gate) {
  check_float_dtype(op, name, tokens);
  STD_TORCH_CHECK(tokens.dim() == 3 && tokens.size(2) > 0, op, ": ", name, " must be [B, N, D] with D > 0, got ",
                  shape_string(tokens));
  STD_TORCH_CHECK(modulation == ScalarType::Float || modulation == tokens.scalar_type(), op,
                  ": scale must be Float or of the type of ", name, ", got ", torch::headeronly::toString(modulation));
  STD_TORCH_CHECK(has_branch == has_gate, op, ": branch and gate go together: give both or neither");
}

template <typename T>
Tokens<const T> tokens_of(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return {nullptr, 0, 0};
  return {data<T>(*tensor), tensor->stride(0), tensor->stride(1)};
}

template <typename M>
ModulationRows<M> modulation_of(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return {nullptr, 0};
  return {data<M>(*tensor), tensor->stride(0)};
}

inline float mean_factor(const Tensor& tokens, bool rms) {
  return rms ? 0.0f : 1.0f / static_cast<float>(tokens.size(2));
}

// Calls `function` with a value of the tokens' and one of the modulation's storage type.
template <typename Function>
void dispatch_tokens_and_modulation(ScalarType tokens, ScalarType modulation, const Function& function) {
  dispatch_float(tokens, [&](auto token_type) {
    if (modulation == ScalarType::Float) return function(token_type, float{});
    return function(token_type, token_type);
  });
}

// Holds the checked inputs and fresh outputs of one forward call.
struct Adaln {
  static constexpr const char* kName = "adaln";
  Tensor x, shift, scale;
  std::optional<Tensor> branch, gate;
  float eps;
  bool rms;
  Tensor y, s, stats;

  Adaln(const Tensor& x_, const std::optional<Tensor>& branch_, const std::optional<Tensor>& gate_,
        const Tensor& shift_, const Tensor& scale_, double eps_, bool rms_)
      : eps(static_cast<float>(eps_)), rms(rms_) {
    const ScalarType modulation = scale_.scalar_type();
    check_first_tokens(kName, "x", x_, modulation, branch_.has_value(), gate_.has_value());
    x = unit_stride_last(x_);
    shift = checked_modulation(kName, "shift", shift_, x_, modulation);
    scale = checked_modulation(kName, "scale", scale_, x_, modulation);
    if (branch_.has_value()) {
      branch = checked_tokens(kName, "branch", *branch_, x_);
      gate = checked_modulation(kName, "gate", *gate_, x_, modulation);
    }
    y = empty_on(x_, x_.sizes(), x_.scalar_type());
    s = branch.has_value() ? empty_on(x_, x_.sizes(), x_.scalar_type()) : empty_on(x_, {0}, x_.scalar_type());
    stats = empty_on(x_, {x_.size(0), x_.size(1), 2}, ScalarType::Float);
  }

  template <typename T, typename M>
  AdalnArgs<T, M> args() const {
    return {tokens_of<T>(x),
            tokens_of<T>(branch),
            modulation_of<M>(gate),
            modulation_of<M>(shift),
            modulation_of<M>(scale),
            branch.has_value(),
            mutable_data<T>(y),
            branch.has_value() ? mutable_data<T>(s) : nullptr,
            mutable_data<LayerNormStats>(stats),
            x.size(0),
            x.size(1),
            x.size(2),
            1.0f / static_cast<float>(x.size(2)),
            mean_factor(x, rms),
            eps};
  }

  std::tuple<Tensor, Tensor, Tensor> outputs() const { return {y, s, stats}; }
};

// Holds the checked inputs, fresh outputs and scratch of one backward call.
struct AdalnBackward {
  static constexpr const char* kName = "adaln_backward";
  Tensor grad_y, s, scale, stats;
  std::optional<Tensor> grad_s, branch, gate;
  Tensor grad_x, grad_branch, grad_gate, grad_shift, grad_scale;
  bool rms;
  int64_t chunk_tokens, chunks;
  Tensor partials;

  // chunk_tokens_: tokens of one sample that are summed together.
  AdalnBackward(const Tensor& grad_y_, const std::optional<Tensor>& grad_s_, const Tensor& s_,
                const std::optional<Tensor>& branch_, const std::optional<Tensor>& gate_, const Tensor& scale_,
                const Tensor& stats_, bool rms_, int64_t chunk_tokens_)
      : rms(rms_), chunk_tokens(chunk_tokens_) {
    const ScalarType modulation = scale_.scalar_type();
    check_first_tokens(kName, "s", s_, modulation, branch_.has_value(), gate_.has_value());
    const int64_t batch = s_.size(0), tokens = s_.size(1), width = s_.size(2);
    s = unit_stride_last(s_);
    grad_y = checked_tokens(kName, "grad_y", grad_y_, s_);
    if (grad_s_.has_value()) grad_s = checked_tokens(kName, "grad_s", *grad_s_, s_);
    scale = checked_modulation(kName, "scale", scale_, s_, modulation);
    check_same_device(kName, "stats", stats_, s_);
    check_dtype(kName, "stats", stats_, ScalarType::Float);
    check_shape(kName, "stats", stats_, {batch, tokens, 2});
    stats = packed(stats_);
    const bool has_branch = branch_.has_value();
    if (has_branch) {
      branch = checked_tokens(kName, "branch", *branch_, s_);
      gate = checked_modulation(kName, "gate", *gate_, s_, modulation);
    }
    grad_x = empty_on(s_, s_.sizes(), s_.scalar_type());
    grad_branch = has_branch ? empty_on(s_, s_.sizes(), s_.scalar_type()) : empty_on(s_, {0}, s_.scalar_type());
    grad_gate = has_branch ? empty_on(scale_, {batch, width}, modulation) : empty_on(scale_, {0}, modulation);
    grad_shift = empty_on(scale_, {batch, width}, modulation);
    grad_scale = empty_on(scale_, {batch, width}, modulation);
    chunks = std::max<int64_t>(1, (tokens + chunk_tokens - 1) / chunk_tokens);  // without tokens the sums are 0
    partials = empty_on(s_, {batch, chunks, kPartials, width}, ScalarType::Float);
  }

  template <typename T, typename M>
  AdalnBackwardArgs<T, M> args() const {
    const bool has_branch = branch.has_value();
    return {tokens_of<T>(grad_y),
            tokens_of<T>(grad_s),
            tokens_of<T>(s),
            tokens_of<T>(branch),
            modulation_of<M>(gate),
            modulation_of<M>(scale),
            grad_s.has_value(),
            has_branch,
            data<LayerNormStats>(stats),
            mutable_data<T>(grad_x),
            has_branch ? mutable_data<T>(grad_branch) : nullptr,
            has_branch ? mutable_data<M>(grad_gate) : nullptr,
            mutable_data<M>(grad_shift),
            mutable_data<M>(grad_scale),
            mutable_data<float>(partials),
            s.size(0),
            s.size(1),
            s.size(2),
            chunks,
            chunk_tokens,
            1.0f / static_cast<float>(s.size(2)),
            mean_factor(s, rms)};
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> outputs() const {
    return {grad_x, grad_branch, grad_gate, grad_shift, grad_scale};
  }
};

}  // namespace sendvae
