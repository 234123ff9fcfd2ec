// Elementary functions in fp32, the same on CPU and GPU, written without branches so that compilers vectorise them.
//
// Each is valid on the range its comment gives and nowhere else. Every polynomial is a minimax fit of relative error;
// the exponents given are the fit's own error, far below fp32 rounding. tests/ops/test_compiled.py measures the whole.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace sendvae {

SENDVAE_HD float float_from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

SENDVAE_HD uint32_t bits_from_float(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

// ln x for positive normal x. Accurate in relative terms also near 1, where ln x goes through 0.
SENDVAE_HD float log_normal(float x) {
  constexpr uint32_t kSqrtHalf = 0x3f3504f3u;
  const uint32_t bits = bits_from_float(x);
  // x = 2^exponent * (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), so f is exact and 0 for x = 1.
  const int32_t exponent = static_cast<int32_t>(bits - kSqrtHalf) >> 23;
  const float f = float_from_bits(bits - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  // ln(1 + f) = f - f^2 / 2 + f^3 p(f), to 2^-27.
  float p = -0.0763449776f;
  p = p * f + 0.127615775f;
  p = p * f - 0.131601822f;
  p = p * f + 0.142017579f;
  p = p * f - 0.166233574f;
  p = p * f + 0.200012269f;
  p = p * f - 0.25000821f;
  p = p * f + 0.333333317f;
  const float square = f * f;
  const float e = static_cast<float>(exponent);
  // ln 2 in two parts; the first has trailing zeros enough for e * kLn2High to be exact.
  constexpr float kLn2High = 0.693359375f;
  constexpr float kLn2Low = -2.12194440e-4f;
  const float small = p * f * square + e * kLn2Low - 0.5f * square;
  return small + f + e * kLn2High;
}

// e^x for |x| <= 80; NaN gives NaN.
SENDVAE_HD float exp_bounded(float x) {
  // x = n ln 2 + r. Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits, NaN or not.
  constexpr float kRound = 12582912.0f;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  // e^r = 1 + r + r^2 p(r) on |r| <= ln(2) / 2, to 2^-28.
  float p = 0.00138144669f;
  p = p * r + 0.00836878041f;
  p = p * r + 0.0416683942f;
  p = p * r + 0.166665201f;
  p = p * r + 0.499999934f;
  const float e = 1.0f + (r + r * r * p);
  const float scale = float_from_bits((bits_from_float(shifted) << 23) + 0x3f800000u);
  return e * scale;
}

struct SinCos {
  float sin, cos;
};

// sin and cos of 2 pi u for u = (k + 0.5) * 2^-23, 0 <= k < 2^23. The reduction is done on the integer, so it is exact.
SENDVAE_HD SinCos sincos_turns(uint32_t k) {
  const uint32_t quadrant = (k + (1u << 20)) >> 21;  // nearest quarter turn
  const int32_t offset = static_cast<int32_t>(k) - static_cast<int32_t>(quadrant << 21);
  const float r = (static_cast<float>(offset) + 0.5f) * 0x1p-23f;  // turns, |r| <= 1/8
  const float square = r * r;
  // sin 2 pi r = 2 pi r + r^3 p(r^2), to 2^-28; 2 pi in two parts.
  float s = -75.4456033f;
  s = s * square + 81.5937667f;
  s = s * square - 41.3416723f;
  const float sin = r * 6.2831855f + r * (s * square - 1.7484556e-7f);
  // cos 2 pi r = 1 + r^2 q(r^2), to 2^-34.
  float c = 59.2459642f;
  c = c * square - 85.4437417f;
  c = c * square + 64.9393265f;
  c = c * square - 19.7392087f;
  const float cos = 1.0f + c * square;
  const bool odd = (quadrant & 1u) != 0;
  const uint32_t sin_sign = (quadrant & 2u) << 30;
  const uint32_t cos_sign = ((quadrant + 1u) & 2u) << 30;
  return {float_from_bits(bits_from_float(odd ? cos : sin) ^ sin_sign),
          float_from_bits(bits_from_float(odd ? sin : cos) ^ cos_sign)};
}

}  // namespace sendvae
