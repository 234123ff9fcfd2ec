// Reading and writing rows in vectors of 16 bytes.
//
// kWhole says that every vector is aligned and lies wholly inside or wholly outside of its row, so that it is one
// access under one predicate; else elements are read one by one. Outside they are 0, and nothing is written. A
// constant, because loads behind a choice made for each of them would wait for one another.
#pragma once

#include <cstring>

#include "cuda.cuh"

namespace sendvae {

// `count`: elements from `data` to the end of the row, negative past it. Nothing that is read this way is written by
// the same kernel, which lets the compiler move loads before stores.
template <bool kWhole, typename T>
__device__ __forceinline__ Vector<T> read(const T* data, int64_t count) {
  Vector<T> vector = {};
  if constexpr (kWhole) {
    if (count > 0) {
      const uint4 bits = __ldg(reinterpret_cast<const uint4*>(data));
      memcpy(&vector, &bits, sizeof bits);
    }
  } else {
    SENDVAE_UNROLL
    for (int i = 0; i < kVectorWidth<T>; ++i) {
      if (i < count) vector.values[i] = data[i];
    }
  }
  return vector;
}

template <bool kWhole, typename T>
__device__ __forceinline__ void write(T* data, int64_t count, const Vector<T>& vector) {
  if constexpr (kWhole) {
    if (count > 0) *reinterpret_cast<Vector<T>*>(data) = vector;
  } else {
    SENDVAE_UNROLL
    for (int i = 0; i < kVectorWidth<T>; ++i) {
      if (i < count) data[i] = vector.values[i];
    }
  }
}

// Whether every vector of rows `stride` elements apart is whole. An absent tensor, null with stride 0, counts as whole.
template <typename T>
bool is_whole(const T* data, int64_t stride, int64_t width) {
  return is_vector_aligned(data, stride) && width % kVectorWidth<T> == 0;
}

}  // namespace sendvae
