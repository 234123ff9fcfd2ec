// Count, mean and squares of values in the CUDA kernels of group_norm_silu, and how those of parts are joined.
#pragma once

#include <cstdint>

#include "tiles.cuh"

namespace sendvae {

// squares: the sum of the squares of the distances from the mean. Without values all are 0.
struct Moments {
  float count, mean, squares;
};

// Of both together (Chan, Golub and LeVeque 1983).
__device__ __forceinline__ Moments joined(const Moments& one, const Moments& other) {
  const float count = one.count + other.count;
  const float share = other.count / max(count, 1.0f);
  const float distance = other.mean - one.mean;
  return {count, one.mean + distance * share, one.squares + other.squares + distance * distance * (share * one.count)};
}

// Of parts that come one by one. Distances are taken from the mean of one of them: the squares of equal parts then sum
// up to no more than as many times the result as there are parts, whatever the values.
struct MomentsOfParts {
  float centre, count = 0.0f, sum = 0.0f, squares = 0.0f;

  __device__ explicit MomentsOfParts(float mean_of_a_part) : centre(mean_of_a_part) {}

  __device__ __forceinline__ void add(const Moments& part) {
    const float distance = part.mean - centre;
    const float weighted = part.count * distance;
    count += part.count;
    sum += weighted;
    squares += part.squares + weighted * distance;
  }
  __device__ __forceinline__ Moments moments() const {
    const float shift = sum / max(count, 1.0f);
    return {count, centre + shift, squares - sum * shift};
  }
};

// Those of a warp's lanes, in the first lane.
__device__ __forceinline__ Moments warp_moments(Moments moments) {
  SENDVAE_UNROLL
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    Moments other;
    other.count = __shfl_xor_sync(0xffffffffu, moments.count, offset);
    other.mean = __shfl_xor_sync(0xffffffffu, moments.mean, offset);
    other.squares = __shfl_xor_sync(0xffffffffu, moments.squares, offset);
    moments = joined(moments, other);
  }
  return moments;
}

// Those of the threads of a block of whole warps, in its first thread. Once per kernel.
__device__ __forceinline__ Moments block_moments(Moments moments) {
  __shared__ Moments of_warps[kJoinThreads / kWarp];
  const uint32_t thread = threadIdx.y * blockDim.x + threadIdx.x;
  const uint32_t warps = blockDim.x * blockDim.y / kWarp;
  moments = warp_moments(moments);
  if (thread % kWarp == 0) of_warps[thread / kWarp] = moments;
  __syncthreads();
  return thread < kWarp ? warp_moments(thread < warps ? of_warps[thread] : Moments{}) : moments;
}

}  // namespace sendvae
