// group_norm_silu on the CPU: a sample is cut into chunks of whole pixels. Sums over a chunk are taken per channel,
// joined in a fixed order per group, and then the chunks are gone through again. Chunks depend on the sample's shape
// alone, so neither the number of threads nor the place in the batch changes a result.
#include "group_norm_silu.h"

#include <algorithm>
#include <numeric>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../common/cpu.h"

namespace sendvae {
namespace {

constexpr int64_t kVector = 16;            // floats in the widest vector register
constexpr int64_t kMinLanes = 64;          // so that a row keeps the vector units busy
constexpr int64_t kCacheLine = 64;         // bytes
constexpr int64_t kPrefetchBlocks = 8;     // of four rows each
constexpr int64_t kChunkElements = 32768;  // fits, with its outputs, in an L2 cache

// How a sample's [P, C] elements are gone through: in rows of `lanes` elements, which are whole pixels, so that a lane
// always has one channel. Only the last row may be shorter.
struct Walk {
  int64_t channels, lanes, elements, chunk_elements, num_chunks;

  explicit Walk(const GroupNormShape& shape) : channels(shape.channels), elements(shape.sample_elements()) {
    int64_t pixels_per_row = 1;
    if (channels < kMinLanes) {
      const int64_t step = kVector / std::gcd(channels, kVector);  // pixels that fill whole vectors
      pixels_per_row = step * std::max<int64_t>(1, kMinLanes / (channels * step));
    }
    lanes = pixels_per_row * channels;
    chunk_elements = std::max<int64_t>(1, kChunkElements / lanes) * lanes;
    num_chunks = (elements + chunk_elements - 1) / chunk_elements;
  }

  int64_t begin(int64_t chunk) const { return chunk * chunk_elements; }
  int64_t size(int64_t chunk) const { return std::min(chunk_elements, elements - begin(chunk)); }
};

// Two numbers for each channel of each chunk: a chunk's channels lie together, the first numbers before the second.
struct ChunkSums {
  int64_t channels;
  std::vector<float> values;

  explicit ChunkSums(const Walk& walk) : channels(walk.channels), values(walk.num_chunks * 2 * walk.channels) {}
  float* first(int64_t chunk) { return values.data() + chunk * 2 * channels; }
  float* second(int64_t chunk) { return first(chunk) + channels; }
};

// out [lanes]: a value for each lane of a row, from one for each run of `width` channels.
void spread(const Walk& walk, const float* values, int64_t width, float* out) {
  for (int64_t c = 0; c < walk.channels; c += width) std::fill_n(out + c, width, *values++);
  for (int64_t lane = walk.channels; lane < walk.lanes; lane += walk.channels) {
    std::copy_n(out, walk.channels, out + lane);
  }
}

// [3, lanes]: a sample's Normalisation for each lane of a row.
std::vector<float> normalisation_table(const Walk& walk, int64_t channels_per_group, const float* mean,
                                       const float* rstd, const float* weight, const float* bias) {
  std::vector<float> table(3 * walk.lanes);
  spread(walk, mean, channels_per_group, table.data());
  std::vector<float> scale(walk.channels);
  for (int64_t c = 0; c < walk.channels; ++c) scale[c] = rstd[c / channels_per_group] * weight[c];
  spread(walk, scale.data(), 1, table.data() + walk.lanes);
  spread(walk, bias, 1, table.data() + 2 * walk.lanes);
  return table;
}

SENDVAE_HD Normalisation normalisation_at(const float* table, int64_t lanes, int64_t i) {
  return {table[i], table[lanes + i], table[2 * lanes + i]};
}

// ---- One chunk ----
//
// The pointers are restricted so that compilers vectorise the loops; `omp simd` would not do, for it keeps loops with
// structs of their own from it.

// Asks for memory ahead of its use: processors see no stream in rows that are read side by side.
template <typename T>
SENDVAE_HD void prefetch(const T* data, int64_t count) {
  const char* bytes = reinterpret_cast<const char*>(data);
  for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(T)); i += kCacheLine) __builtin_prefetch(bytes + i);
}

// Adds up x - centre and its square in each lane; four rows at a time, to load and store the sums less often.
template <typename T>
SENDVAE_HD void add_rows(const T* __restrict__ x, int64_t elements, int64_t lanes, const float* __restrict__ centre,
                         float* __restrict__ sums, float* __restrict__ squares) {
  int64_t begin = 0;
  for (; begin + 4 * lanes <= elements; begin += 4 * lanes) {
    const T* row = x + begin;
    prefetch(row + kPrefetchBlocks * 4 * lanes, 4 * lanes);
    for (int64_t i = 0; i < lanes; ++i) {
      const float x0 = to_float(row[i]) - centre[i], x1 = to_float(row[i + lanes]) - centre[i];
      const float x2 = to_float(row[i + 2 * lanes]) - centre[i], x3 = to_float(row[i + 3 * lanes]) - centre[i];
      sums[i] += (x0 + x1) + (x2 + x3);
      squares[i] += (x0 * x0 + x1 * x1) + (x2 * x2 + x3 * x3);
    }
  }
  for (; begin < elements; begin += lanes) {
    const int64_t count = std::min(lanes, elements - begin);
    for (int64_t i = 0; i < count; ++i) {
      const float x0 = to_float(x[begin + i]) - centre[i];
      sums[i] += x0;
      squares[i] += x0 * x0;
    }
  }
}

// Adds the sums of a channel's lanes to that of its first lane.
SENDVAE_HD void add_lanes(float* sums, int64_t lanes, int64_t channels) {
  for (int64_t begin = channels; begin < lanes; begin += channels) {
    for (int64_t c = 0; c < channels; ++c) sums[c] += sums[begin + c];
  }
}

template <typename T>
SENDVAE_CPU_CLONES void add_residual(const T* __restrict__ x, const T* __restrict__ residual, T* __restrict__ s,
                                     int64_t elements) {
  for (int64_t i = 0; i < elements; ++i) s[i] = from_float<T>(to_float(x[i]) + to_float(residual[i]));
}

// Means [C] of a chunk's channels and their sums [C] of squares around them. scratch: three rows.
//
// A channel is centred on the mean of an eighth of its pixels. Its variance is at least an eighth of the square of that
// centre's distance from the mean of all, so taking the distance off in the end costs a few units of rounding, whatever
// the values, and the chunk is gone through little more than once.
template <typename T>
SENDVAE_CPU_CLONES void chunk_moments(const T* x, int64_t elements, int64_t lanes, int64_t channels, float* scratch,
                                      float* mean, float* squares) {
  float *centre = scratch, *sums = scratch + lanes, *square_sums = scratch + 2 * lanes;
  std::fill_n(scratch, 3 * lanes, 0.0f);
  const int64_t centre_elements = std::min(elements, (elements + 8 * lanes - 1) / (8 * lanes) * lanes);
  add_rows(x, centre_elements, lanes, centre, sums, square_sums);
  add_lanes(sums, lanes, channels);
  const float centre_pixels = static_cast<float>(centre_elements / channels);
  for (int64_t c = 0; c < channels; ++c) centre[c] = sums[c] / centre_pixels;
  for (int64_t begin = channels; begin < lanes; begin += channels) std::copy_n(centre, channels, centre + begin);

  std::fill_n(sums, 2 * lanes, 0.0f);
  add_rows(x, elements, lanes, centre, sums, square_sums);
  add_lanes(sums, lanes, channels);
  add_lanes(square_sums, lanes, channels);
  const float pixels = static_cast<float>(elements / channels);
  for (int64_t c = 0; c < channels; ++c) {
    const float distance = sums[c] / pixels;
    mean[c] = centre[c] + distance;
    squares[c] = square_sums[c] - sums[c] * distance;
  }
}

template <typename T, bool kSilu>
SENDVAE_CPU_CLONES void chunk_forward(const T* __restrict__ x, int64_t elements, int64_t lanes,
                                      const float* __restrict__ table, T* __restrict__ y) {
  for (int64_t begin = 0; begin < elements; begin += lanes) {
    const int64_t count = std::min(lanes, elements - begin);
    for (int64_t i = 0; i < count; ++i) {
      const Normalisation n = normalisation_at(table, lanes, i);
      y[begin + i] = from_float<T>(group_norm_silu<T, kSilu>(to_float(x[begin + i]), n));
    }
  }
}

// Whether the backward's first pass leaves dz in grad_x for the second. It is exact there, and cheaper than a second
// exponential.
template <typename T, bool kSilu>
constexpr bool kKeepsGradZ = kSilu && std::is_same_v<T, float>;

// A chunk's parts [C] of dbias and of dweight / rstd. scratch: two rows.
template <typename T, bool kSilu>
SENDVAE_CPU_CLONES void chunk_parameter_grads(const T* __restrict__ grad_y, const T* __restrict__ x, int64_t elements,
                                              int64_t lanes, int64_t channels, const float* __restrict__ table,
                                              float* scratch, T* __restrict__ grad_x, float* bias_part,
                                              float* weight_part) {
  float* __restrict__ bias_sums = scratch;
  float* __restrict__ weight_sums = scratch + lanes;
  std::fill_n(scratch, 2 * lanes, 0.0f);
  for (int64_t begin = 0; begin < elements; begin += lanes) {
    const int64_t count = std::min(lanes, elements - begin);
    for (int64_t i = 0; i < count; ++i) {
      const Normalisation n = normalisation_at(table, lanes, i);
      const float value = to_float(x[begin + i]);
      const float grad_z = pre_activation_grad<T, kSilu>(to_float(grad_y[begin + i]), value, n);
      bias_sums[i] += grad_z;
      weight_sums[i] += grad_z * (value - n.mean);
      if constexpr (kKeepsGradZ<T, kSilu>) grad_x[begin + i] = grad_z;
    }
  }
  add_lanes(bias_sums, lanes, channels);
  add_lanes(weight_sums, lanes, channels);
  std::copy_n(bias_sums, channels, bias_part);
  std::copy_n(weight_sums, channels, weight_part);
}

// group_table [2, lanes]: the sample's GroupGrad for each lane of a row.
template <typename T, bool kSilu, bool kAddGradS>
SENDVAE_CPU_CLONES void chunk_input_grad(const T* __restrict__ grad_y, const T* __restrict__ grad_s,
                                         const T* __restrict__ x, int64_t elements, int64_t lanes,
                                         const float* __restrict__ table, const float* __restrict__ group_table,
                                         T* __restrict__ grad_x) {
  for (int64_t begin = 0; begin < elements; begin += lanes) {
    const int64_t count = std::min(lanes, elements - begin);
    for (int64_t i = 0; i < count; ++i) {
      const Normalisation n = normalisation_at(table, lanes, i);
      const float value = to_float(x[begin + i]);
      float grad_z;
      if constexpr (kKeepsGradZ<T, kSilu>) {
        grad_z = grad_x[begin + i];
      } else {
        grad_z = pre_activation_grad<T, kSilu>(to_float(grad_y[begin + i]), value, n);
      }
      float grad = input_grad(grad_z, value, n, GroupGrad{group_table[i], group_table[lanes + i]});
      if constexpr (kAddGradS) grad += to_float(grad_s[begin + i]);
      grad_x[begin + i] = from_float<T>(grad);
    }
  }
}

// ---- One sample ----

// mean [G] and rstd [G] from the channels' means and squares in all chunks; in double, for a long sum.
void join_moments(const GroupNormShape& shape, const Walk& walk, float eps, ChunkSums& moments, float* mean,
                  float* rstd) {
  const int64_t width = shape.channels_per_group();
  const double count = static_cast<double>(shape.pixels * width);
  for (int64_t group = 0; group < shape.groups; ++group) {
    const int64_t begin = group * width, end = begin + width;
    double sum = 0.0, squares = 0.0;
    for (int64_t chunk = 0; chunk < walk.num_chunks; ++chunk) {
      const double pixels = static_cast<double>(walk.size(chunk) / shape.channels);
      for (int64_t c = begin; c < end; ++c) sum += pixels * moments.first(chunk)[c];
    }
    const double group_mean = sum / count;
    for (int64_t chunk = 0; chunk < walk.num_chunks; ++chunk) {
      const double pixels = static_cast<double>(walk.size(chunk) / shape.channels);
      for (int64_t c = begin; c < end; ++c) {
        const double distance = moments.first(chunk)[c] - group_mean;
        squares += moments.second(chunk)[c] + pixels * distance * distance;
      }
    }
    mean[group] = static_cast<float>(group_mean);
    rstd[group] = rstd_of(static_cast<float>(squares / count), eps);
  }
}

// From the parts of all chunks: the sample's parts [2, C] of dbias and dweight, and the groups' GroupGrad, [2, G].
void join_parameter_grads(const GroupNormShape& shape, const Walk& walk, const float* rstd, const float* weight,
                          ChunkSums& parts, float* sums, float* group_grads) {
  std::fill_n(sums, 2 * shape.channels, 0.0f);
  for (int64_t chunk = 0; chunk < walk.num_chunks; ++chunk) {
    for (int64_t i = 0; i < 2 * shape.channels; ++i) sums[i] += parts.first(chunk)[i];
  }
  const int64_t width = shape.channels_per_group();
  const double count = static_cast<double>(shape.pixels * width);
  for (int64_t group = 0; group < shape.groups; ++group) {
    double mean = 0.0, mean_xhat = 0.0;
    for (int64_t c = group * width; c < (group + 1) * width; ++c) {
      sums[shape.channels + c] *= rstd[group];
      mean += static_cast<double>(weight[c]) * sums[c];
      mean_xhat += static_cast<double>(weight[c]) * sums[shape.channels + c];
    }
    const GroupGrad grad =
        group_grad(static_cast<float>(mean / count), static_cast<float>(mean_xhat / count), rstd[group]);
    group_grads[group] = grad.constant;
    group_grads[shape.groups + group] = grad.slope;
  }
}

// Runs body(chunk, scratch of three rows) over a sample's chunks.
template <typename Body>
void for_each_chunk(const Walk& walk, const Body& body) {
  torch::stable::parallel_for(0, walk.num_chunks, 1, [&](int64_t first, int64_t last) {
    std::vector<float> scratch(3 * walk.lanes);
    for (int64_t chunk = first; chunk < last; ++chunk) body(chunk, scratch.data());
  });
}

// Runs body(sample) over the batch. Where there are enough samples, threads take whole ones, to keep them in caches;
// otherwise they share the chunks of one (a loop over chunks inside a loop over samples stays on its thread).
template <typename Body>
void for_each_sample(const GroupNormShape& shape, const Body& body) {
  if (shape.batch < static_cast<int64_t>(torch::stable::get_num_threads())) {
    for (int64_t sample = 0; sample < shape.batch; ++sample) body(sample);
    return;
  }
  const int64_t grain = std::max<int64_t>(1, kChunkElements / shape.sample_elements());
  torch::stable::parallel_for(0, shape.batch, grain, [&](int64_t first, int64_t last) {
    for (int64_t sample = first; sample < last; ++sample) body(sample);
  });
}

template <typename T, bool kSilu>
void forward_sample(const GroupNormSiluArgs<T>& args, int64_t sample) {
  const GroupNormShape& shape = args.shape;
  const Walk walk(shape);
  const int64_t offset = sample * shape.sample_elements();
  const T* x = args.residual ? args.s + offset : args.x + offset;
  ChunkSums moments(walk);
  for_each_chunk(walk, [&](int64_t chunk, float* scratch) {
    const int64_t begin = walk.begin(chunk), size = walk.size(chunk);
    if (args.residual) {
      add_residual(args.x + offset + begin, args.residual + offset + begin, args.s + offset + begin, size);
    }
    chunk_moments(x + begin, size, walk.lanes, walk.channels, scratch, moments.first(chunk), moments.second(chunk));
  });
  float *mean = args.mean + sample * shape.groups, *rstd = args.rstd + sample * shape.groups;
  join_moments(shape, walk, args.eps, moments, mean, rstd);
  const std::vector<float> table =
      normalisation_table(walk, shape.channels_per_group(), mean, rstd, args.weight, args.bias);
  for_each_chunk(walk, [&](int64_t chunk, float*) {
    const int64_t begin = walk.begin(chunk);
    chunk_forward<T, kSilu>(x + begin, walk.size(chunk), walk.lanes, table.data(), args.y + offset + begin);
  });
}

// sums [2, C]: the sample's parts of dbias and dweight.
template <typename T, bool kSilu>
void backward_sample(const GroupNormSiluBackwardArgs<T>& args, int64_t sample, float* sums) {
  const GroupNormShape& shape = args.shape;
  const Walk walk(shape);
  const int64_t offset = sample * shape.sample_elements(), width = shape.channels_per_group();
  const T *x = args.s + offset, *grad_y = args.grad_y + offset;
  const float *mean = args.mean + sample * shape.groups, *rstd = args.rstd + sample * shape.groups;
  const std::vector<float> table = normalisation_table(walk, width, mean, rstd, args.weight, args.bias);
  ChunkSums parts(walk);
  for_each_chunk(walk, [&](int64_t chunk, float* scratch) {
    const int64_t begin = walk.begin(chunk);
    chunk_parameter_grads<T, kSilu>(grad_y + begin, x + begin, walk.size(chunk), walk.lanes, walk.channels,
                                    table.data(), scratch, args.grad_x + offset + begin, parts.first(chunk),
                                    parts.second(chunk));
  });
  std::vector<float> group_grads(2 * shape.groups), group_table(2 * walk.lanes);
  join_parameter_grads(shape, walk, rstd, args.weight, parts, sums, group_grads.data());
  spread(walk, group_grads.data(), width, group_table.data());
  spread(walk, group_grads.data() + shape.groups, width, group_table.data() + walk.lanes);
  const auto chunk_grad = args.grad_s ? chunk_input_grad<T, kSilu, true> : chunk_input_grad<T, kSilu, false>;
  for_each_chunk(walk, [&](int64_t chunk, float*) {
    const int64_t begin = walk.begin(chunk);
    const T* grad_s = args.grad_s ? args.grad_s + offset + begin : nullptr;
    chunk_grad(grad_y + begin, grad_s, x + begin, walk.size(chunk), walk.lanes, table.data(), group_table.data(),
               args.grad_x + offset + begin);
  });
}

// ---- The batch ----

template <typename T, bool kSilu>
void forward(const GroupNormSiluArgs<T>& args) {
  for_each_sample(args.shape, [&](int64_t sample) { forward_sample<T, kSilu>(args, sample); });
}

template <typename T, bool kSilu>
void backward(const GroupNormSiluBackwardArgs<T>& args) {
  const int64_t channels = args.shape.channels;
  std::vector<float> sums(args.shape.batch * 2 * channels);
  for_each_sample(args.shape, [&](int64_t sample) {
    backward_sample<T, kSilu>(args, sample, sums.data() + sample * 2 * channels);
  });
  std::fill_n(args.grad_bias, channels, 0.0f);
  std::fill_n(args.grad_weight, channels, 0.0f);
  for (int64_t sample = 0; sample < args.shape.batch; ++sample) {
    const float* parts = sums.data() + sample * 2 * channels;
    for (int64_t c = 0; c < channels; ++c) args.grad_bias[c] += parts[c];
    for (int64_t c = 0; c < channels; ++c) args.grad_weight[c] += parts[channels + c];
  }
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_cpu(const Tensor& x, const std::optional<Tensor>& residual,
                                                       const Tensor& weight, const Tensor& bias, int64_t num_groups,
                                                       double eps, bool silu) {
  const GroupNormSilu call(x, residual, weight, bias, num_groups, eps);
  dispatch_float(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    silu ? forward<T, true>(call.args<T>()) : forward<T, false>(call.args<T>());
  });
  return call.outputs();
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward_cpu(const Tensor& grad_y,
                                                                const std::optional<Tensor>& grad_s, const Tensor& s,
                                                                const Tensor& stats, const Tensor& weight,
                                                                const Tensor& bias, int64_t num_groups, bool silu) {
  const GroupNormSiluBackward call(grad_y, grad_s, s, stats, weight, bias, num_groups);
  dispatch_float(s.scalar_type(), [&](auto type) {
    using T = decltype(type);
    silu ? backward<T, true>(call.args<T>()) : backward<T, false>(call.args<T>());
  });
  return call.outputs();
}

}  // namespace
}  // namespace sendvae

STABLE_TORCH_LIBRARY_IMPL(sendvae, CPU, library) {
  library.impl("group_norm_silu", TORCH_BOX(&sendvae::group_norm_silu_cpu));
  library.impl("group_norm_silu_backward", TORCH_BOX(&sendvae::group_norm_silu_backward_cpu));
}
