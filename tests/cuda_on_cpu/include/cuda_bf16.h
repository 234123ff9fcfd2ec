// The bits alone: csrc/common/dtype.h converts no other way.
#pragma once

struct __nv_bfloat16 {
  uint16_t bits;
};

// To nearest, ties to even; NaN is the one that the hardware makes.
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (std::isnan(value)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }

struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
