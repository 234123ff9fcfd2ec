// The storage types of the ops and their conversion to and from fp32, in which everything is computed.
//
// Own types, because the host conversions must be free of branches and calls for compilers to vectorise them.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "host_device.h"
#include "math.h"

namespace sendvae {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

SENDVAE_HD float to_float(float value) { return value; }

SENDVAE_HD float to_float(BFloat16 value) { return float_from_bits(static_cast<uint32_t>(value.bits) << 16); }

SENDVAE_HD float to_float(Float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  // Moves the exponent from bias 15 to bias 127; normalises subnormals on the way.
  const uint32_t finite = bits_from_float(float_from_bits(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;  // infinity, NaN
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  return float_from_bits((magnitude >= 0x0f800000u ? special : finite) | sign);
#endif
}

template <typename T>
SENDVAE_HD T from_float(float value);

template <>
SENDVAE_HD float from_float<float>(float value) {
  return value;
}

// Rounds to nearest, ties to even; NaN stays NaN.
template <>
SENDVAE_HD BFloat16 from_float<BFloat16>(float value) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = bits_from_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded)};
#endif
}

// Rounds to nearest, ties to even; 65520 and above become infinity; NaN stays NaN.
template <>
SENDVAE_HD Float16 from_float<Float16>(float value) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = bits_from_float(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // One unit in the last place of 0.5 is the smallest fp16 subnormal, 2^-24: the addition does the rounding.
  const uint32_t subnormal = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {static_cast<uint16_t>(half | sign)};
#endif
}

}  // namespace sendvae
