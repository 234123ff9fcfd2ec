// Shared code of the CUDA kernels that draw noise for [B, C, H, W] samples: a thread takes a vector of consecutive
// elements in [C, H, W] order, and draws the Philox blocks of exactly those; a block of threads stays within one
// sample.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda.cuh"
#include "cuda_normals.cuh"
#include "philox.h"

namespace sendvae {

constexpr int kMaxThreads = 256;

// The place where a thread works, and the values that all threads of its block share.
struct Place {
  int64_t sample;
  bool first_of_sample;  // the first block of the sample
  uint32_t element;  // first of the thread's vector; may lie past the sample's end
};

__device__ __forceinline__ Place find_place(uint32_t blocks_per_sample, int vector_width) {
  const uint32_t block = blockIdx.x % blocks_per_sample;
  return {static_cast<int64_t>(blockIdx.x / blocks_per_sample), block == 0,
          (block * blockDim.x + threadIdx.x) * vector_width};
}

// The channel of consecutive elements and their position in its plane, with one division at the start.
struct ChannelCursor {
  uint32_t channel, left, plane;
  __device__ ChannelCursor(uint32_t element, uint32_t plane_) : channel(element / plane_), plane(plane_) {
    left = plane - element % plane;
  }
  __device__ uint32_t position() const { return plane - left; }
  __device__ void advance() {
    if (--left == 0) {
      ++channel;
      left = plane;
    }
  }
};

template <int kWidth>
__device__ __forceinline__ void draw_normals(PhiloxKey key, Stream stream, int64_t sample_id, uint32_t element,
                                             float (&out)[kWidth]) {
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; i += 4) {
    const PhiloxWords words = sample_words(key, stream, sample_id, (element + i) / 4);
    const NormalPair low = fast_normals(words.x, words.y), high = fast_normals(words.z, words.w);
    out[i] = low.first;
    out[i + 1] = low.second;
    out[i + 2] = high.first;
    out[i + 3] = high.second;
  }
}

struct Grid {
  uint32_t blocks, threads, blocks_per_sample;
};

// Whole warps, as few as a small sample needs; at least one block a sample, even an empty one.
inline Grid grid_for(const char* op, int64_t batch, uint32_t elements, int vector_width) {
  const int64_t vectors = (static_cast<int64_t>(elements) + vector_width - 1) / vector_width;
  const int64_t threads = std::clamp<int64_t>((vectors + 31) / 32 * 32, 32, kMaxThreads);
  const int64_t blocks_per_sample = std::max<int64_t>(1, (vectors + threads - 1) / threads);
  const int64_t blocks = batch * blocks_per_sample;
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), op, ": too large for one launch: ", blocks, " blocks");
  return {static_cast<uint32_t>(blocks), static_cast<uint32_t>(threads), static_cast<uint32_t>(blocks_per_sample)};
}

}  // namespace sendvae
