// center_crop on the CPU: pictures spread over threads, one pass of a picture after another. Every pass takes weighted
// sums of byte vectors: of whole rows in a vertical pass; in a horizontal pass of columns, 16 pixels high, which are
// gathered for it and scattered back. The pictures in between hold only what the crop needs.
#include "center_crop.h"

#include <cstring>
#include <memory>

#include <torch/csrc/stable/library.h>

#include "../common/cpu.h"

namespace sendvae {
namespace {

constexpr int64_t kBlockRows = 16;                        // rows of a horizontal pass that are computed together
constexpr int64_t kBlockColumn = kBlockRows * kChannels;  // bytes of a column of so many rows

// out[i] = sum over k < kCount of weights[k] * in[k * step + i], rounded, for i < length. Only with the loop over k
// unrolled does the other vectorise, so there is code for every count up to kMaxTaps.
template <int kCount = kMaxTaps>
inline __attribute__((always_inline)) void weighted_sum(const uint8_t* __restrict__ in, int64_t step,
                                                        const int32_t* __restrict__ weights, int32_t count,
                                                        uint8_t* __restrict__ out, int64_t length) {
  if (count == kCount) {
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      int32_t sum = kRoundingHalf;
      SENDVAE_UNROLL
      for (int k = 0; k < kCount; ++k) sum += weights[k] * in[k * step + i];
      out[i] = pixel_from_sum(sum);
    }
  } else if constexpr (kCount > 1) {
    weighted_sum<kCount - 1>(in, step, weights, count, out, length);
  }
}

// weighted_sum, with an instruction of its own for nearly all sums of a halving: the mean of two, which comes to the
// same bits.
inline __attribute__((always_inline)) void resample(const uint8_t* __restrict__ in, int64_t step,
                                                    const int32_t* __restrict__ weights, int32_t count,
                                                    uint8_t* __restrict__ out, int64_t length) {
  constexpr int32_t kHalf = 1 << (kFractionBits - 1);
  if (count == 2 && weights[0] == kHalf && weights[1] == kHalf) {
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) out[i] = static_cast<uint8_t>((in[i] + in[step + i] + 1) >> 1);
  } else {
    weighted_sum(in, step, weights, count, out, length);
  }
}

// Copies a pixel and one byte more, which is quicker than the pixel alone.
inline __attribute__((always_inline)) void copy_pixel_and_byte(const uint8_t* in, uint8_t* out) {
  std::memcpy(out, in, kChannels + 1);
}

// Between rows of pixels, `stride` bytes apart, and a block of kBlockRows of them, in which it is the columns that are
// packed. Pixels go in an order in which the byte too many is overwritten; the last column has no room for it.
inline __attribute__((always_inline)) void gather_block(const uint8_t* rows, int64_t stride, int64_t columns,
                                                        uint8_t* __restrict__ block) {
  const int64_t last = columns - 1;
  for (int64_t column = 0; column < last; ++column) {
    for (int64_t row = 0; row < kBlockRows; ++row) {
      copy_pixel_and_byte(rows + row * stride + column * kChannels, block + column * kBlockColumn + row * kChannels);
    }
  }
  for (int64_t row = 0; row < kBlockRows; ++row) {
    std::memcpy(block + last * kBlockColumn + row * kChannels, rows + row * stride + last * kChannels, kChannels);
  }
}

inline __attribute__((always_inline)) void scatter_block(const uint8_t* block, int64_t columns,
                                                         uint8_t* __restrict__ rows, int64_t stride) {
  const int64_t last = columns - 1;
  for (int64_t column = 0; column < last; ++column) {
    for (int64_t row = 0; row < kBlockRows; ++row) {
      copy_pixel_and_byte(block + column * kBlockColumn + row * kChannels, rows + row * stride + column * kChannels);
    }
  }
  for (int64_t row = 0; row < kBlockRows; ++row) {
    std::memcpy(rows + row * stride + last * kChannels, block + last * kBlockColumn + row * kChannels, kChannels);
  }
}

// Rows first .. first + kBlockRows - 1 of a horizontal pass. `block` has room for 16 rows of input and of output.
SENDVAE_CPU_CLONES void horizontal_block(const Picture& in, int64_t in_columns, const Pass& pass, int64_t first,
                                         uint8_t* block, uint8_t* out) {
  const Taps& taps = pass.taps;
  uint8_t* out_block = block + in_columns * kBlockColumn;
  gather_block(in.data + first * in.stride, in.stride, in_columns, block);
  for (int64_t column = 0; column < pass.columns; ++column) {
    resample(block + taps.first[column] * kBlockColumn, kBlockColumn, taps.weights.data() + column * taps.width,
             taps.count[column], out_block + column * kBlockColumn, kBlockColumn);
  }
  const int64_t out_stride = pass.columns * kChannels;
  scatter_block(out_block, pass.columns, out + first * out_stride, out_stride);
}

void horizontal_pass(const Picture& in, int64_t in_columns, const Pass& pass, uint8_t* out) {
  if (pass.rows < kBlockRows) {
    const Taps& taps = pass.taps;
    for (int64_t row = 0; row < pass.rows; ++row) {
      for (int64_t column = 0; column < pass.columns; ++column) {
        resample_pixel(in.data + row * in.stride + taps.first[column] * kChannels, kChannels,
                       taps.weights.data() + column * taps.width, taps.count[column],
                       out + (row * pass.columns + column) * kChannels);
      }
    }
    return;
  }
  const auto block = std::make_unique_for_overwrite<uint8_t[]>((in_columns + pass.columns) * kBlockColumn);
  for (int64_t row = 0; row < pass.rows; row += kBlockRows) {
    // The last block reaches back over rows that are done already.
    horizontal_block(in, in_columns, pass, std::min(row, pass.rows - kBlockRows), block.get(), out);
  }
}

SENDVAE_CPU_CLONES void vertical_pass(const Picture& in, const Pass& pass, uint8_t* out) {
  const int64_t length = pass.columns * kChannels;
  const Taps& taps = pass.taps;
  for (int64_t row = 0; row < pass.rows; ++row) {
    resample(in.data + taps.first[row] * in.stride, in.stride, taps.weights.data() + row * taps.width, taps.count[row],
             out + row * length, length);
  }
}

// The crop of one picture, uint8 [S, S, 3]: in `memory`, or in the picture itself where nothing is resampled.
struct Crop {
  std::unique_ptr<uint8_t[]> memory;
  Picture pixels;
};

Crop run_passes(Picture picture, const CropPlan& plan) {
  int64_t largest = 0;
  for (const Pass& pass : plan.passes) largest = std::max(largest, pass.rows * pass.columns * kChannels);
  Crop crop{std::make_unique_for_overwrite<uint8_t[]>(2 * largest), picture};
  int64_t columns = plan.columns.count;
  uint8_t *out = crop.memory.get(), *other = out + largest;
  for (const Pass& pass : plan.passes) {
    if (pass.vertical) {
      vertical_pass(crop.pixels, pass, out);
    } else {
      horizontal_pass(crop.pixels, columns, pass, out);
    }
    columns = pass.columns;
    crop.pixels = {out, columns * kChannels};
    std::swap(out, other);
  }
  return crop;
}

// uint8 [S, S, 3] to planes, [3, S, S].
SENDVAE_CPU_CLONES void write_planes(const Picture& crop, int64_t size, uint8_t* out) {
  for (int64_t row = 0; row < size; ++row) {
    const uint8_t* in = crop.data + row * crop.stride;
    for (int64_t channel = 0; channel < kChannels; ++channel) {
      uint8_t* plane = out + (channel * size + row) * size;
      for (int64_t column = 0; column < size; ++column) plane[column] = in[column * kChannels + channel];
    }
  }
}

template <typename T>
SENDVAE_CPU_CLONES void write_model_range(const Picture& crop, int64_t size, T* __restrict__ out) {
  const int64_t length = size * kChannels;
  for (int64_t row = 0; row < size; ++row) {
    const uint8_t* __restrict__ in = crop.data + row * crop.stride;
    for (int64_t i = 0; i < length; ++i) out[row * length + i] = from_float<T>(model_range(in[i]));
  }
}

// mean and std are repeated for every value of a row.
template <typename T>
SENDVAE_CPU_CLONES void write_normalised(const Picture& crop, int64_t size, const float* __restrict__ mean,
                                         const float* __restrict__ std, T* __restrict__ out) {
  const int64_t length = size * kChannels;
  for (int64_t row = 0; row < size; ++row) {
    const uint8_t* __restrict__ in = crop.data + row * crop.stride;
    for (int64_t i = 0; i < length; ++i) out[row * length + i] = from_float<T>(normalise(in[i], mean[i], std[i]));
  }
}

std::vector<float> repeated(const Tensor& statistic, int64_t size) {
  std::vector<float> values(size * kChannels);
  for (size_t i = 0; i < values.size(); ++i) values[i] = data<float>(statistic)[i % kChannels];
  return values;
}

void crop_to_planes(const CenterCrop& call, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    const Crop crop = run_passes(call.source(i), call.plans[i]);
    write_planes(crop.pixels, call.size, mutable_data<uint8_t>(call.pixels) + i * call.num_values());
  }
}

template <typename T>
void crop_to_floats(const CenterCrop& call, int64_t first, int64_t last) {
  std::vector<float> mean, std;
  if (call.has_normalised) {
    mean = repeated(call.mean, call.size);
    std = repeated(call.std, call.size);
  }
  for (int64_t i = first; i < last; ++i) {
    const Crop crop = run_passes(call.source(i), call.plans[i]);
    const int64_t offset = i * call.num_values();
    write_model_range(crop.pixels, call.size, mutable_data<T>(call.pixels) + offset);
    if (!call.has_normalised) continue;
    write_normalised(crop.pixels, call.size, mean.data(), std.data(), mutable_data<T>(call.normalised) + offset);
  }
}

std::tuple<Tensor, Tensor> center_crop_cpu(const std::vector<Tensor>& images, int64_t size,
                                           const std::vector<bool>& flips, ScalarType dtype,
                                           const std::optional<Tensor>& mean, const std::optional<Tensor>& std) {
  const CenterCrop call(images, size, flips, dtype, mean, std);
  torch::stable::parallel_for(0, call.count(), 1, [&](int64_t first, int64_t last) {
    if (dtype == ScalarType::Byte) return crop_to_planes(call, first, last);
    dispatch_float(dtype, [&](auto type) { crop_to_floats<decltype(type)>(call, first, last); });
  });
  return call.outputs();
}

}  // namespace
}  // namespace sendvae

STABLE_TORCH_LIBRARY_IMPL(sendvae, CPU, library) { library.impl("center_crop", TORCH_BOX(&sendvae::center_crop_cpu)); }
