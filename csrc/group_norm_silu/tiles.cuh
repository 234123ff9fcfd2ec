// Tiles of maps in the CUDA kernels of group_norm_silu: cutting, reading, writing, and sums over a block.
#pragma once

#include <cstdint>

#include "../common/cuda.cuh"
#include "group_norm_silu.h"

namespace sendvae {

constexpr int kWarp = 32;
constexpr int kThreads = 256;      // of a tile's block, at most
constexpr int kMaxColumns = 16;    // vectors of a tile side by side: 256 bytes of each pixel
constexpr int kRows = 8;           // pixels of each thread
constexpr int kBatch = 4;          // so many of them are loaded before the first is used
constexpr int kResidualBatch = 2;  // likewise of a residual, beside all of x
constexpr int kJoinThreads = 128;

// The block of a tile is [rows, columns] threads; a thread has one vector of channels of kRows pixels.
struct Tiling {
  uint32_t columns, rows;          // blockDim.x, blockDim.y
  uint32_t column_tiles, chunks;   // tiles of a sample: side by side, and one after the other
  uint32_t blocks;

  __host__ __device__ int64_t chunk_pixels() const { return static_cast<int64_t>(rows) * kRows; }
};

// Pixels of a chunk; the last may have fewer.
__device__ __forceinline__ int64_t pixels_in(const GroupNormShape& shape, const Tiling& tiling, int64_t chunk) {
  const int64_t left = shape.pixels - chunk * tiling.chunk_pixels();
  return left < tiling.chunk_pixels() ? left : tiling.chunk_pixels();
}

// The part of a map that a thread works on.
template <int kWidth>
struct Place {
  int64_t sample, chunk;
  int64_t channel;   // the first of its vector
  int64_t count;     // channels from there on; not positive: this thread has none
  int64_t pixels;    // of the chunk
  int64_t offset;    // of its vector in the chunk's first pixel

  __device__ Place(const GroupNormShape& shape, const Tiling& tiling, uint32_t block) {
    const uint32_t tile = block / tiling.column_tiles;
    sample = tile / tiling.chunks;
    chunk = tile % tiling.chunks;
    channel = static_cast<int64_t>(block % tiling.column_tiles * blockDim.x + threadIdx.x) * kWidth;
    count = shape.channels - channel;
    pixels = pixels_in(shape, tiling, chunk);
    offset = (sample * shape.pixels + chunk * tiling.chunk_pixels()) * shape.channels + channel;
  }

  // The thread's pixel of this row within the chunk, whether there is one, and where its vector is in a map.
  __device__ int64_t pixel(int row) const { return row * static_cast<int64_t>(blockDim.y) + threadIdx.y; }
  __device__ bool has(int row) const { return count > 0 && pixel(row) < pixels; }
  __device__ int64_t element(const GroupNormShape& shape, int row) const {
    return offset + pixel(row) * shape.channels;
  }
};

// 16 bytes of a map as they are in memory: 16-bit numbers stay two to a register until they are used.
struct alignas(16) Packed {
  uint32_t words[4];
};

template <typename T>
__device__ __forceinline__ void unpack(const Packed& packed, float (&out)[kVectorWidth<T>]) {
  Vector<T> vector;
  memcpy(&vector, &packed, sizeof packed);
  SENDVAE_UNROLL
  for (int i = 0; i < kVectorWidth<T>; ++i) out[i] = to_float(vector.values[i]);
}

template <typename T>
__device__ __forceinline__ Packed pack(const float (&values)[kVectorWidth<T>]) {
  Vector<T> vector;
  SENDVAE_UNROLL
  for (int i = 0; i < kVectorWidth<T>; ++i) vector.values[i] = from_float<T>(values[i]);
  Packed packed;
  memcpy(&packed, &vector, sizeof packed);
  return packed;
}

// kAligned: all vectors are full and can be read and written as 16 bytes. A constant, because loads behind a choice
// made for each of them would wait for one another.
template <bool kAligned, typename T>
__device__ __forceinline__ Packed load_packed(const T* data, int64_t count) {
  if constexpr (kAligned) {
    return *reinterpret_cast<const Packed*>(data);
  } else {
    Vector<T> vector;
    SENDVAE_UNROLL
    for (int i = 0; i < kVectorWidth<T>; ++i) vector.values[i] = i < count ? data[i] : T{};
    Packed packed;
    memcpy(&packed, &vector, sizeof packed);
    return packed;
  }
}

template <bool kAligned, typename T>
__device__ __forceinline__ void store_packed(T* data, int64_t count, const Packed& packed) {
  if constexpr (kAligned) {
    *reinterpret_cast<Packed*>(data) = packed;
  } else {
    Vector<T> vector;
    memcpy(&vector, &packed, sizeof packed);
    SENDVAE_UNROLL
    for (int i = 0; i < kVectorWidth<T>; ++i) {
      if (i < count) data[i] = vector.values[i];
    }
  }
}

// The thread's vectors in kNum rows of a map, as far as it has them.
template <bool kAligned, typename T, int kNum>
__device__ __forceinline__ void load_rows(const T* map, const GroupNormShape& shape,
                                          const Place<kVectorWidth<T>>& place, int first_row, Packed (&out)[kNum]) {
  SENDVAE_UNROLL
  for (int i = 0; i < kNum; ++i) {
    if (place.has(first_row + i)) {
      out[i] = load_packed<kAligned>(map + place.element(shape, first_row + i), place.count);
    }
  }
}

// Adds up each thread column of a block, in every thread of it. All threads of the block must call it.
template <int kWidth>
__device__ __forceinline__ void sum_rows(float (&values)[kWidth]) {
  __shared__ float shared[kWidth][kThreads];
  const uint32_t thread = threadIdx.y * blockDim.x + threadIdx.x;
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) shared[i][thread] = values[i];
  __syncthreads();
  for (uint32_t active = blockDim.y; active > 1;) {
    const uint32_t half = (active + 1) / 2;
    if (threadIdx.y + half < active) {
      SENDVAE_UNROLL
      for (int i = 0; i < kWidth; ++i) shared[i][thread] += shared[i][thread + half * blockDim.x];
    }
    __syncthreads();
    active = half;
  }
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) values[i] = shared[i][threadIdx.x];
  __syncthreads();
}

// The sum over a block of whole warps, in every thread. All threads of the block must call it.
__device__ __forceinline__ float sum_threads(float value) {
  __shared__ float shared[kJoinThreads / kWarp];
  const uint32_t thread = threadIdx.y * blockDim.x + threadIdx.x;
  value = warp_sum(value);
  if (thread % kWarp == 0) shared[thread / kWarp] = value;
  __syncthreads();
  float sum = 0.0f;
  SENDVAE_UNROLL
  for (int i = 0; i < kJoinThreads / kWarp; ++i) sum += shared[i];
  __syncthreads();
  return sum;
}

// The index of consecutive channels' group, with one division at the start.
struct GroupCursor {
  int64_t group;
  uint32_t left, width;
  __device__ GroupCursor(int64_t channel, const GroupNormShape& shape)
      : width(static_cast<uint32_t>(shape.channels_per_group())) {
    const uint32_t index = static_cast<uint32_t>(channel);
    group = index / width;
    left = width - index % width;
  }
  __device__ void advance() {
    if (--left == 0) {
      ++group;
      left = width;
    }
  }
};

template <int kWidth, typename Args>
__device__ __forceinline__ void load_normalisation(const Args& args, const Place<kWidth>& place,
                                                   Normalisation (&out)[kWidth]) {
  const float* mean = args.mean + place.sample * args.shape.groups;
  const float* rstd = args.rstd + place.sample * args.shape.groups;
  GroupCursor cursor(place.channel, args.shape);
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    if (i < place.count) {
      out[i] = {mean[cursor.group], rstd[cursor.group] * args.weight[place.channel + i], args.bias[place.channel + i]};
    }
    cursor.advance();
  }
}

// Writes a chunk's two numbers for each channel to `parts` [B, chunks, 2, C].
template <int kWidth>
__device__ __forceinline__ void store_parts(const GroupNormShape& shape, const Tiling& tiling,
                                            const Place<kWidth>& place, const float (&first)[kWidth],
                                            const float (&second)[kWidth], float* parts) {
  if (threadIdx.y != 0) return;
  float* out = parts + (place.sample * tiling.chunks + place.chunk) * 2 * shape.channels + place.channel;
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    if (i < place.count) {
      out[i] = first[i];
      out[shape.channels + i] = second[i];
    }
  }
}

}  // namespace sendvae
