// How noise_inject's kernels read and write samples and tokens.
#pragma once

#include <algorithm>

#include "../common/cuda_samples.cuh"
#include "noise_inject.h"

namespace sendvae {

// How a call's vectors lie. Whole ones are full, aligned and of one channel; tiled ones besides of one row, and their
// tokens go through shared memory. Any others are read and written as they come, tokens one element at a time.
enum class Access { kAny, kWhole, kTiled };

// Rows of all channels that a block takes, a multiple of the patch size; 0 without tiles.
struct Tile {
  uint32_t rows;
};

template <Access kAccess, int kWidth, typename Args>
__device__ __forceinline__ Place place_of(const Args& args, uint32_t blocks_per_sample, Tile tile) {
  Place place = find_place(blocks_per_sample, kWidth);
  if constexpr (kAccess == Access::kTiled) {
    const uint32_t tile_plane = tile.rows * args.grid.width, vectors = tile_plane / kWidth;  // of one channel
    const uint32_t channel = threadIdx.x / vectors;
    const uint32_t position = blockIdx.x % blocks_per_sample * tile_plane + threadIdx.x % vectors * kWidth;
    const uint32_t element = channel * args.plane + position;
    place.element = position < args.plane && element < args.elements ? element : args.elements;
  }
  return place;
}

// The tokens of a block's tile: where they begin among the sample's, and their vectors.
struct TileTokens {
  uint32_t first, vectors;
};

template <int kWidth, typename Args>
__device__ __forceinline__ TileTokens tile_tokens(const Args& args, uint32_t blocks_per_sample, Tile tile) {
  const uint32_t channels = args.elements / args.plane, tile_elements = channels * tile.rows * args.grid.width;
  const uint32_t first = blockIdx.x % blocks_per_sample * tile_elements, left = args.elements - first;
  return {first, (left < tile_elements ? left : tile_elements) / kWidth};
}

// Where element `index` of a tile's tokens lies in shared memory: vectors are exchanged within groups of 128 bytes, so
// that threads whose elements are a power of two apart meet in few banks.
template <int kWidth>
__device__ __forceinline__ uint32_t swizzled(uint32_t index) {
  const uint32_t vector = index / kWidth;
  return (vector ^ ((vector >> 3 ^ vector >> 5) & 7u)) * kWidth + index % kWidth;
}

template <Access kAccess, typename T>
__device__ __forceinline__ void load_samples(const Samples<T>& samples, const Place& place, uint32_t count,
                                             bool aligned, float (&out)[kVectorWidth<T>]) {
  const T* data = samples.data + place.sample * samples.stride + place.element;
  if (samples.uniform) {
    const float value = to_float(*samples.data);
    SENDVAE_UNROLL
    for (int i = 0; i < kVectorWidth<T>; ++i) out[i] = value;
  } else if constexpr (kAccess == Access::kAny) {
    load_vector(data, count, aligned, out);
  } else {
    const Vector<T> vector = *reinterpret_cast<const Vector<T>*>(data);
    unpack(vector.values, out);
  }
}

template <Access kAccess, typename T>
__device__ __forceinline__ void store_samples(T* data, uint32_t count, bool aligned,
                                              const float (&values)[kVectorWidth<T>]) {
  if constexpr (kAccess == Access::kAny) {
    store_vector(data, count, aligned, values);
  } else {
    Vector<T> vector;
    pack(values, vector.values);
    *reinterpret_cast<Vector<T>*>(data) = vector;
  }
}

// A channel's number for each of a thread's elements, the first of which is at the cursor.
template <Access kAccess, int kWidth>
__device__ __forceinline__ void load_channels(const float* data, ChannelCursor cursor, uint32_t count,
                                              float (&out)[kWidth]) {
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    out[i] = kAccess != Access::kAny || i < count ? data[cursor.channel] : 0.0f;
    if constexpr (kAccess == Access::kAny) cursor.advance();
  }
}

// Where a thread's elements go among the sample's tokens.
template <int kWidth>
__device__ __forceinline__ void token_indices(const PatchGrid& grid, ChannelCursor cursor, uint32_t (&out)[kWidth]) {
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    const uint32_t position = cursor.position();
    out[i] = token_index(grid, cursor.channel, position / grid.width, position % grid.width);
    cursor.advance();
  }
}

// The same among a tile's tokens in shared memory, for elements of one row.
template <int kWidth>
__device__ __forceinline__ void tile_indices(const PatchGrid& grid, ChannelCursor cursor, Tile tile,
                                             uint32_t (&out)[kWidth]) {
  const uint32_t in_tile = cursor.position() % (tile.rows * grid.width), column = in_tile % grid.width;
  uint32_t index = token_index(grid, cursor.channel, in_tile / grid.width, column), in_patch = column % grid.patch;
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    out[i] = swizzled<kWidth>(index);
    // Features of a patch's row follow each other; then comes the next token.
    const bool is_last = ++in_patch == grid.patch;
    in_patch = is_last ? 0 : in_patch;
    index += is_last ? grid.features - grid.patch + 1 : 1;
  }
}

template <typename T>
bool is_aligned(const Samples<T>& samples) {
  return samples.uniform || is_vector_aligned(samples.data, samples.stride);
}

// How a call's vectors are read and written, and by which blocks.
struct Launch {
  Access access;
  Tile tile;
  Grid grid;
};

template <typename T, typename Args>
Launch launch_for(const char* op, const Args& args, bool aligned) {
  constexpr uint32_t kWidth = kVectorWidth<T>;
  Launch launch = {Access::kAny, {0}, grid_for(op, args.batch, args.elements, kWidth)};
  const PatchGrid& patches = args.grid;
  if (!aligned || args.elements == 0 || args.plane % kWidth != 0) return launch;
  if (patches.patch == 0) {
    launch.access = Access::kWhole;
    return launch;
  }
  const uint32_t height = args.plane / patches.width, row = args.elements / height;  // elements, of all channels
  const uint32_t rows = std::min(height, kMaxThreads * kWidth / row / patches.patch * patches.patch);
  if (patches.width % kWidth != 0 || rows == 0) return launch;
  const uint32_t threads = (rows * row / kWidth + 31) / 32 * 32, blocks_per_sample = (height + rows - 1) / rows;
  const int64_t blocks = args.batch * blocks_per_sample;
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), op, ": too large for one launch: ", blocks, " blocks");
  return {Access::kTiled, {rows}, {static_cast<uint32_t>(blocks), threads, blocks_per_sample}};
}

}  // namespace sendvae
