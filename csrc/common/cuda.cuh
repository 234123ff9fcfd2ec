// Shared code of the CUDA kernels: vector access, warp sums, stream, launch check.
#pragma once

#include <cstdint>
#include <cstring>

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include "dtype.h"
#include "tensor.h"

namespace sendvae {

// Elements in 16 bytes, the widest load and store.
template <typename T>
constexpr int kVectorWidth = 16 / sizeof(T);

template <typename T>
struct alignas(16) Vector {
  T values[kVectorWidth<T>];
};

// Whether vectors at data + i * stride + j * width can be read as 16 bytes for all i, j.
template <typename T>
SENDVAE_HD bool is_vector_aligned(const T* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % kVectorWidth<T> == 0;
}

// Two numbers in one register. Converted together they take half the instructions of one after the other.
__device__ __forceinline__ void unpack_pair(uint32_t bits, BFloat16, float* out) {
  out[0] = __uint_as_float(bits << 16);
  out[1] = __uint_as_float(bits & 0xffff0000u);
}

__device__ __forceinline__ void unpack_pair(uint32_t bits, Float16, float* out) {
  __half2 pair;
  memcpy(&pair, &bits, sizeof bits);
  out[0] = __low2float(pair);
  out[1] = __high2float(pair);
}

__device__ __forceinline__ uint32_t pack_pair(float low, float high, BFloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

__device__ __forceinline__ uint32_t pack_pair(float low, float high, Float16) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

template <int kCount, typename T>
__device__ __forceinline__ void unpack(const T (&values)[kCount], float (&out)[kCount]) {
  if constexpr (sizeof(T) == 2) {
    uint32_t pairs[kCount / 2];
    memcpy(pairs, values, sizeof pairs);
    SENDVAE_UNROLL
    for (int i = 0; i < kCount / 2; ++i) unpack_pair(pairs[i], T{}, out + 2 * i);
  } else {
    SENDVAE_UNROLL
    for (int i = 0; i < kCount; ++i) out[i] = values[i];
  }
}

template <int kCount, typename T>
__device__ __forceinline__ void pack(const float (&values)[kCount], T (&out)[kCount]) {
  if constexpr (sizeof(T) == 2) {
    uint32_t pairs[kCount / 2];
    SENDVAE_UNROLL
    for (int i = 0; i < kCount / 2; ++i) pairs[i] = pack_pair(values[2 * i], values[2 * i + 1], T{});
    memcpy(out, pairs, sizeof pairs);
  } else {
    SENDVAE_UNROLL
    for (int i = 0; i < kCount; ++i) out[i] = values[i];
  }
}

// Reads `count` elements, in one 16-byte load where `aligned` and the vector is full; the rest become 0.
template <typename T>
__device__ __forceinline__ void load_vector(const T* data, int64_t count, bool aligned, float (&out)[kVectorWidth<T>]) {
  constexpr int kWidth = kVectorWidth<T>;
  if (aligned && count >= kWidth) {
    const Vector<T> vector = *reinterpret_cast<const Vector<T>*>(data);
    unpack(vector.values, out);
  } else {
    SENDVAE_UNROLL
    for (int i = 0; i < kWidth; ++i) out[i] = i < count ? to_float(data[i]) : 0.0f;
  }
}

// Has the compiler take the vector as it is: it knows nothing more of its numbers.
template <typename T>
__device__ __forceinline__ void keep_packed(Vector<T>& vector) {
  uint4 bits;
  memcpy(&bits, &vector, sizeof bits);
  asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w));
  memcpy(&vector, &bits, sizeof bits);
}

// Writes the first `count` elements, in one 16-byte store where `aligned` and the vector is full.
template <typename T>
__device__ __forceinline__ void store_vector(T* data, int64_t count, bool aligned,
                                             const float (&values)[kVectorWidth<T>]) {
  constexpr int kWidth = kVectorWidth<T>;
  Vector<T> vector;
  pack(values, vector.values);
  if (aligned && count >= kWidth) {
    keep_packed(vector);  // else nvcc makes one of both branches: fp32 numbers one by one
    *reinterpret_cast<Vector<T>*>(data) = vector;
  } else {
    SENDVAE_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      if (i < count) data[i] = vector.values[i];
    }
  }
}

// The sum over a warp, in a fixed order, in every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  SENDVAE_UNROLL
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// The sums over a warp of kCount values, a power of two, in a fixed order. Lane 32 / kCount * i has that of value i:
// the lanes share the values out among them, which takes half the shuffles of one sum after the other.
template <int kCount>
__device__ __forceinline__ float warp_sums(float (&values)[kCount]) {
  const int lane = threadIdx.x % 32;
  int offset = 16;
  SENDVAE_UNROLL
  for (int count = kCount / 2; count > 0; count /= 2, offset /= 2) {
    const bool upper = (lane & offset) != 0;
    SENDVAE_UNROLL
    for (int i = 0; i < count; ++i) {
      const float kept = upper ? values[i + count] : values[i], sent = upper ? values[i] : values[i + count];
      values[i] = kept + __shfl_xor_sync(0xffffffffu, sent, offset);
    }
  }
  SENDVAE_UNROLL
  for (; offset > 0; offset /= 2) values[0] += __shfl_xor_sync(0xffffffffu, values[0], offset);
  return values[0];
}

// The sum over a block of kThreads threads, in a fixed order, in its first warp. Once per kernel: the shared memory is
// not guarded against a second call.
template <int kThreads, typename T>
__device__ __forceinline__ T block_sum(T value) {
  constexpr int kWarps = kThreads / 32;
  __shared__ T warp_sums[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  value = warp_sum(value);
  if (lane == 0) warp_sums[warp] = value;
  __syncthreads();
  return warp == 0 ? warp_sum(lane < kWarps ? warp_sums[lane] : T{}) : T{};
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_cuda(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": CUDA failed: ", cudaGetErrorString(error));
}

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": CUDA launch failed: ", cudaGetErrorString(error));
}

}  // namespace sendvae
