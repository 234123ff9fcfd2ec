// By the compiler's own half: csrc/common/dtype.h needs no more than conversions.
#pragma once

struct __half {
  _Float16 value;
};

inline __half __float2half_rn(float value) { return {static_cast<_Float16>(value)}; }
inline float __half2float(__half half) { return static_cast<float>(half.value); }
inline uint16_t __half_as_ushort(__half half) { return std::bit_cast<uint16_t>(half); }
inline __half __ushort_as_half(uint16_t bits) { return std::bit_cast<__half>(bits); }

struct __half2 {
  __half x, y;
};

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float __low2float(__half2 pair) { return __half2float(pair.x); }
inline float __high2float(__half2 pair) { return __half2float(pair.y); }
