// [B, C, H, W] tensors read in place whatever their memory format: contiguous, channels-last, chunks of channels.
#pragma once

#include <cstdint>

#include "tensor.h"

namespace sendvae {

// Element (b, c, p), where p counts through H and W, lies at data[b stride_b + c stride_c + p stride_p].
template <typename T>
struct Planes {
  const T* data;
  int64_t stride_b, stride_c, stride_p;
};

// H and W count as one dimension when a row follows the one before without a gap.
inline bool has_plane_stride(const Tensor& tensor) {
  const int64_t height = tensor.size(2), width = tensor.size(3);
  return height == 1 || width == 1 || tensor.stride(2) == width * tensor.stride(3);
}

inline Tensor plane_strided(const Tensor& tensor) {
  return has_plane_stride(tensor) ? tensor : torch::stable::contiguous(tensor);
}

// The stride from pixel to pixel of a tensor that has a plane stride.
inline int64_t plane_stride(const Tensor& tensor) { return tensor.stride(tensor.size(3) == 1 ? 2 : 3); }

// The planes of a tensor that has a plane stride.
template <typename T>
Planes<T> planes(const Tensor& tensor) {
  return {data<T>(tensor), tensor.stride(0), tensor.stride(1), plane_stride(tensor)};
}

}  // namespace sendvae
