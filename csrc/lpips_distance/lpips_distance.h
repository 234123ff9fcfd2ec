// lpips_distance: a layer's term of LPIPS, without normalised copies of the features.
//
//   u0 = f0 / (|f0| + 1e-10), u1 = f1 / (|f1| + 1e-10)      norms over the channels of a pixel
//   distance = mean over pixels of sum over channels of w (u0 - u1)^2
//   d distance / d f0 = 2 / (P (|f0| + 1e-10)) (w (u0 - u1) - <w (u0 - u1), u0> f0 / |f0|)
//
// and with the sides exchanged for f1; the last term is 0 where the norm is. The sums over channels are fp32. Shapes: B
// batch, C channels, H W height and width, P = H W pixels.
#pragma once

#include <cmath>
#include <tuple>

#include "../common/planes.h"
#include "../common/tensor.h"

namespace sendvae {

// ---- The arithmetic of one pixel ----

// Planes of `stats`, fp32 [B, 4, P], for a pixel's backward pass: the norm of each side, and <w (u0 - u1), u0> and
// <w (u1 - u0), u1>.
enum Statistic { kNorm0, kNorm1, kDot0, kDot1, kNumStatistics };

SENDVAE_HD float floored_norm(float norm) { return norm + 1e-10f; }

// Adds a channel's part to a pixel's distance and to the products that its gradient needs.
SENDVAE_HD void add_channel(float u0, float u1, float weight, float& distance, float& dot0, float& dot1) {
  const float difference = u0 - u1, weighted = weight * difference;
  distance += weighted * difference;
  dot0 += weighted * u0;
  dot1 -= weighted * u1;
}

// What the gradient of one side is made of besides a pixel's features; `along` is the part along its own unit vector.
struct PixelGrad {
  float floored_own, floored_other, scale, along;
};

// `grad` is that of the sum over the pixels of a sample, `stats` those of the sample.
SENDVAE_HD PixelGrad pixel_grad(float grad, const float* stats, int side, int64_t pixels, int64_t pixel) {
  const float norm = stats[(kNorm0 + side) * pixels + pixel], dot = stats[(kDot0 + side) * pixels + pixel];
  const float floored = floored_norm(norm);
  return {floored, floored_norm(stats[(kNorm1 - side) * pixels + pixel]), 2.0f * grad / floored,
          norm == 0.0f ? 0.0f : dot * (floored / norm)};
}

SENDVAE_HD float channel_grad(float own, float other, float weight, const PixelGrad& pixel) {
  // Divided as in the forward pass, so that what cancels there cancels here.
  const float unit = own / pixel.floored_own;
  return pixel.scale * (weight * (unit - other / pixel.floored_other) - pixel.along * unit);
}

// ---- What a kernel is given ----

template <typename T>
struct LpipsDistanceArgs {
  Planes<T> f0, f1;
  const float* weight;  // [C]
  float* distance;  // [B]
  float* stats;  // [B, 4, P]
  int64_t batch, channels, pixels;
};

// The gradient of one side's own features.
template <typename T>
struct LpipsDistanceBackwardArgs {
  const float* grad;  // [B]
  Planes<T> own, other;
  const float* weight;  // [C]
  const float* stats;  // [B, 4, P]
  T* grad_own;  // [B, C, P], or [B, P, C] if channels-last; null: not needed
  int side;  // 0 or 1
  int64_t batch, channels, pixels;
};

// ---- From tensors to kernel arguments ----

// Features are read with unit stride: over the channels if both have it there (then gradients are channels-last), else
// over the pixels.
inline bool is_channels_last(const Tensor& f0, const Tensor& f1) {
  return f0.size(1) > 1 && f0.stride(1) == 1 && f1.stride(1) == 1;
}

inline Tensor with_unit_stride(const Tensor& tensor, bool channels_last) {
  if (has_plane_stride(tensor) && (channels_last || plane_stride(tensor) == 1)) return tensor;
  return torch::stable::contiguous(tensor, channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                                         : torch::headeronly::MemoryFormat::Contiguous);
}

inline void check_features(const char* op, const Tensor& f0, const Tensor& f1, const Tensor& weight) {
  check_float_dtype(op, "f0", f0);
  STD_TORCH_CHECK(f0.dim() == 4, op, ": f0 must be [B, C, H, W], got ", shape_string(f0));
  check_same_device(op, "f1", f1, f0);
  check_dtype(op, "f1", f1, f0.scalar_type());
  check_shape(op, "f1", f1, {f0.size(0), f0.size(1), f0.size(2), f0.size(3)});
  check_same_device(op, "weight", weight, f0);
  check_dtype(op, "weight", weight, ScalarType::Float);
  check_shape(op, "weight", weight, {f0.size(1)});
}

// Holds the checked inputs and fresh outputs of one forward call.
struct LpipsDistance {
  static constexpr const char* kName = "lpips_distance";
  Tensor f0, f1, weight;
  bool channels_last;
  Tensor distance, stats;

  LpipsDistance(const Tensor& f0_, const Tensor& f1_, const Tensor& weight_) {
    check_features(kName, f0_, f1_, weight_);
    channels_last = is_channels_last(f0_, f1_);
    f0 = with_unit_stride(f0_, channels_last);
    f1 = with_unit_stride(f1_, channels_last);
    weight = packed(weight_);
    distance = empty_on(f0_, {f0.size(0)}, ScalarType::Float);
    stats = empty_on(f0_, {f0.size(0), kNumStatistics, f0.size(2) * f0.size(3)}, ScalarType::Float);
  }

  template <typename T>
  LpipsDistanceArgs<T> args() const {
    return {
        planes<T>(f0), planes<T>(f1), data<float>(weight),    mutable_data<float>(distance), mutable_data<float>(stats),
        f0.size(0),    f0.size(1),    f0.size(2) * f0.size(3)};
  }

  std::tuple<Tensor, Tensor> outputs() const { return {distance, stats}; }
};

// Holds the checked inputs and fresh outputs of one backward call.
struct LpipsDistanceBackward {
  static constexpr const char* kName = "lpips_distance_backward";
  Tensor grad, f0, f1, weight, stats;
  bool channels_last;
  Tensor grad0, grad1;

  LpipsDistanceBackward(const Tensor& grad_, const Tensor& f0_, const Tensor& f1_, const Tensor& weight_,
                        const Tensor& stats_, bool need0, bool need1) {
    check_features(kName, f0_, f1_, weight_);
    channels_last = is_channels_last(f0_, f1_);
    f0 = with_unit_stride(f0_, channels_last);
    f1 = with_unit_stride(f1_, channels_last);
    weight = packed(weight_);
    grad = checked_vector(kName, "grad", grad_, f0_, ScalarType::Float, f0.size(0));
    check_same_device(kName, "stats", stats_, f0_);
    check_dtype(kName, "stats", stats_, ScalarType::Float);
    check_shape(kName, "stats", stats_, {f0.size(0), kNumStatistics, f0.size(2) * f0.size(3)});
    stats = packed(stats_);
    grad0 = empty_grad(need0);
    grad1 = empty_grad(need1);
  }

  template <typename T>
  LpipsDistanceBackwardArgs<T> args(int side) const {
    const Tensor& grad_own = side == 0 ? grad0 : grad1;
    return {data<float>(grad),
            planes<T>(side == 0 ? f0 : f1),
            planes<T>(side == 0 ? f1 : f0),
            data<float>(weight),
            data<float>(stats),
            grad_own.dim() == 4 ? mutable_data<T>(grad_own) : nullptr,
            side,
            f0.size(0),
            f0.size(1),
            f0.size(2) * f0.size(3)};
  }

  std::tuple<Tensor, Tensor> outputs() const { return {grad0, grad1}; }

 private:
  Tensor empty_grad(bool needed) const {
    if (!needed) return empty_on(f0, {0}, f0.scalar_type());
    return channels_last ? empty_channels_last(f0) : empty_packed(f0);
  }
};

}  // namespace sendvae
