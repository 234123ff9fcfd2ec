// lpips_distance on the CPU: chunks of pixels spread over threads. Channels-last features are taken pixel by pixel with
// the channels in vector lanes, others a few neighbouring pixels at a time, one in each lane. A pixel's result depends
// on nothing but the pixel, and the chunks of a sample are added in one order.
#include "lpips_distance.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../common/cpu.h"

namespace sendvae {
namespace {

constexpr int64_t kChunk = 256;  // pixels
constexpr int64_t kLanes = 32;  // pixels side by side
constexpr int64_t kGrainElements = 8192;  // elements a thread takes at least

template <typename T>
SENDVAE_HD const T* at(const Planes<T>& planes, int64_t sample, int64_t pixel) {
  return planes.data + sample * planes.stride_b + pixel * planes.stride_p;
}

// The forward functions write the stats of pixels [begin, end) of a sample and return the sum of their distances.
template <typename T>
SENDVAE_CPU_CLONES double forward_channels_last(const LpipsDistanceArgs<T>& args, int64_t sample, int64_t begin,
                                                int64_t end) {
  const float* __restrict__ weight = args.weight;
  float* stats = args.stats + sample * kNumStatistics * args.pixels;
  double sum = 0.0;
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const T* __restrict__ f0 = at(args.f0, sample, pixel);
    const T* __restrict__ f1 = at(args.f1, sample, pixel);
    float square0 = 0.0f, square1 = 0.0f;
#pragma omp simd reduction(+ : square0, square1)
    for (int64_t c = 0; c < args.channels; ++c) {
      const float a = to_float(f0[c]), b = to_float(f1[c]);
      square0 += a * a;
      square1 += b * b;
    }
    const float norm0 = sqrtf(square0), norm1 = sqrtf(square1);
    const float floored0 = floored_norm(norm0), floored1 = floored_norm(norm1);
    float distance = 0.0f, dot0 = 0.0f, dot1 = 0.0f;
#pragma omp simd reduction(+ : distance, dot0, dot1)
    for (int64_t c = 0; c < args.channels; ++c) {
      add_channel(to_float(f0[c]) / floored0, to_float(f1[c]) / floored1, weight[c], distance, dot0, dot1);
    }
    stats[kNorm0 * args.pixels + pixel] = norm0;
    stats[kNorm1 * args.pixels + pixel] = norm1;
    stats[kDot0 * args.pixels + pixel] = dot0;
    stats[kDot1 * args.pixels + pixel] = dot1;
    sum += distance;
  }
  return sum;
}

// Copies the channels of `count` pixels, the lanes beyond as 0, and gives each lane's norm. The copy makes the second
// pass cheap: channels lie whole planes apart and compete for few cache lines.
template <typename T>
SENDVAE_HD void load_lanes(const T* __restrict__ from, int64_t stride_c, int64_t channels, int64_t count,
                           float* __restrict__ to, float* __restrict__ norm) {
  float square[kLanes] = {};
  for (int64_t c = 0; c < channels; ++c) {
    float* __restrict__ row = to + c * kLanes;
    if (count == kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) row[i] = to_float(from[c * stride_c + i]);
    } else {
      for (int64_t i = 0; i < kLanes; ++i) row[i] = i < count ? to_float(from[c * stride_c + i]) : 0.0f;
    }
    for (int64_t i = 0; i < kLanes; ++i) square[i] += row[i] * row[i];
  }
  for (int64_t i = 0; i < kLanes; ++i) norm[i] = sqrtf(square[i]);
}

// `scratch` has room for 2 C kLanes numbers.
template <typename T>
SENDVAE_CPU_CLONES double forward_planes(const LpipsDistanceArgs<T>& args, int64_t sample, int64_t begin, int64_t end,
                                         float* scratch) {
  float* __restrict__ f0 = scratch;
  float* __restrict__ f1 = scratch + args.channels * kLanes;
  float* stats = args.stats + sample * kNumStatistics * args.pixels;
  double sum = 0.0;
  for (int64_t first = begin; first < end; first += kLanes) {
    const int64_t count = std::min(kLanes, end - first);
    float norm0[kLanes], norm1[kLanes], floored0[kLanes], floored1[kLanes];
    load_lanes(at(args.f0, sample, first), args.f0.stride_c, args.channels, count, f0, norm0);
    load_lanes(at(args.f1, sample, first), args.f1.stride_c, args.channels, count, f1, norm1);
    for (int64_t i = 0; i < kLanes; ++i) {
      floored0[i] = floored_norm(norm0[i]);
      floored1[i] = floored_norm(norm1[i]);
    }
    float distance[kLanes] = {}, dot0[kLanes] = {}, dot1[kLanes] = {};
    for (int64_t c = 0; c < args.channels; ++c) {
      const float weight = args.weight[c];
      for (int64_t i = 0; i < kLanes; ++i) {
        add_channel(f0[c * kLanes + i] / floored0[i], f1[c * kLanes + i] / floored1[i], weight, distance[i], dot0[i],
                    dot1[i]);
      }
    }
    std::copy_n(norm0, count, stats + kNorm0 * args.pixels + first);
    std::copy_n(norm1, count, stats + kNorm1 * args.pixels + first);
    std::copy_n(dot0, count, stats + kDot0 * args.pixels + first);
    std::copy_n(dot1, count, stats + kDot1 * args.pixels + first);
    for (int64_t i = 0; i < count; ++i) sum += distance[i];
  }
  return sum;
}

// The backward functions write one side's gradient of pixels [begin, end) of a sample.
template <typename T>
SENDVAE_CPU_CLONES void backward_channels_last(const LpipsDistanceBackwardArgs<T>& args, int64_t sample, int64_t begin,
                                               int64_t end) {
  const float* __restrict__ weight = args.weight;
  const float* stats = args.stats + sample * kNumStatistics * args.pixels;
  const float grad = args.grad[sample] / static_cast<float>(args.pixels);
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const T* __restrict__ own = at(args.own, sample, pixel);
    const T* __restrict__ other = at(args.other, sample, pixel);
    T* __restrict__ grad_own = args.grad_own + (sample * args.pixels + pixel) * args.channels;
    const PixelGrad factors = pixel_grad(grad, stats, args.side, args.pixels, pixel);
    for (int64_t c = 0; c < args.channels; ++c) {
      grad_own[c] = from_float<T>(channel_grad(to_float(own[c]), to_float(other[c]), weight[c], factors));
    }
  }
}

template <typename T>
SENDVAE_CPU_CLONES void backward_planes(const LpipsDistanceBackwardArgs<T>& args, int64_t sample, int64_t begin,
                                        int64_t end) {
  const float* stats = args.stats + sample * kNumStatistics * args.pixels;
  const float grad = args.grad[sample] / static_cast<float>(args.pixels);
  const int64_t count = end - begin;
  PixelGrad factors[kChunk];
  for (int64_t i = 0; i < count; ++i) factors[i] = pixel_grad(grad, stats, args.side, args.pixels, begin + i);
  for (int64_t c = 0; c < args.channels; ++c) {
    const T* __restrict__ own = at(args.own, sample, begin) + c * args.own.stride_c;
    const T* __restrict__ other = at(args.other, sample, begin) + c * args.other.stride_c;
    T* __restrict__ grad_own = args.grad_own + (sample * args.channels + c) * args.pixels + begin;
    const float weight = args.weight[c];
    for (int64_t i = 0; i < count; ++i) {
      grad_own[i] = from_float<T>(channel_grad(to_float(own[i]), to_float(other[i]), weight, factors[i]));
    }
  }
}

int64_t num_chunks(int64_t pixels) { return (pixels + kChunk - 1) / kChunk; }

// Runs body(first, last) over ranges of all chunks of pixels of all samples; `args` has batch, channels and pixels.
template <typename Args, typename Body>
void for_chunk_ranges(const Args& args, const Body& body) {
  const int64_t elements = std::max<int64_t>(1, args.channels * std::min(kChunk, args.pixels));
  const int64_t grain = std::max<int64_t>(1, kGrainElements / elements);
  torch::stable::parallel_for(0, args.batch * num_chunks(args.pixels), grain, body);
}

// A chunk of pixels, by its number among all.
struct Chunk {
  int64_t sample, begin, end;
};

Chunk chunk_of(int64_t number, int64_t pixels) {
  const int64_t begin = number % num_chunks(pixels) * kChunk;
  return {number / num_chunks(pixels), begin, std::min(pixels, begin + kChunk)};
}

std::tuple<Tensor, Tensor> lpips_distance_cpu(const Tensor& f0, const Tensor& f1, const Tensor& weight) {
  const LpipsDistance call(f0, f1, weight);
  dispatch_float(f0.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const LpipsDistanceArgs<T> args = call.args<T>();
    const int64_t chunks = num_chunks(args.pixels);
    std::vector<double> sums(args.batch * chunks);
    for_chunk_ranges(args, [&](int64_t first, int64_t last) {
      std::vector<float> scratch(call.channels_last ? 0 : 2 * args.channels * kLanes);
      for (int64_t i = first; i < last; ++i) {
        const auto [sample, begin, end] = chunk_of(i, args.pixels);
        sums[i] = call.channels_last ? forward_channels_last(args, sample, begin, end)
                                     : forward_planes(args, sample, begin, end, scratch.data());
      }
    });
    for (int64_t sample = 0; sample < args.batch; ++sample) {
      const auto first = sums.begin() + sample * chunks;
      args.distance[sample] = static_cast<float>(std::accumulate(first, first + chunks, 0.0) / args.pixels);
    }
  });
  return call.outputs();
}

std::tuple<Tensor, Tensor> lpips_distance_backward_cpu(const Tensor& grad, const Tensor& f0, const Tensor& f1,
                                                       const Tensor& weight, const Tensor& stats, bool need0,
                                                       bool need1) {
  const LpipsDistanceBackward call(grad, f0, f1, weight, stats, need0, need1);
  dispatch_float(f0.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto backward = call.channels_last ? backward_channels_last<T> : backward_planes<T>;
    for (const int side : {0, 1}) {
      const LpipsDistanceBackwardArgs<T> args = call.args<T>(side);
      if (!args.grad_own) continue;
      for_chunk_ranges(args, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          const auto [sample, begin, end] = chunk_of(i, args.pixels);
          backward(args, sample, begin, end);
        }
      });
    }
  });
  return call.outputs();
}

}  // namespace
}  // namespace sendvae

STABLE_TORCH_LIBRARY_IMPL(sendvae, CPU, library) {
  library.impl("lpips_distance", TORCH_BOX(&sendvae::lpips_distance_cpu));
  library.impl("lpips_distance_backward", TORCH_BOX(&sendvae::lpips_distance_backward_cpu));
}
