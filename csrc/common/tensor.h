// Checks and helpers on stable-ABI tensors, for both op libraries. The checks are the last line of defence, behind
// those of the Python functions; messages begin with the op's name.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <string>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "dtype.h"

namespace sendvae {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_string(const int64_t* sizes, size_t count) {
  std::ostringstream out;
  out << "[";
  for (size_t i = 0; i < count; ++i) out << (i ? ", " : "") << sizes[i];
  out << "]";
  return out.str();
}

inline std::string shape_string(const Tensor& tensor) { return shape_string(tensor.sizes().data(), tensor.dim()); }

inline void check_shape(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  bool equal = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; equal && i < shape.size(); ++i) equal = tensor.size(i) == shape.begin()[i];
  STD_TORCH_CHECK(equal, op, ": ", name, " must have shape ", shape_string(shape.begin(), shape.size()), ", got ",
                  shape_string(tensor));
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " must be ", torch::headeronly::toString(dtype),
                  ", got ", torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor, const Tensor& other) {
  STD_TORCH_CHECK(tensor.device() == other.device(), op, ": ", name, " is on another device than the first argument");
}

inline void check_float_dtype(const char* op, const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op, ": ",
                  name, " must be Float, BFloat16 or Half, got ", torch::headeronly::toString(dtype));
}

// [B, C, H, W] whose samples are small enough for 32-bit element numbers, as the noise needs them.
inline void check_sample_shape(const char* op, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 4, op, ": expected [B, C, H, W], got ", shape_string(tensor));
  const int64_t elements = tensor.size(1) * tensor.size(2) * tensor.size(3);
  STD_TORCH_CHECK(elements < (int64_t{1} << 31), op, ": a sample must have fewer than 2^31 elements, got ", elements);
}

// Packed, copied only if it is not: torch::stable::contiguous goes through the dispatcher to find that out.
inline Tensor packed(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Whether [B, C, H, W] lies channels-last without gaps; strides along sizes of 1 do not count.
inline bool is_packed_channels_last(const Tensor& tensor) {
  int64_t expected = 1;
  for (const int64_t i : {1, 3, 2, 0}) {
    if (tensor.size(i) != 1 && tensor.stride(i) != expected) return false;
    expected *= tensor.size(i);
  }
  return true;
}

// [B, C, H, W] channels-last, copied only if it is not.
inline Tensor packed_channels_last(const Tensor& tensor) {
  if (is_packed_channels_last(tensor)) return tensor;
  return torch::stable::contiguous(tensor, torch::headeronly::MemoryFormat::ChannelsLast);
}

// Checks a vector on the first argument's device and returns it packed.
inline Tensor checked_vector(const char* op, const char* name, const Tensor& tensor, const Tensor& first,
                             ScalarType dtype, int64_t length) {
  check_same_device(op, name, tensor, first);
  check_dtype(op, name, tensor, dtype);
  check_shape(op, name, tensor, {length});
  return packed(tensor);
}

// A new tensor on the device of `like`. By the shim for this one purpose: torch::stable::new_empty looks its operator
// up by name at every call and takes three times as long.
inline Tensor empty_strided_on(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                               const int64_t* strides, ScalarType dtype) {
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type, device_index, &made));
  return Tensor(made);
}

constexpr size_t kMaxDims = 8;

// Contiguous, of up to `kMaxDims` dimensions.
inline Tensor empty_on(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  STD_TORCH_CHECK(sizes.size() <= kMaxDims, "empty_on: at most ", kMaxDims, " dimensions, got ", sizes.size());
  int64_t strides[kMaxDims], stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);  // as PyTorch counts around a size of 0
  }
  return empty_strided_on(like, sizes, strides, dtype);
}

inline Tensor empty_packed(const Tensor& like) { return empty_on(like, like.sizes(), like.scalar_type()); }

// Channels-last, of the sizes [B, C, H, W] and the type of `like`.
inline Tensor empty_channels_last(const Tensor& like) {
  const int64_t channels = like.size(1), row = like.size(3) * channels;
  const int64_t strides[] = {like.size(2) * row, 1, row, channels};
  return empty_strided_on(like, like.sizes(), strides, like.scalar_type());
}

// A list whose tensors are packed, of one dtype, on the device of `like` and as large as its tensors.
inline void check_list_like(const char* op, const char* name, const std::vector<Tensor>& list, ScalarType dtype,
                            const std::vector<Tensor>& like) {
  STD_TORCH_CHECK(list.size() == like.size(), op, ": ", name, " has ", list.size(), " tensors, not ", like.size());
  for (size_t i = 0; i < list.size(); ++i) {
    check_dtype(op, name, list[i], dtype);
    check_same_device(op, name, list[i], like[0]);
    STD_TORCH_CHECK(list[i].is_contiguous(), op, ": ", name, " must be contiguous");
    STD_TORCH_CHECK(list[i].numel() == like[i].numel(), op, ": ", name, " has ", list[i].numel(), " elements, not ",
                    like[i].numel());
  }
}

// True when everything behind the first dimension is packed; the stride of the first dimension is free. So a half of
// `moments.chunk(2, dim=1)` needs no copy.
inline bool is_inner_contiguous(const Tensor& tensor) {
  int64_t expected = 1;
  for (int64_t i = tensor.dim() - 1; i > 0; --i) {
    if (tensor.size(i) != 1 && tensor.stride(i) != expected) return false;
    expected *= tensor.size(i);
  }
  return true;
}

inline Tensor inner_contiguous(const Tensor& tensor) {
  return is_inner_contiguous(tensor) ? tensor : torch::stable::contiguous(tensor);
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Calls `function` with a value of the storage type that belongs to `dtype` (checked before by check_float_dtype).
template <typename Function>
void dispatch_float(ScalarType dtype, const Function& function) {
  switch (dtype) {
    case ScalarType::Float:
      return function(float{});
    case ScalarType::BFloat16:
      return function(BFloat16{});
    case ScalarType::Half:
      return function(Float16{});
    default:
      STD_TORCH_CHECK(false, "dispatch_float: unexpected dtype ", torch::headeronly::toString(dtype));
  }
}

}  // namespace sendvae
