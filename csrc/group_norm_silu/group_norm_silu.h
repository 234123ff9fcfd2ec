// group_norm_silu: GroupNorm over channels-last feature maps, then SiLU, with the sum of a residual formed on the way.
//
//   s = x + residual                       rounded to the inputs' dtype; or x itself
//   xhat = (s - mean) rstd                 mean and rstd = 1 / sqrt(variance + eps) of each sample and group
//   z = xhat weight + bias;  y = z sigmoid(z), or z itself
//
//   dz = dy silu'(z)
//   ds = rstd (weight dz - mean(weight dz) - xhat mean(weight dz xhat)) + (the gradient of s as an output)
//   dweight = sum(dz xhat);  dbias = sum(dz)
//
// where mean(..) goes over a group. Everything is fp32. The variance is never a difference of large numbers: each chunk
// of pixels takes its squares around a mean of its own, and chunks are joined by the distance of their means. The
// backward computes z again. Shapes: B batch, P pixels (H W), C channels, G groups.
#pragma once

#include <optional>
#include <tuple>
#include <type_traits>

#include "../common/tensor.h"

namespace sendvae {

// ---- The arithmetic of one element ----

// To one unit of rounding on a GPU.
SENDVAE_HD float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  return __fdividef(1.0f, x);
#else
  return 1.0f / x;
#endif
}

// Of z of maps of T.
template <typename T>
SENDVAE_HD float sigmoid(float z) {
#if defined(__CUDA_ARCH__)
  const float e = __expf(-z);
  if constexpr (!std::is_same_v<T, float>) return reciprocal(1.0f + e);  // e may be infinite: 0
  // The reciprocal to half a unit, by a step of Newton's; of infinity it would make NaN.
  const float sum = 1.0f + fminf(e, 0x1p125f), approximate = reciprocal(sum);
  return approximate + approximate * (1.0f - sum * approximate);
#else
  const float low = z < -80.0f ? -80.0f : z;
  return 1.0f / (1.0f + exp_bounded(-(low > 80.0f ? 80.0f : low)));
#endif
}

template <typename T>
SENDVAE_HD float silu(float z) {
  return z * sigmoid<T>(z);
}

template <typename T>
SENDVAE_HD float silu_slope(float z) {
  const float s = sigmoid<T>(z);
  return s * (z * (1.0f - s) + 1.0f);
}

SENDVAE_HD float rstd_of(float variance, float eps) { return 1.0f / sqrtf(variance + eps); }

// The map from the elements of one sample and channel to z: scale is rstd weight.
struct Normalisation {
  float mean, scale, bias;
};

SENDVAE_HD float normalised(float x, const Normalisation& n) { return (x - n.mean) * n.scale + n.bias; }

template <typename T, bool kSilu>
SENDVAE_HD float group_norm_silu(float x, const Normalisation& n) {
  const float z = normalised(x, n);
  return kSilu ? silu<T>(z) : z;
}

// dz of an element, from its dy.
template <typename T, bool kSilu>
SENDVAE_HD float pre_activation_grad(float grad, float x, const Normalisation& n) {
  return kSilu ? grad * silu_slope<T>(normalised(x, n)) : grad;
}

// The numbers common to all gradients of one sample and group: ds = scale dz - constant - (s - mean) slope.
struct GroupGrad {
  float constant, slope;
};

// From the means of weight dz and of weight dz xhat over the group.
SENDVAE_HD GroupGrad group_grad(float mean, float mean_xhat, float rstd) {
  return {rstd * mean, rstd * rstd * mean_xhat};
}

SENDVAE_HD float input_grad(float grad_z, float x, const Normalisation& n, const GroupGrad& group) {
  return n.scale * grad_z - group.constant - (x - n.mean) * group.slope;
}

// ---- What a kernel is given ----

struct GroupNormShape {
  int64_t batch, pixels, channels, groups;

  SENDVAE_HD int64_t channels_per_group() const { return channels / groups; }
  SENDVAE_HD int64_t sample_elements() const { return pixels * channels; }
};

template <typename T>
struct GroupNormSiluArgs {
  const T* x;  // [B, P, C]
  const T* residual;  // [B, P, C], or null
  const float* weight;  // [C]
  const float* bias;  // [C]
  T* y;  // [B, P, C]
  T* s;  // [B, P, C], or null without a residual
  float* mean;  // [B, G]
  float* rstd;  // [B, G]
  GroupNormShape shape;
  float eps;
};

template <typename T>
struct GroupNormSiluBackwardArgs {
  const T* grad_y;  // [B, P, C]
  const T* grad_s;  // [B, P, C], or null: zero
  const T* s;  // [B, P, C], what was normalised
  const float* mean;  // [B, G]
  const float* rstd;  // [B, G]
  const float* weight;  // [C]
  const float* bias;  // [C]
  T* grad_x;  // [B, P, C]
  float* grad_weight;  // [C]
  float* grad_bias;  // [C]
  GroupNormShape shape;
};

// ---- From tensors to kernel arguments ----

inline GroupNormShape checked_shape(const char* op, const Tensor& x, int64_t num_groups) {
  check_float_dtype(op, "x", x);
  STD_TORCH_CHECK(x.dim() == 4, op, ": x must be [B, C, H, W], got ", shape_string(x));
  const GroupNormShape shape{x.size(0), x.size(2) * x.size(3), x.size(1), num_groups};
  STD_TORCH_CHECK(shape.pixels > 0 && shape.channels > 0, op, ": C, H and W must be positive, got ", shape_string(x));
  STD_TORCH_CHECK(num_groups > 0 && shape.channels % num_groups == 0, op, ": ", shape.channels,
                  " channels cannot be split into ", num_groups, " groups");
  return shape;
}

// Checks `tensor` against the first [B, C, H, W] argument and returns it channels-last, copied only if it is not.
inline Tensor checked_map(const char* op, const char* name, const Tensor& tensor, const Tensor& first) {
  check_same_device(op, name, tensor, first);
  check_dtype(op, name, tensor, first.scalar_type());
  check_shape(op, name, tensor, {first.size(0), first.size(1), first.size(2), first.size(3)});
  return packed_channels_last(tensor);
}

// Of [2, B, G], the means, then the rstds. One tensor, because two take longer to make, to keep and to hand on.
template <typename Pointer>
struct Statistics {
  Pointer mean, rstd;

  Statistics(Pointer stats, const GroupNormShape& shape) : mean(stats), rstd(stats + shape.batch * shape.groups) {}
};

inline Tensor checked_statistics(const char* op, const Tensor& stats, const Tensor& first,
                                 const GroupNormShape& shape) {
  check_same_device(op, "stats", stats, first);
  check_dtype(op, "stats", stats, ScalarType::Float);
  check_shape(op, "stats", stats, {2, shape.batch, shape.groups});
  return packed(stats);
}

inline Tensor empty_floats(const Tensor& like, std::initializer_list<int64_t> shape) {
  return empty_on(like, shape, ScalarType::Float);
}

// Holds the checked inputs and fresh outputs of one forward call.
struct GroupNormSilu {
  static constexpr const char* kName = "group_norm_silu";
  GroupNormShape shape;
  Tensor x, weight, bias;
  std::optional<Tensor> residual;
  float eps;
  Tensor y, s, stats;

  GroupNormSilu(const Tensor& x_, const std::optional<Tensor>& residual_, const Tensor& weight_, const Tensor& bias_,
                int64_t num_groups, double eps_)
      : shape(checked_shape(kName, x_, num_groups)), eps(static_cast<float>(eps_)) {
    x = packed_channels_last(x_);
    if (residual_.has_value()) residual = checked_map(kName, "residual", *residual_, x_);
    weight = checked_vector(kName, "weight", weight_, x_, ScalarType::Float, shape.channels);
    bias = checked_vector(kName, "bias", bias_, x_, ScalarType::Float, shape.channels);
    y = empty_channels_last(x_);
    s = residual ? empty_channels_last(x_) : empty_on(x_, {0}, x_.scalar_type());
    stats = empty_floats(x_, {2, shape.batch, shape.groups});
  }

  template <typename T>
  GroupNormSiluArgs<T> args() const {
    const Statistics<float*> statistics(mutable_data<float>(stats), shape);
    return {data<T>(x),
            residual ? data<T>(*residual) : nullptr,
            data<float>(weight),
            data<float>(bias),
            mutable_data<T>(y),
            residual ? mutable_data<T>(s) : nullptr,
            statistics.mean,
            statistics.rstd,
            shape,
            eps};
  }

  std::tuple<Tensor, Tensor, Tensor> outputs() const { return {y, s, stats}; }
};

// Holds the checked inputs and fresh outputs of one backward call.
struct GroupNormSiluBackward {
  static constexpr const char* kName = "group_norm_silu_backward";
  GroupNormShape shape;
  Tensor grad_y, s, stats, weight, bias;
  std::optional<Tensor> grad_s;
  Tensor grad_x, grad_weight, grad_bias;

  GroupNormSiluBackward(const Tensor& grad_y_, const std::optional<Tensor>& grad_s_, const Tensor& s_,
                        const Tensor& stats_, const Tensor& weight_, const Tensor& bias_, int64_t num_groups)
      : shape(checked_shape(kName, s_, num_groups)) {
    s = packed_channels_last(s_);
    grad_y = checked_map(kName, "grad_y", grad_y_, s_);
    if (grad_s_.has_value()) grad_s = checked_map(kName, "grad_s", *grad_s_, s_);
    stats = checked_statistics(kName, stats_, s_, shape);
    weight = checked_vector(kName, "weight", weight_, s_, ScalarType::Float, shape.channels);
    bias = checked_vector(kName, "bias", bias_, s_, ScalarType::Float, shape.channels);
    grad_x = empty_channels_last(s_);
    grad_weight = empty_floats(s_, {shape.channels});
    grad_bias = empty_floats(s_, {shape.channels});
  }

  template <typename T>
  GroupNormSiluBackwardArgs<T> args() const {
    const Statistics<const float*> statistics(data<float>(stats), shape);
    return {data<T>(grad_y),
            grad_s ? data<T>(*grad_s) : nullptr,
            data<T>(s),
            statistics.mean,
            statistics.rstd,
            data<float>(weight),
            data<float>(bias),
            mutable_data<T>(grad_x),
            mutable_data<float>(grad_weight),
            mutable_data<float>(grad_bias),
            shape};
  }

  std::tuple<Tensor, Tensor, Tensor> outputs() const { return {grad_x, grad_weight, grad_bias}; }
};

}  // namespace sendvae
