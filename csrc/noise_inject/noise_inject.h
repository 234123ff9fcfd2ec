// noise_inject: reparameterise, normalise, interpolate with noise.
//
//   std = exp(clamp(spread, -30, 20) / 2), or spread itself with spread_is_std
//   z = mean + std e1;  n = (z - latent_mean) / latent_std;  z_t = (1 - t) n + t e2;  velocity = e2 - n
//
// e1, e2 and t come from Philox by (seed, step, sample id), and again in the backward: noise is never stored. All
// arithmetic is fp32 and n uses the unrounded z. With a patch size P, z_t and its gradient are tokens [B, N, C P P].
// Shapes: B batch, C channels, H W height and width, N = (H / P) (W / P).
#pragma once

#include <optional>
#include <tuple>

#include "../common/philox.h"
#include "../common/tensor.h"

namespace sendvae {

// ---- The arithmetic of one element ----

constexpr float kLogVarianceMin = -30.0f;
constexpr float kLogVarianceMax = 20.0f;

// NaN passes through, as with torch.clamp.
SENDVAE_HD float clamp_log_variance(float x) {
  x = x < kLogVarianceMin ? kLogVarianceMin : x;
  return x > kLogVarianceMax ? kLogVarianceMax : x;
}

SENDVAE_HD float std_from_spread(float spread, bool spread_is_std) {
  return spread_is_std ? spread : exp_bounded(0.5f * clamp_log_variance(spread));
}

struct Injected {
  float z, z_t, velocity;
};

// n: z, normalised.
SENDVAE_HD Injected inject(float z, float n, float t, float e2) { return {z, (1.0f - t) * n + t * e2, e2 - n}; }

struct InjectedGrad {
  float mean, spread;
};

// grad: the gradient of z, all outputs' parts in it.
SENDVAE_HD InjectedGrad inject_backward(float grad, float spread, float std, bool spread_is_std, float e1) {
  // d std / d spread: std / 2 for a log-variance inside the clamp (its ends included), 0 outside.
  float slope = 0.5f * std;
  slope = spread < kLogVarianceMin ? 0.0f : slope;
  slope = spread > kLogVarianceMax ? 0.0f : slope;
  return {grad, grad * (spread_is_std ? 1.0f : slope) * e1};
}

// ---- Where the tokens are ----

// Tokens are in row-major order of their patches; a token's features are ordered (channel, row, column in the patch).
struct PatchGrid {
  uint32_t patch;     // P, or 0: z_t is not patchified
  uint32_t width;     // W
  uint32_t features;  // of a token: C P P
};

// Index in a sample's tokens [N, C P P] of its element at `row`, `column` of a channel's plane.
SENDVAE_HD uint32_t token_index(const PatchGrid& grid, uint32_t channel, uint32_t row, uint32_t column) {
  const uint32_t token = row / grid.patch * (grid.width / grid.patch) + column / grid.patch;
  const uint32_t feature = (channel * grid.patch + row % grid.patch) * grid.patch + column % grid.patch;
  return token * grid.features + feature;
}

// ---- What a kernel is given ----

// A [B, C, H, W] tensor that is read: its samples are packed and `stride` elements apart, or all its elements are the
// one at `data`. (Gradients are often expanded from one number: after a sum, or zero for an unused output.)
template <typename T>
struct Samples {
  const T* data;
  int64_t stride;
  bool uniform;
};

template <typename T>
struct NoiseInjectArgs {
  Samples<T> mean, spread;
  const float* latent_mean;     // [C]
  const float* latent_std;      // [C]
  const int64_t* key;           // [2]: seed, step
  const int64_t* sample_ids;    // [B]
  const float* given_t;         // [B], or null: draw it
  T *z, *z_t, *velocity;        // [B, C, H, W] or tokens (z_t), packed; z and velocity may be null: not needed
  float* t;                     // [B]
  int64_t batch;
  uint32_t elements;            // C H W
  uint32_t plane;               // H W
  PatchGrid grid;
  bool spread_is_std;
};

template <typename T>
struct NoiseInjectBackwardArgs {
  Samples<T> grad_z, grad_z_t, grad_velocity, spread;  // grad_z_t may be tokens
  const float* latent_std;      // [C]
  const int64_t* key;           // [2]: seed, step
  const int64_t* sample_ids;    // [B]
  const float* t;               // [B]
  T *grad_mean, *grad_spread;   // [B, C, H, W], packed
  int64_t batch;
  uint32_t elements;            // C H W
  uint32_t plane;               // H W
  PatchGrid grid;
  bool spread_is_std;
};

// ---- From tensors to kernel arguments ----

inline bool is_uniform(const Tensor& tensor) {
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) != 1 && tensor.stride(i) != 0) return false;
  }
  return tensor.numel() > 0;
}

inline Tensor packed_or_uniform(const Tensor& tensor) { return is_uniform(tensor) ? tensor : inner_contiguous(tensor); }

template <typename T>
T* data_or_null(const Tensor& tensor) {
  return tensor.numel() > 0 ? mutable_data<T>(tensor) : nullptr;
}

template <typename T>
Samples<T> samples(const Tensor& tensor) {
  return {data<T>(tensor), tensor.stride(0), is_uniform(tensor)};
}

// Checks `tensor` against the first [B, C, H, W] argument and returns it with packed samples,
// copied only if it must be.
inline Tensor checked_samples(const char* op, const char* name, const Tensor& tensor, const Tensor& first) {
  check_same_device(op, name, tensor, first);
  check_dtype(op, name, tensor, first.scalar_type());
  check_shape(op, name, tensor, {first.size(0), first.size(1), first.size(2), first.size(3)});
  return packed_or_uniform(tensor);
}

inline PatchGrid make_grid(const char* op, const Tensor& tensor, const std::optional<int64_t>& patch_size) {
  const int64_t channels = tensor.size(1), height = tensor.size(2), width = tensor.size(3);
  if (!patch_size.has_value()) return {0, static_cast<uint32_t>(width), 0};
  const int64_t patch = *patch_size;
  STD_TORCH_CHECK(patch > 0 && height % patch == 0 && width % patch == 0, op, ": patch_size ", patch,
                  " must be positive and divide the height and width of ", shape_string(tensor));
  return {static_cast<uint32_t>(patch), static_cast<uint32_t>(width), static_cast<uint32_t>(channels * patch * patch)};
}

inline int64_t num_tokens(const Tensor& tensor, const PatchGrid& grid) {
  return (tensor.size(2) / grid.patch) * (tensor.size(3) / grid.patch);
}

// `checked_samples` for the gradient of tokens.
inline Tensor checked_tokens(const char* op, const Tensor& tensor, const Tensor& first, const PatchGrid& grid) {
  check_same_device(op, "grad_z_t", tensor, first);
  check_dtype(op, "grad_z_t", tensor, first.scalar_type());
  check_shape(op, "grad_z_t", tensor, {first.size(0), num_tokens(first, grid), grid.features});
  return packed_or_uniform(tensor);
}

// Holds the checked inputs and fresh outputs of one forward call.
struct NoiseInject {
  static constexpr const char* kName = "noise_inject";
  Tensor mean, spread, latent_mean, latent_std, key, sample_ids;
  std::optional<Tensor> given_t;
  PatchGrid grid;
  bool spread_is_std;
  Tensor z, z_t, velocity, t;

  NoiseInject(const Tensor& mean_, const Tensor& spread_, const Tensor& latent_mean_, const Tensor& latent_std_,
              const Tensor& key_, const Tensor& sample_ids_, const std::optional<Tensor>& t_, bool spread_is_std_,
              const std::optional<int64_t>& patch_size, bool need_z, bool need_velocity)
      : spread_is_std(spread_is_std_) {
    check_float_dtype(kName, "mean", mean_);
    check_sample_shape(kName, mean_);
    grid = make_grid(kName, mean_, patch_size);
    const int64_t batch = mean_.size(0), channels = mean_.size(1);
    mean = packed_or_uniform(mean_);
    spread = checked_samples(kName, "spread", spread_, mean_);
    latent_mean = checked_vector(kName, "latent_mean", latent_mean_, mean_, ScalarType::Float, channels);
    latent_std = checked_vector(kName, "latent_std", latent_std_, mean_, ScalarType::Float, channels);
    key = checked_vector(kName, "key", key_, mean_, ScalarType::Long, 2);
    sample_ids = checked_vector(kName, "sample_ids", sample_ids_, mean_, ScalarType::Long, batch);
    if (t_.has_value()) given_t = checked_vector(kName, "t", *t_, mean_, ScalarType::Float, batch);
    z = need_z ? empty_packed(mean_) : empty_on(mean_, {0}, mean_.scalar_type());
    z_t = grid.patch ? empty_on(mean_, {batch, num_tokens(mean_, grid), grid.features}, mean_.scalar_type())
                     : empty_packed(mean_);
    velocity = need_velocity ? empty_packed(mean_) : empty_on(mean_, {0}, mean_.scalar_type());
    t = empty_on(latent_mean, {batch}, ScalarType::Float);
  }

  template <typename T>
  NoiseInjectArgs<T> args() const {
    return {samples<T>(mean),
            samples<T>(spread),
            data<float>(latent_mean),
            data<float>(latent_std),
            data<int64_t>(key),
            data<int64_t>(sample_ids),
            given_t.has_value() ? data<float>(*given_t) : nullptr,
            data_or_null<T>(z),
            mutable_data<T>(z_t),
            data_or_null<T>(velocity),
            mutable_data<float>(t),
            mean.size(0),
            static_cast<uint32_t>(mean.size(1) * mean.size(2) * mean.size(3)),
            static_cast<uint32_t>(mean.size(2) * mean.size(3)),
            grid,
            spread_is_std};
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> outputs() const { return {z, z_t, velocity, t}; }
};

// Holds the checked inputs and fresh outputs of one backward call.
struct NoiseInjectBackward {
  static constexpr const char* kName = "noise_inject_backward";
  Tensor grad_z, grad_z_t, grad_velocity, spread, latent_std, key, sample_ids, t;
  PatchGrid grid;
  bool spread_is_std;
  Tensor grad_mean, grad_spread;

  NoiseInjectBackward(const Tensor& grad_z_, const Tensor& grad_z_t_, const Tensor& grad_velocity_,
                      const Tensor& spread_, const Tensor& latent_std_, const Tensor& key_, const Tensor& sample_ids_,
                      const Tensor& t_, bool spread_is_std_, const std::optional<int64_t>& patch_size)
      : spread_is_std(spread_is_std_) {
    check_float_dtype(kName, "grad_z", grad_z_);
    check_sample_shape(kName, grad_z_);
    grid = make_grid(kName, grad_z_, patch_size);
    const int64_t batch = grad_z_.size(0), channels = grad_z_.size(1);
    grad_z = packed_or_uniform(grad_z_);
    grad_z_t = grid.patch ? checked_tokens(kName, grad_z_t_, grad_z_, grid)
                          : checked_samples(kName, "grad_z_t", grad_z_t_, grad_z_);
    grad_velocity = checked_samples(kName, "grad_velocity", grad_velocity_, grad_z_);
    spread = checked_samples(kName, "spread", spread_, grad_z_);
    latent_std = checked_vector(kName, "latent_std", latent_std_, grad_z_, ScalarType::Float, channels);
    key = checked_vector(kName, "key", key_, grad_z_, ScalarType::Long, 2);
    sample_ids = checked_vector(kName, "sample_ids", sample_ids_, grad_z_, ScalarType::Long, batch);
    t = checked_vector(kName, "t", t_, grad_z_, ScalarType::Float, batch);
    grad_mean = empty_packed(grad_z_);
    grad_spread = empty_packed(grad_z_);
  }

  template <typename T>
  NoiseInjectBackwardArgs<T> args() const {
    return {samples<T>(grad_z),
            samples<T>(grad_z_t),
            samples<T>(grad_velocity),
            samples<T>(spread),
            data<float>(latent_std),
            data<int64_t>(key),
            data<int64_t>(sample_ids),
            data<float>(t),
            mutable_data<T>(grad_mean),
            mutable_data<T>(grad_spread),
            spread.size(0),
            static_cast<uint32_t>(spread.size(1) * spread.size(2) * spread.size(3)),
            static_cast<uint32_t>(spread.size(2) * spread.size(3)),
            grid,
            spread_is_std};
  }

  std::tuple<Tensor, Tensor> outputs() const { return {grad_mean, grad_spread}; }
};

}  // namespace sendvae
