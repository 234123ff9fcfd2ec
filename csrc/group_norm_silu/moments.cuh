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
  moments = warp_moments(moments);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = moments;
  __syncthreads();
  if (threadIdx.x >= kWarp) return moments;
  return warp_moments(threadIdx.x < blockDim.x / kWarp ? of_warps[threadIdx.x] : Moments{});
}

// What one of so many members has to join of the moments [B, chunks, 2, C] of a group's channels in all chunks.
__device__ __forceinline__ Moments moments_for_member(const GroupNormShape& shape, const Tiling& tiling,
                                                      const float* moments, int64_t sample, int64_t first_channel,
                                                      uint32_t member, uint32_t members) {
  const float* first = moments + sample * tiling.chunks * 2 * shape.channels + first_channel;
  const auto part = [&](uint32_t index) -> Moments {
    const uint32_t chunk = index / tiling.group_channels;
    const float* mean = first + static_cast<int64_t>(chunk) * 2 * shape.channels + index % tiling.group_channels;
    return {static_cast<float>(pixels_in(shape, tiling, chunk)), mean[0], mean[shape.channels]};
  };
  const uint32_t count = tiling.chunks * tiling.group_channels;
  if (member >= count) return Moments{};
  MomentsOfParts parts(part(member).mean);
  for (uint32_t index = member; index < count; index += members) parts.add(part(index));
  return parts.moments();
}

} // namespace sendvae
