// Checks and helpers on stable-ABI tensors, for both op libraries. The checks are the last line of defence, behind
// those of the Python functions; messages begin with the op's name.
#pragma once

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

// Checks a vector on the first argument's device and returns it packed.
inline Tensor checked_vector(const char* op, const char* name, const Tensor& tensor, const Tensor& first,
                             ScalarType dtype, int64_t length) {
  check_same_device(op, name, tensor, first);
  check_dtype(op, name, tensor, dtype);
  check_shape(op, name, tensor, {length});
  return torch::stable::contiguous(tensor);
}

inline Tensor empty_packed(const Tensor& like) {
  return torch::stable::new_empty(like, like.sizes(), like.scalar_type());
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
