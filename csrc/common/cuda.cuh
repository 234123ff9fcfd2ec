// Shared code of the CUDA kernels: vector access, warp sums, stream, launch check.
#pragma once

#include <cstdint>

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

// Reads `count` elements, in one 16-byte load where `aligned` and the vector is full; the rest become 0.
template <typename T>
__device__ __forceinline__ void load_vector(const T* data, int64_t count, bool aligned, float (&out)[kVectorWidth<T>]) {
  constexpr int kWidth = kVectorWidth<T>;
  if (aligned && count >= kWidth) {
    const Vector<T> vector = *reinterpret_cast<const Vector<T>*>(data);
    SENDVAE_UNROLL
    for (int i = 0; i < kWidth; ++i) out[i] = to_float(vector.values[i]);
  } else {
    SENDVAE_UNROLL
    for (int i = 0; i < kWidth; ++i) out[i] = i < count ? to_float(data[i]) : 0.0f;
  }
}

// Writes the first `count` elements, in one 16-byte store where `aligned` and the vector is full.
template <typename T>
__device__ __forceinline__ void store_vector(T* data, int64_t count, bool aligned,
                                             const float (&values)[kVectorWidth<T>]) {
  constexpr int kWidth = kVectorWidth<T>;
  if (aligned && count >= kWidth) {
    Vector<T> vector;
    SENDVAE_UNROLL
    for (int i = 0; i < kWidth; ++i) vector.values[i] = from_float<T>(values[i]);
    *reinterpret_cast<Vector<T>*>(data) = vector;
  } else {
    SENDVAE_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      if (i < count) data[i] = from_float<T>(values[i]);
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

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": CUDA launch failed: ", cudaGetErrorString(error));
}

}  // namespace sendvae
