// Tiles of maps in the CUDA kernels of group_norm_silu: reading, writing, and the exchange of sums.
#pragma once

#include <cstdint>

#include "tiling.cuh"

namespace sendvae {

// Pixels that a thread loads before it uses the first.
template <bool kAligned>
constexpr int kBatch = kAligned ? 4 : 2;

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
  __shared__ float shared[kFloats][kWidth * kMaxColumns];  // neighbours' in neighbouring banks
  float floats[kFloats];
  if (threadIdx.z == 0) {
    const uint32_t channel = place.channel + threadIdx.y;
    const int64_t group = place.sample * shape.groups + channel / tiling.group_channels;
    const Numbers numbers = channel < shape.channels ? compute(channel, group) : Numbers{};
    memcpy(floats, &numbers, sizeof numbers);
    SENDVAE_UNROLL
    for (int f = 0; f < kFloats; ++f) shared[f][threadIdx.y * blockDim.x + threadIdx.x] = floats[f];
  }
  __syncthreads();
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    SENDVAE_UNROLL
    for (int f = 0; f < kFloats; ++f) floats[f] = shared[f][i * blockDim.x + threadIdx.x];
    memcpy(&out[i], floats, sizeof out[i]);
  }
}

template <typename Args>
__device__ __forceinline__ Normalisation normalisation_of(const Args& args, uint32_t channel, int64_t group) {
  return {args.mean[group], args.rstd[group] * args.weight[channel], args.bias[channel]};
}

// The threads of a chunk's column exchange kNum numbers: a thread comes with those of its row and kWidth channels, and
// leaves with those of kWidth rows and one channel, `exchanged_channel`. All threads of the block must call it.
template <int kMaxThreads, int kNum, int kWidth>
__device__ __forceinline__ void exchange(float (&values)[kNum][kWidth]) {
  // One number at a time: shared memory decides how many blocks of a small map there are at once. Longer by what lets
  // 32 neighbours, who read kWidth channels of 32 / kWidth columns, find them in 32 banks.
  __shared__ float shared[kWidth][kMaxThreads + kWarp / kWidth];
  const uint32_t first = threadIdx.z * kWidth * blockDim.x;
  const uint32_t thread = threadIdx.y * blockDim.x + threadIdx.x;
  SENDVAE_UNROLL
  for (int number = 0; number < kNum; ++number) {
    if (number > 0) __syncthreads();
    SENDVAE_UNROLL
    for (int i = 0; i < kWidth; ++i) shared[i][first + thread] = values[number][i];
    __syncthreads();
    SENDVAE_UNROLL
    for (int row = 0; row < kWidth; ++row) {
      values[number][row] = shared[thread % kWidth][first + row * blockDim.x + thread / kWidth];
    }
  }
}

// Neighbouring threads have neighbouring channels.
template <int kWidth>
__device__ __forceinline__ uint32_t exchanged_channel() {
  return (blockIdx.y * kWidth + threadIdx.y) * blockDim.x + threadIdx.x;
}

// Calls body(first channel, group, lane) in all lanes of a warp for each group of a block of whole warps and groups.
// Groups are counted through the batch.
template <int kWidth, typename Body>
__device__ __forceinline__ void for_groups(const GroupNormShape& shape, const Tiling& tiling,
                                           const Place<kWidth>& place, const Body& body) {
  const uint32_t thread = (threadIdx.z * kWidth + threadIdx.y) * blockDim.x + threadIdx.x;
  const uint32_t warps = blockDim.x * kWidth * blockDim.z / kWarp;
  const uint32_t groups = blockDim.x * kWidth / tiling.group_channels;  // of a block
  for (uint32_t i = thread / kWarp; i < groups && blockIdx.y * groups + i < shape.groups; i += warps) {
    const int64_t group = blockIdx.y * groups + i;
    body(group * tiling.group_channels, place.sample * shape.groups + group, thread % kWarp);
  }
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

}  // namespace sendvae
