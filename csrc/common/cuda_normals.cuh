// The normals of philox.h on CUDA in half the instructions: the hardware's logarithm and root, and one polynomial each
// for sine and cosine. With the worst that NVIDIA says of the hardware they are within 1.2e-6 of Box-Muller's, 1.1e-7
// in root mean square; philox.py's own rounding in fp32 comes to 1.8e-6 and 1.5e-7 (over all 2^23 radii and angles).
#pragma once

#include "cuda.cuh"
#include "philox.h"

namespace sendvae {

// `uniform_from_word`, bit by bit: the word's upper bits as the fraction of a number in [1, 2).
__device__ __forceinline__ float fast_uniform(uint32_t word) {
  constexpr uint32_t kExponentOfOne = 0x3f800000u >> 23;
  return __uint_as_float(__funnelshift_r(word, kExponentOfOne, 9)) - (1.0f - 0x1p-24f);
}

// sqrt(-2 ln u). __log2f is within 2^-22 between 1/2 and 2, and within two units in the last place elsewhere (CUDA C++
// Programming Guide, intrinsic functions). That is too little where the logarithm goes through 0: above 7/8 a
// polynomial in w = 1 - u takes its place, good to 2^-26. rsqrtf is within two units, which Newton's step makes good.
__device__ __forceinline__ float fast_radius(float u) {
  constexpr float kMinusTwoLn2 = -1.38629436f;
  const float w = 1.0f - u;
  float p = 0.52573860f;
  p = p * w + 0.48540354f;
  p = p * w + 0.66733772f;
  p = p * w + 0.99998933f;
  p = p * w + 2.0f;
  const float square = w < 0.125f ? p * w : kMinusTwoLn2 * __log2f(u);
  const float reciprocal = rsqrtf(square), root = square * reciprocal;
  return root + (square - root * root) * (0.5f * reciprocal);
}

// `value` with its sign changed where `sign` is negative.
__device__ __forceinline__ float with_sign(float value, float sign) {
  return __uint_as_float(__float_as_uint(value) ^ (__float_as_uint(sign) & 0x80000000u));
}

// Box-Muller, as `normals_from_words`.
__device__ __forceinline__ NormalPair fast_normals(uint32_t word0, uint32_t word1) {
  const float radius = fast_radius(fast_uniform(word0));
  // With the angle 2 pi u: c = u - 1/2, and r = |c| - 1/4 in quarter turns to both sides. Both differences are exact.
  //   cos 2 pi u = sin 2 pi r;  sin 2 pi u = -sign(c) cos 2 pi r
  const float c = fast_uniform(word1) - 0.5f;
  const float r = fabsf(c) - 0.25f;
  const float square = r * r;
  // sin 2 pi r = r p(r^2), to 2^-27 of it.
  float sin = 39.7109184f;
  sin = sin * square - 76.5749893f;
  sin = sin * square + 81.6022339f;
  sin = sin * square - 41.3416786f;
  sin = sin * square + 6.2831855f;
  // -cos 2 pi r = p(r^2), to 2^-32.
  float cos = 24.9822369f;
  cos = cos * square - 60.1440163f;
  cos = cos * square + 85.4535751f;
  cos = cos * square - 64.9393463f;
  cos = cos * square + 19.7392083f;
  cos = cos * square - 1.0f;
  return {radius * (r * sin), radius * with_sign(cos, c)};
}

}  // namespace sendvae
