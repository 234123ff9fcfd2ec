// Shared code of the two directions of adaln on CUDA: reading and writing of vectors.
#pragma once

#include <cstring>

#include "../common/whole_vectors.cuh"
#include "adaln.h"

namespace sendvae {

constexpr int kWarp = 32;
constexpr int kMaxRegisterWidth = 4096;  // columns of a token that are kept in registers

// `kCount` elements in fp32, a multiple of a vector: fp32 modulation of 16-bit tokens takes two.
template <bool kWhole, int kCount, typename T>
__device__ __forceinline__ void load(const T* data, int64_t count, float (&out)[kCount]) {
  constexpr int kWidth = kVectorWidth<T>;
  Vector<T> vectors[kCount / kWidth];
  SENDVAE_UNROLL
  for (int i = 0; i < kCount / kWidth; ++i) vectors[i] = read<kWhole>(data + i * kWidth, count - i * kWidth);
  T values[kCount];
  memcpy(values, vectors, sizeof values);
  unpack(values, out);
}

template <bool kWhole, int kCount, typename T>
__device__ __forceinline__ void store(T* data, int64_t count, const float (&values)[kCount]) {
  constexpr int kWidth = kVectorWidth<T>;
  T packed[kCount];
  pack(values, packed);
  SENDVAE_UNROLL
  for (int i = 0; i < kCount; i += kWidth) {
    Vector<T> vector;
    memcpy(&vector, packed + i, sizeof vector);
    write<kWhole>(data + i, count - i, vector);
  }
}

template <typename T>
bool is_whole(const Tokens<T>& tokens, int64_t width) {
  return is_whole(tokens.data, tokens.batch_stride, width) && is_whole(tokens.data, tokens.token_stride, width);
}

template <typename M>
bool is_whole(const ModulationRows<M>& rows, int64_t width) {
  return is_whole(rows.data, rows.stride, width);
}

inline uint32_t blocks_for(const char* op, int64_t count, int64_t per_block) {
  const int64_t blocks = (count + per_block - 1) / per_block;
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), op, ": too large for one launch: ", blocks, " blocks");
  return static_cast<uint32_t>(blocks);
}

}  // namespace sendvae
