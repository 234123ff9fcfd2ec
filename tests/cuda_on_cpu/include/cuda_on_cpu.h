// CUDA for g++, as far as csrc uses it. Included before everything else (-include), so that neither torch nor the
// standard library sees a macro of CUDA. What is declared here is what the translator lets through.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include "runtime.h"

// ---- The device's language ----

#define __CUDACC__ 1
#define __CUDA_ARCH__ 900
#define __global__ __attribute__((noipa))  // a function of its own, so that the library's kernels can be listed
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define threadIdx (cuda_on_cpu::thread_index())
#define blockIdx (cuda_on_cpu::block_index())
#define blockDim (cuda_on_cpu::block_size())
#define gridDim (cuda_on_cpu::grid_size())

struct alignas(8) uint2 {
  uint32_t x, y;
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

using std::max;
using std::min;

inline void __syncthreads(cuda_on_cpu::Where where = cuda_on_cpu::Where::current()) {
  cuda_on_cpu::sync_threads(where);
}

template <typename T>
inline T __shfl_xor_sync(uint32_t mask, T value, int lane_mask,
                         cuda_on_cpu::Where where = cuda_on_cpu::Where::current()) {
  T out;
  cuda_on_cpu::shuffle(mask, &value, &out, sizeof(T), cuda_on_cpu::lane() ^ lane_mask, where);
  return out;
}

template <typename T>
inline T __shfl_sync(uint32_t mask, T value, int lane, cuda_on_cpu::Where where = cuda_on_cpu::Where::current()) {
  T out;
  cuda_on_cpu::shuffle(mask, &value, &out, sizeof(T), lane, where);
  return out;
}

template <typename T>
inline T __ldg(const T* pointer) {
  cuda_on_cpu::note_ldg(pointer, sizeof(T));
  return *pointer;
}

// Past the first cache.
template <typename T>
inline T __ldcg(const T* pointer) {
  return *pointer;
}

inline void __threadfence() { cuda_on_cpu::fence(); }

inline uint32_t atomicInc(uint32_t* counter, uint32_t last) { return cuda_on_cpu::count_up(counter, last); }

// Accesses that leave the caches first.
template <typename T>
inline T __ldcs(const T* pointer) {
  return *pointer;
}

template <typename T>
inline void __stcs(T* pointer, T value) {
  *pointer = value;
}

inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}

// As inexact as the CUDA programming guide allows: by 2^-22 between 1/2 and 2, by two units in the last place
// elsewhere.
inline float __log2f(float x) {
  const float exact = std::log2(x);
  return exact + (x >= 0.5f && x <= 2.0f ? 0x1p-22f : 0x1p-22f * exact);
}

// By two units in the last place, as the guide allows.
inline float rsqrtf(float x) { return (1.0f + 0x1p-22f) / std::sqrt(x); }

// As far off as the CUDA programming guide (__expf) and the PTX ISA (rcp.approx, of which __fdividef is made) allow, up
// or down by chance of the argument's last bit.
inline float off_by(float exact, uint32_t ulps, float argument) {
  if (!std::isnormal(exact)) return exact;
  return __uint_as_float(__float_as_uint(exact) + (__float_as_uint(argument) & 1 ? ulps : -ulps));
}
inline float __expf(float x) { return off_by(std::exp(x), 2 + static_cast<uint32_t>(std::fabs(1.173f * x)), x); }
inline float __fdividef(float x, float y) { return x * (std::fabs(y) > 0x1p126f ? 0.0f : off_by(1.0f / y, 1, y)); }

// ---- What translate.py makes of launches, shared variables and tensors ----

namespace cuda_on_cpu {

#if defined(__SANITIZE_THREAD__)
constexpr bool kChecked = true;
#else
constexpr bool kChecked = false;
#endif

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
T& shared(const void* variable) {
  return *static_cast<T*>(shared_memory(variable, sizeof(T), alignof(T)));
}

template <typename Kernel>
struct Launch {
  Kernel kernel;
  dim3 grid, block;
  size_t dynamic_shared_bytes;

  template <typename... Arguments>
  void operator()(const Arguments&... arguments) {
    auto thread = [&] { kernel(arguments...); };
    run_kernel(grid, block, dynamic_shared_bytes, [](void* it) { (*static_cast<decltype(thread)*>(it))(); }, &thread,
               {{&arguments, sizeof(arguments), std::is_floating_point_v<Arguments>}...});
  }
};

template <typename Kernel, typename Stream>
Launch<Kernel> launch(Kernel kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes, Stream) {
  return {kernel, grid, block, dynamic_shared_bytes};
}

inline size_t extent(const Tensor& tensor) {
  size_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  return tensor.numel() == 0 ? 0 : (last + 1) * tensor.element_size();
}

inline void note(const Tensor& tensor, bool writable) {
  if (is_recording()) record_tensor(tensor.const_data_ptr(), extent(tensor));
  if (!kChecked) return;
  note_tensor(tensor.const_data_ptr(), tensor.element_size(), tensor.dim(), tensor.sizes().data(),
              tensor.strides().data(), writable);
}

inline const void* const_data_ptr(const Tensor& tensor) {
  note(tensor, false);
  return tensor.const_data_ptr();
}

inline void* mutable_data_ptr(const Tensor& tensor) {
  note(tensor, true);
  return tensor.mutable_data_ptr();
}

// All of its bytes are written with what is NaN in every format, so that use of undefined memory shows in the results.
inline Tensor as_new(Tensor tensor) {
  const size_t bytes = tensor.numel() * tensor.element_size();
  if (bytes == 0 || is_recording()) return tensor;
  std::memset(tensor.mutable_data_ptr(), 0xff, bytes);
  if (kChecked) note_new(tensor.const_data_ptr(), bytes);
  return tensor;
}

inline AOTITorchError empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                    int32_t device_type, int32_t device_index, AtenTensorHandle* made) {
  const AOTITorchError error = aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, device_index, made);
  AtenTensorHandle same;
  if (error == AOTI_TORCH_SUCCESS && aoti_torch_new_tensor_handle(*made, &same) == AOTI_TORCH_SUCCESS) {
    as_new(Tensor(same));
  }
  return error;
}

// In the place of the guard that every op holds for its device.
struct Op {
  explicit Op(int32_t) { begin_op(); }
  ~Op() { end_op(); }
};

}  // namespace cuda_on_cpu

// ---- The host's functions. Launches and copies are done when they return; a launch that fails throws. ----

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };
enum cudaMemcpyKind { cudaMemcpyHostToDevice };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

inline cudaError_t cudaStreamGetId(cudaStream_t, unsigned long long* id) {
  *id = 1;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  if (cuda_on_cpu::kChecked) cuda_on_cpu::note_copied(to, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  if (cuda_on_cpu::kChecked) cuda_on_cpu::note_copied(to, bytes);
  return cudaSuccess;
}
