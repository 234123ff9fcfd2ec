// center_crop: the ADM centre crop of uint8 pictures of any sizes, bit-exact to Pillow, as uint8 or as networks take
// it.
//
//   crop = plan_crop's passes over the picture                    (plan.h)
//   pixels = crop / 127.5 - 1;  normalised = (crop / 255 - mean) / std
//
// Shapes: a picture is [H, W, 3] with packed rows; B pictures, S the crop's side.
#pragma once

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/tensor.h"
#include "plan.h"

namespace sendvae {

constexpr int kChannels = 3;

// ---- The arithmetic of one value ----

// A weighted sum of pixels starts from this half unit, so that dropping the fraction rounds.
constexpr int32_t kRoundingHalf = 1 << (kFractionBits - 1);

SENDVAE_HD uint8_t pixel_from_sum(int32_t sum) {
  const int32_t value = sum >> kFractionBits;
  return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

// A pixel of a pass: out = sum over k < count of weights[k] * in[k * step].
SENDVAE_HD void resample_pixel(const uint8_t* in, int64_t step, const int32_t* weights, int32_t count, uint8_t* out) {
  int32_t sums[kChannels] = {kRoundingHalf, kRoundingHalf, kRoundingHalf};
  for (int32_t k = 0; k < count; ++k) {
    SENDVAE_UNROLL
    for (int c = 0; c < kChannels; ++c) sums[c] += weights[k] * in[k * step + c];
  }
  SENDVAE_UNROLL
  for (int c = 0; c < kChannels; ++c) out[c] = pixel_from_sum(sums[c]);
}

SENDVAE_HD float model_range(uint8_t pixel) { return static_cast<float>(pixel) / 127.5f - 1.0f; }

SENDVAE_HD float normalise(uint8_t pixel, float mean, float std) {
  return (static_cast<float>(pixel) / 255.0f - mean) / std;
}

// ---- What a kernel is given ----

// uint8 pixels whose rows are packed and `stride` bytes apart.
struct Picture {
  const uint8_t* data;
  int64_t stride;
};

// ---- From tensors to kernel arguments ----

// Holds the checked inputs, the plans and the fresh outputs of one call.
struct CenterCrop {
  static constexpr const char* kName = "center_crop";
  std::vector<Tensor> images;
  std::vector<CropPlan> plans;
  Tensor mean, std;
  Tensor pixels, normalised;  // uint8 [B, 3, S, S], or floating point [B, S, S, 3]; like pixels, or empty [0]
  int64_t size;
  ScalarType dtype;
  bool has_normalised;

  CenterCrop(const std::vector<Tensor>& images_, int64_t size_, const std::vector<bool>& flips, ScalarType dtype_,
             const std::optional<Tensor>& mean_, const std::optional<Tensor>& std_)
      : size(size_), dtype(dtype_), has_normalised(mean_.has_value()) {
    STD_TORCH_CHECK(!images_.empty(), kName, ": images must not be empty");
    STD_TORCH_CHECK(images_.size() == flips.size(), kName, ": flips must have one entry per image");
    STD_TORCH_CHECK(size >= 1 && size < (1 << 16), kName, ": size must be in [1, 2^16), got ", size);
    STD_TORCH_CHECK(mean_.has_value() == std_.has_value(), kName, ": mean and std go together");
    for (size_t i = 0; i < images_.size(); ++i) add_image(images_[i], flips[i]);
    const Tensor& first = images[0];
    if (dtype == ScalarType::Byte) {
      STD_TORCH_CHECK(!has_normalised, kName, ": uint8 crops cannot be normalised");
      pixels = empty_on(first, {count(), kChannels, size, size}, dtype);
    } else {
      pixels = empty_on(first, {count(), size, size, kChannels}, dtype);
      check_float_dtype(kName, "the output", pixels);
    }
    if (has_normalised) {
      mean = checked_statistic("mean", *mean_);
      std = checked_statistic("std", *std_);
      normalised = empty_on(first, {count(), size, size, kChannels}, dtype);
    } else {
      normalised = empty_on(first, {0}, dtype);
    }
  }

  int64_t count() const { return static_cast<int64_t>(images.size()); }
  int64_t num_values() const { return kChannels * size * size; }  // of one crop

  // The part of image `i` that its plan reads.
  Picture source(size_t i) const {
    const int64_t stride = images[i].stride(0);
    return {data<uint8_t>(images[i]) + plans[i].rows.first * stride + plans[i].columns.first * kChannels, stride};
  }

  std::tuple<Tensor, Tensor> outputs() const {
    if (dtype == ScalarType::Byte) return {pixels, normalised};
    return {channels_last(pixels), has_normalised ? channels_last(normalised) : normalised};
  }

 private:
  void add_image(const Tensor& image, bool flip) {
    check_dtype(kName, "an image", image, ScalarType::Byte);
    STD_TORCH_CHECK(image.dim() == 3 && image.size(2) == kChannels, kName, ": an image must be [H, W, 3], got ",
                    shape_string(image));
    constexpr int64_t kMax = std::numeric_limits<int32_t>::max() / kChannels;
    STD_TORCH_CHECK(std::min(image.size(0), image.size(1)) >= 1 && std::max(image.size(0), image.size(1)) <= kMax,
                    kName, ": the sides of an image must be from 1 to ", kMax, ", got ", shape_string(image));
    if (!images.empty()) check_same_device(kName, "an image", image, images[0]);
    images.push_back(inner_contiguous(image));
    plans.push_back(plan_crop(image.size(0), image.size(1), size, flip));
  }

  Tensor checked_statistic(const char* name, const Tensor& tensor) const {
    check_same_device(kName, name, tensor, images[0]);
    check_dtype(kName, name, tensor, ScalarType::Float);
    check_shape(kName, name, tensor, {kChannels});
    return torch::stable::contiguous(tensor);
  }

  // [B, S, S, 3] seen as [B, 3, S, S].
  static Tensor channels_last(const Tensor& tensor) {
    return torch::stable::transpose(torch::stable::transpose(tensor, 1, 3), 2, 3);
  }
};

}  // namespace sendvae
