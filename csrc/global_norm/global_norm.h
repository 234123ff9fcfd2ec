// global_norm: the L2 norm of all elements of a list of tensors.
//
//   norm = sqrt(sum over tensors and elements of x^2)
//
// Squares and sums are double: no square of an fp32 number overflows, so the norm is finite exactly when every element
// is and the root fits fp32. The order of the sum is fixed: elements of a chunk, then chunks.
#pragma once

#include <cmath>

#include "../common/chunk_table.h"
#include "../common/tensor.h"

namespace sendvae {

constexpr int64_t kNormChunk = 32768;  // elements

SENDVAE_HD double square(float value) {
  const double wide = value;
  return wide * wide;
}

SENDVAE_HD float norm_from_sum(double sum) { return static_cast<float>(sqrt(sum)); }

template <typename T>
struct NormEntry {
  const T* data;
  int64_t size;
};

// Holds the checked inputs and the fresh output of one call.
struct GlobalNorm {
  static constexpr const char* kName = "global_norm";
  const std::vector<Tensor>& tensors;
  int64_t num_chunks = 0;
  Tensor norm;

  explicit GlobalNorm(const std::vector<Tensor>& tensors_) : tensors(tensors_) {
    STD_TORCH_CHECK(!tensors.empty(), kName, ": the list is empty");
    check_float_dtype(kName, "tensors", tensors[0]);
    check_list_like(kName, "tensors", tensors, tensors[0].scalar_type(), tensors);
    for (const Tensor& tensor : tensors) num_chunks += (tensor.numel() + kNormChunk - 1) / kNormChunk;
    norm = empty_on(tensors[0], {}, ScalarType::Float);
  }

  template <typename T>
  std::vector<NormEntry<T>> entries() const {
    std::vector<NormEntry<T>> list;
    list.reserve(tensors.size());
    for (const Tensor& tensor : tensors) list.push_back({data<T>(tensor), tensor.numel()});
    return list;
  }
};

}  // namespace sendvae
