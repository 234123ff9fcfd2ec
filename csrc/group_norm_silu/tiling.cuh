// How the CUDA kernels of group_norm_silu cut maps into chunks of pixels, chunks into threads, and blocks out of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <type_traits>

#include "../common/cuda.cuh"
#include "group_norm_silu.h"

namespace sendvae {

constexpr int kWarp = 32;
constexpr int kMaxColumns = 16;         // vectors of a block side by side: 256 bytes of each pixel
constexpr int kThreads = 256;           // of a block, at most
constexpr int kThreadPixels = 16;       // of a thread, at most
constexpr int kWholeThreads = 512;      // of a block that has all pixels of its channels
constexpr int kWholeThreadPixels = 8;   // and of a thread of it
constexpr int kFewThreadPixels = 4;     // where so many threads have all pixels with these
constexpr int kJoinThreads = 512;       // of a block that joins the sums of chunks
constexpr int kMaxBlockChunks = 64;     // CUDA's limit of blockDim.z
constexpr int kMaxColumnTiles = 65535;  // and of gridDim.y

// A chunk is some consecutive pixels of a sample. As many rows of threads work on it as a vector has channels, each in
// turn on one pixel; a thread has one vector of its row's. blockDim is [columns, rows of a chunk, chunks].
struct Tiling {
  uint32_t columns, block_chunks;
  uint32_t chunk_pixels, chunks;         // of a chunk, and of a sample
  uint32_t sample_blocks, column_tiles;  // of a sample: one after the other, and side by side
  uint32_t group_channels;               // C / G

  dim3 block(int vector_width) const { return {columns, static_cast<uint32_t>(vector_width), block_chunks}; }
};

inline uint32_t checked_blocks(const char* op, int64_t blocks) {
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), op, ": too large for one launch: ", blocks, " blocks");
  return static_cast<uint32_t>(blocks);
}

// By the shape of a sample alone, because sums depend on it.
inline Tiling tiling_for(const char* op, const GroupNormShape& shape, int vector_width, int64_t columns,
                         int max_threads, int thread_pixels) {
  const int64_t vectors = (shape.channels + vector_width - 1) / vector_width;
  const int64_t column_tiles = (vectors + columns - 1) / columns;
  STD_TORCH_CHECK(column_tiles <= kMaxColumnTiles, op, ": too many channels for one launch: ", shape.channels);
  Tiling tiling;
  tiling.columns = static_cast<uint32_t>(columns);
  tiling.chunk_pixels = static_cast<uint32_t>(thread_pixels * vector_width);
  tiling.chunks = checked_blocks(op, (shape.pixels + tiling.chunk_pixels - 1) / tiling.chunk_pixels);
  const auto most = static_cast<uint32_t>(max_threads / (columns * vector_width));
  tiling.block_chunks = std::min({most, tiling.chunks, static_cast<uint32_t>(kMaxBlockChunks)});
  tiling.sample_blocks = (tiling.chunks + tiling.block_chunks - 1) / tiling.block_chunks;
  tiling.column_tiles = static_cast<uint32_t>(column_tiles);
  tiling.group_channels = static_cast<uint32_t>(shape.channels_per_group());
  return tiling;
}

// For any map: blocks of 256 bytes of each pixel.
inline Tiling wide_tiling(const char* op, const GroupNormShape& shape, int vector_width) {
  const int64_t vectors = (shape.channels + vector_width - 1) / vector_width;
  return tiling_for(op, shape, vector_width, std::min<int64_t>(vectors, kMaxColumns), kThreads, kThreadPixels);
}

// For a map that is small enough: blocks of all pixels, whole groups and whole warps, of 64 bytes or more of each
// pixel. Blocks are few then, so that what counts is how long one takes from its first load to its last store: threads
// have few pixels each.
inline std::optional<Tiling> whole_tiling(const char* op, const GroupNormShape& shape, int vector_width) {
  const int64_t columns = std::lcm(shape.channels_per_group(), int64_t{kWarp}) / vector_width;
  if (columns > kMaxColumns) return std::nullopt;
  for (const int thread_pixels : {kFewThreadPixels, kWholeThreadPixels}) {
    const Tiling tiling = tiling_for(op, shape, vector_width, columns, kWholeThreads, thread_pixels);
    if (tiling.sample_blocks == 1) return tiling;
  }
  return std::nullopt;
}

// Threads that join so many parts, four each; with fewer than 128 a block is too small to fill a multiprocessor.
inline uint32_t join_threads(int64_t parts) {
  uint32_t threads = 4 * kWarp;
  while (4 * threads < parts && threads < kJoinThreads) threads *= 2;
  return threads;
}

inline Tensor new_floats(const Tensor& like, int64_t size) { return empty_on(like, {size}, ScalarType::Float); }

// Calls function(kSilu, kAligned) with two integral constants.
template <typename Function>
void dispatch_flags(bool silu, bool aligned, const Function& function) {
  const auto with_silu = [&](auto silu_constant) {
    aligned ? function(silu_constant, std::true_type{}) : function(silu_constant, std::false_type{});
  };
  silu ? with_silu(std::true_type{}) : with_silu(std::false_type{});
}

}  // namespace sendvae
