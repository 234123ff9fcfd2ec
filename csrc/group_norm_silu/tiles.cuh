// Tiles of maps in the CUDA kernels of group_norm_silu: cutting, reading, writing, and the exchange of sums.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../common/cuda.cuh"
#include "group_norm_silu.h"

namespace sendvae {

constexpr int kWarp = 32;
constexpr int kThreads = 256;         // of a tile's block, at most
constexpr int kMaxColumns = 16;       // vectors of a tile side by side: 256 bytes of each pixel
constexpr int kMaxBlockChunks = 64;   // CUDA's limit of blockDim.z
constexpr int kMaxColumnTiles = 65535;  // and of gridDim.y
constexpr int kThreadPixels = 16;     // of a chunk that is summed
constexpr int kJoinThreads = 512;     // of a block that joins the sums of chunks, at most

// Pixels that a thread loads before it uses the first.
template <bool kAligned>
constexpr int kBatch = kAligned ? 4 : 2;

// A chunk is some consecutive pixels of a sample. As many rows of threads work on it as a vector has channels, each
// row on every so-manieth pixel; a thread has one vector of each. blockDim is [columns, rows of a chunk, chunks].
struct Tiling {
  uint32_t columns, block_chunks;
  uint32_t chunk_pixels, chunks;          // of a chunk, and of a sample
  uint32_t sample_blocks, column_tiles;   // of a sample: one after the other, and side by side
  uint32_t group_channels;                // C / G

  dim3 block(int vector_width) const { return {columns, static_cast<uint32_t>(vector_width), block_chunks}; }
};

// Pixels of a chunk; the last may have fewer, and one behind it has none.
__device__ __forceinline__ uint32_t pixels_in(const GroupNormShape& shape, const Tiling& tiling, uint32_t chunk) {
  if (chunk + 1 < tiling.chunks) return tiling.chunk_pixels;
  return chunk < tiling.chunks ? static_cast<uint32_t>(shape.pixels) - chunk * tiling.chunk_pixels : 0;
}

// The part of a map that a thread works on.
template <int kWidth>
struct Place {
  uint32_t sample, chunk;
  uint32_t pixels;      // of the chunk
  int rows;             // of these, the thread's; 0 if it has no channels
  int channel, count;   // the first of its vector, and how many there are from it on
  int64_t begin, step;  // of its vector in its first pixel, and from there to its next

  __device__ Place(const GroupNormShape& shape, const Tiling& tiling, uint32_t block) {
    sample = block / tiling.sample_blocks;
    chunk = block % tiling.sample_blocks * blockDim.z + threadIdx.z;
    pixels = pixels_in(shape, tiling, chunk);
    channel = static_cast<int>((blockIdx.y * blockDim.x + threadIdx.x) * kWidth);
    count = static_cast<int>(shape.channels) - channel;
    rows = count > 0 ? rows_of(threadIdx.y) : 0;
    const int64_t pixel = static_cast<int64_t>(chunk) * tiling.chunk_pixels + threadIdx.y;
    begin = (sample * shape.pixels + pixel) * shape.channels + channel;
    step = kWidth * shape.channels;
  }

  // Pixels of a row of threads.
  __device__ int rows_of(uint32_t row) const { return (pixels - row + kWidth - 1) / kWidth; }
};

// 16 bytes of a map as they are in memory: 16-bit numbers stay two to a register until they are used.
struct alignas(16) Packed {
  uint32_t words[4];
};

template <typename T>
__device__ __forceinline__ void unpack(const Packed& packed, float (&out)[kVectorWidth<T>]) {
  SENDVAE_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 2) {
      unpack_pair(packed.words[i], T{}, out + 2 * i);
    } else {
      out[i] = __uint_as_float(packed.words[i]);
    }
  }
}

template <typename T>
__device__ __forceinline__ Packed pack(const float (&values)[kVectorWidth<T>]) {
  Packed packed;
  SENDVAE_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 2) {
      packed.words[i] = pack_pair(values[2 * i], values[2 * i + 1], T{});
    } else {
      packed.words[i] = __float_as_uint(values[i]);
    }
  }
  return packed;
}

// kAligned: all vectors are full and can be read and written as 16 bytes. A constant, because loads behind a choice
// made for each of them would wait for one another.
template <bool kAligned, typename T>
__device__ __forceinline__ Packed load_packed(const T* data, int count) {
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
__device__ __forceinline__ void store_packed(T* data, int count, const Packed& packed) {
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

// Calls body(offset, rows) for a thread's pixels, kNum of them at a time; `offset` is that of the first. Inlined,
// `rows` is a constant for whole batches, so that their code has no conditions.
template <int kNum, int kWidth, typename Body>
__device__ __forceinline__ void for_batches(const Place<kWidth>& place, const Body& body) {
  int64_t offset = place.begin;
  int left = place.rows;
#pragma unroll 1
  for (; left >= kNum; left -= kNum, offset += kNum * place.step) body(offset, kNum);
  if (left > 0) body(offset, left);
}

// The vectors of `rows` pixels of a thread, from `first` on.
template <bool kAligned, typename T, int kNum>
__device__ __forceinline__ void load_rows(const T* first, const Place<kVectorWidth<T>>& place, int rows,
                                          Packed (&out)[kNum]) {
  SENDVAE_UNROLL
  for (int i = 0; i < kNum; ++i) {
    if (i < rows) out[i] = load_packed<kAligned>(first + i * place.step, place.count);
  }
}

// Gives each thread what compute(channel, group) returns for the channels of its vector, a struct of floats; groups are
// counted through the batch. One thread computes for each channel of the block. All threads of the block must call it.
template <typename Numbers, int kWidth, typename Compute>
__device__ __forceinline__ void for_channels(const GroupNormShape& shape, const Tiling& tiling,
                                             const Place<kWidth>& place, const Compute& compute,
                                             Numbers (&out)[kWidth]) {
  constexpr int kFloats = sizeof(Numbers) / sizeof(float);
  __shared__ float shared[kFloats][kWidth][kMaxColumns];  // neighbours' in neighbouring banks
  float floats[kFloats];
  if (threadIdx.z == 0) {
    const uint32_t channel = place.channel + threadIdx.y;
    const int64_t group = place.sample * shape.groups + channel / tiling.group_channels;
    const Numbers numbers = channel < shape.channels ? compute(channel, group) : Numbers{};
    memcpy(floats, &numbers, sizeof numbers);
    SENDVAE_UNROLL
    for (int f = 0; f < kFloats; ++f) shared[f][threadIdx.y][threadIdx.x] = floats[f];
  }
  __syncthreads();
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    SENDVAE_UNROLL
    for (int f = 0; f < kFloats; ++f) floats[f] = shared[f][i][threadIdx.x];
    memcpy(&out[i], floats, sizeof out[i]);
  }
}

template <typename Args>
__device__ __forceinline__ Normalisation normalisation_of(const Args& args, uint32_t channel, int64_t group) {
  return {args.mean[group], args.rstd[group] * args.weight[channel], args.bias[channel]};
}

// The threads of a chunk's column exchange kNum numbers: a thread comes with those of its row and kWidth channels, and
// leaves with those of kWidth rows and one channel, `exchanged_channel`. All threads of the block must call it.
template <int kNum, int kWidth>
__device__ __forceinline__ void exchange(float (&values)[kNum][kWidth]) {
  // Longer by what lets 32 neighbours, who read kWidth channels of 32 / kWidth columns, find them in 32 banks.
  __shared__ float shared[kNum][kWidth][kThreads + kWarp / kWidth];
  const uint32_t first = threadIdx.z * kWidth * blockDim.x;
  const uint32_t thread = threadIdx.y * blockDim.x + threadIdx.x;
  SENDVAE_UNROLL
  for (int number = 0; number < kNum; ++number) {
    SENDVAE_UNROLL
    for (int i = 0; i < kWidth; ++i) shared[number][i][first + thread] = values[number][i];
  }
  __syncthreads();
  SENDVAE_UNROLL
  for (int number = 0; number < kNum; ++number) {
    SENDVAE_UNROLL
    for (int row = 0; row < kWidth; ++row) {
      values[number][row] = shared[number][thread % kWidth][first + row * blockDim.x + thread / kWidth];
    }
  }
}

// Neighbouring threads have neighbouring channels.
template <int kWidth>
__device__ __forceinline__ uint32_t exchanged_channel() {
  return (blockIdx.y * kWidth + threadIdx.y) * blockDim.x + threadIdx.x;
}

// Writes a chunk's two numbers for the exchanged channel to `parts` [B, chunks, 2, C].
template <int kWidth>
__device__ __forceinline__ void store_parts(const GroupNormShape& shape, const Tiling& tiling,
                                            const Place<kWidth>& place, float first, float second, float* parts) {
  const uint32_t channel = exchanged_channel<kWidth>();
  if (place.pixels == 0 || channel >= shape.channels) return;
  const int64_t chunk = static_cast<int64_t>(place.sample) * tiling.chunks + place.chunk;
  parts[2 * chunk * shape.channels + channel] = first;
  parts[(2 * chunk + 1) * shape.channels + channel] = second;
}

// ---- Launches ----

inline uint32_t checked_blocks(const char* op, int64_t blocks) {
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), op, ": too large for one launch: ", blocks, " blocks");
  return static_cast<uint32_t>(blocks);
}

// thread_pixels: of a thread in a chunk. Sums depend on it, so theirs does not depend on the batch.
inline Tiling tiling_for(const char* op, const GroupNormShape& shape, int vector_width, int thread_pixels) {
  const int64_t vectors = (shape.channels + vector_width - 1) / vector_width;
  Tiling tiling;
  tiling.columns = static_cast<uint32_t>(std::min<int64_t>(vectors, kMaxColumns));
  tiling.block_chunks = std::min<uint32_t>(kThreads / (tiling.columns * vector_width), kMaxBlockChunks);
  tiling.chunk_pixels = static_cast<uint32_t>(thread_pixels * vector_width);
  tiling.chunks = checked_blocks(op, (shape.pixels + tiling.chunk_pixels - 1) / tiling.chunk_pixels);
  tiling.sample_blocks = (tiling.chunks + tiling.block_chunks - 1) / tiling.block_chunks;
  const int64_t column_tiles = (vectors + tiling.columns - 1) / tiling.columns;
  STD_TORCH_CHECK(column_tiles <= kMaxColumnTiles, op, ": too many channels for one launch: ", shape.channels);
  tiling.column_tiles = static_cast<uint32_t>(column_tiles);
  tiling.group_channels = static_cast<uint32_t>(shape.channels_per_group());
  return tiling;
}

// [rows, columns] threads to go through a group: columns for its channels, rows for the chunks.
inline dim3 join_threads(const GroupNormShape& shape, const Tiling& tiling) {
  uint32_t columns = 1, rows = 1;
  while (columns < shape.channels_per_group() && columns < kWarp) columns *= 2;
  while (rows < tiling.chunks && columns * rows < kJoinThreads) rows *= 2;
  while (columns * rows < kWarp) rows *= 2;
  return {columns, rows};
}

inline Tensor workspace(const Tensor& like, int64_t size) { return empty_on(like, {size}, ScalarType::Float); }

// Calls function(kSilu, kAligned) with two integral constants.
template <typename Function>
void dispatch_flags(bool silu, bool aligned, const Function& function) {
  const auto with_silu = [&](auto silu_constant) {
    aligned ? function(silu_constant, std::true_type{}) : function(silu_constant, std::false_type{});
  };
  silu ? with_silu(std::true_type{}) : with_silu(std::false_type{});
}

}  // namespace sendvae
