// noise_inject on CUDA: a thread takes one 16-byte vector of one sample, and draws the Philox blocks of exactly those
// elements; a block of threads stays within one sample. Forward reads 2 and writes 3 tensors, backward 4 and 2. With
// tokens a block takes some rows of all channels, whose tokens follow each other, and turns them in shared memory.
#include "noise_inject.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../common/cuda_samples.cuh"

namespace sendvae {
namespace {

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

// A channel's number for each of a thread's elements.
template <Access kAccess, int kWidth>
__device__ __forceinline__ void load_channels(const float* data, uint32_t element, uint32_t plane, uint32_t count,
                                              float (&out)[kWidth]) {
  ChannelCursor cursor(element, plane);
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    out[i] = kAccess != Access::kAny || i < count ? data[cursor.channel] : 0.0f;
    if constexpr (kAccess == Access::kAny) cursor.advance();
  }
}

// Where a thread's elements go among the sample's tokens.
template <int kWidth>
__device__ __forceinline__ void token_indices(const PatchGrid& grid, uint32_t plane, uint32_t element,
                                              uint32_t (&out)[kWidth]) {
  ChannelCursor cursor(element, plane);
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    const uint32_t position = cursor.position();
    out[i] = token_index(grid, cursor.channel, position / grid.width, position % grid.width);
    cursor.advance();
  }
}

// The same among a tile's tokens in shared memory, for elements of one row.
template <int kWidth>
__device__ __forceinline__ void tile_indices(const PatchGrid& grid, uint32_t plane, uint32_t element, Tile tile,
                                             uint32_t (&out)[kWidth]) {
  const ChannelCursor cursor(element, plane);
  const uint32_t column = cursor.position() % grid.width;
  uint32_t index = token_index(grid, cursor.channel, cursor.position() / grid.width % tile.rows, column);
  uint32_t in_patch = column % grid.patch;
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    out[i] = swizzled<kWidth>(index);
    // Features of a patch's row follow each other; then comes the next token.
    const bool is_last = ++in_patch == grid.patch;
    in_patch = is_last ? 0 : in_patch;
    index += is_last ? grid.features - grid.patch + 1 : 1;
  }
}

// The spreads' standard deviations. __expf is within two units in the last place, but for the rounding of its argument.
template <int kWidth>
__device__ __forceinline__ void to_std(const float (&spread)[kWidth], bool spread_is_std, float (&out)[kWidth]) {
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    out[i] = spread_is_std ? spread[i] : __expf(0.5f * clamp_log_variance(spread[i]));
  }
}

template <typename T, Access kAccess>
__global__ void __launch_bounds__(kMaxThreads)
    forward_kernel(NoiseInjectArgs<T> args, uint32_t blocks_per_sample, Tile tile, bool aligned) {
  constexpr int kWidth = kVectorWidth<T>;
  __shared__ PhiloxKey shared_key;
  __shared__ float shared_t;
  const Place place = place_of<kAccess, kWidth>(args, blocks_per_sample, tile);
  const uint32_t count = place.element < args.elements ? args.elements - place.element : 0;
  const int64_t id = args.sample_ids[place.sample];
  float mean[kWidth] = {}, spread[kWidth] = {};
  if (count > 0) {  // on their way while one thread makes the key
    load_samples<kAccess>(args.mean, place, count, aligned, mean);
    load_samples<kAccess>(args.spread, place, count, aligned, spread);
  }
  if (threadIdx.x == 0) {
    shared_key = make_key(args.key[0], args.key[1]);
    shared_t = args.given_t ? args.given_t[place.sample] : sample_time(shared_key, id);
    if (place.first_of_sample) args.t[place.sample] = shared_t;
  }
  __syncthreads();

  const int64_t first_of_sample = place.sample * static_cast<int64_t>(args.elements);
  float z_t[kWidth];
  if (count > 0) {
    const PhiloxKey key = shared_key;
    const float t = shared_t;
    float e1[kWidth], e2[kWidth], std[kWidth], latent_mean[kWidth], latent_std[kWidth];
    draw_normals(key, Stream::kPosterior, id, place.element, e1);
    draw_normals(key, Stream::kInterpolant, id, place.element, e2);
    to_std(spread, args.spread_is_std, std);
    load_channels<kAccess>(args.latent_mean, place.element, args.plane, count, latent_mean);
    load_channels<kAccess>(args.latent_std, place.element, args.plane, count, latent_std);
    float z[kWidth], velocity[kWidth];
    SENDVAE_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      const float unrounded = mean[i] + std[i] * e1[i];
      const Injected out = inject(unrounded, (unrounded - latent_mean[i]) * (1.0f / latent_std[i]), t, e2[i]);
      z[i] = out.z;
      z_t[i] = out.z_t;
      velocity[i] = out.velocity;
    }
    store_samples<kAccess>(args.z + first_of_sample + place.element, count, aligned, z);
    store_samples<kAccess>(args.velocity + first_of_sample + place.element, count, aligned, velocity);
  }
  if constexpr (kAccess == Access::kTiled) {
    __shared__ Vector<T> staged[kMaxThreads];
    if (count > 0) {
      uint32_t indices[kWidth];
      tile_indices(args.grid, args.plane, place.element, tile, indices);
      SENDVAE_UNROLL
      for (int i = 0; i < kWidth; ++i) reinterpret_cast<T*>(staged)[indices[i]] = from_float<T>(z_t[i]);
    }
    __syncthreads();
    const TileTokens tokens = tile_tokens<kWidth>(args, blocks_per_sample, tile);
    Vector<T>* out = reinterpret_cast<Vector<T>*>(args.z_t + first_of_sample + tokens.first);
    if (threadIdx.x < tokens.vectors) out[threadIdx.x] = staged[swizzled<1>(threadIdx.x)];
  } else if (args.grid.patch) {
    uint32_t indices[kWidth];
    token_indices(args.grid, args.plane, place.element, indices);
    SENDVAE_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      if (i < count) args.z_t[first_of_sample + indices[i]] = from_float<T>(z_t[i]);
    }
  } else if (count > 0) {
    store_samples<kAccess>(args.z_t + first_of_sample + place.element, count, aligned, z_t);
  }
}

template <typename T, Access kAccess>
__global__ void __launch_bounds__(kMaxThreads)
    backward_kernel(NoiseInjectBackwardArgs<T> args, uint32_t blocks_per_sample, Tile tile, bool aligned) {
  constexpr int kWidth = kVectorWidth<T>;
  __shared__ PhiloxKey shared_key;
  __shared__ Vector<T> staged[kAccess == Access::kTiled ? kMaxThreads : 1];
  const Place place = place_of<kAccess, kWidth>(args, blocks_per_sample, tile);
  const uint32_t count = place.element < args.elements ? args.elements - place.element : 0;
  const bool has_tokens = args.grid.patch && !args.grad_z_t.uniform;
  const T* grad_tokens = args.grad_z_t.data + place.sample * args.grad_z_t.stride;
  float grad_z[kWidth] = {}, grad_z_t[kWidth] = {}, grad_velocity[kWidth] = {}, spread[kWidth] = {};
  if (count > 0) {  // on their way while one thread makes the key
    load_samples<kAccess>(args.grad_z, place, count, aligned, grad_z);
    load_samples<kAccess>(args.grad_velocity, place, count, aligned, grad_velocity);
    load_samples<kAccess>(args.spread, place, count, aligned, spread);
    if (!has_tokens) load_samples<kAccess>(args.grad_z_t, place, count, aligned, grad_z_t);
  }
  if (kAccess == Access::kTiled && has_tokens) {
    const TileTokens tokens = tile_tokens<kWidth>(args, blocks_per_sample, tile);
    const Vector<T>* from = reinterpret_cast<const Vector<T>*>(grad_tokens + tokens.first);
    if (threadIdx.x < tokens.vectors) staged[swizzled<1>(threadIdx.x)] = from[threadIdx.x];
  }
  if (threadIdx.x == 0) shared_key = make_key(args.key[0], args.key[1]);
  __syncthreads();
  if (count == 0) return;

  if (has_tokens) {
    uint32_t indices[kWidth];
    if constexpr (kAccess == Access::kTiled) {
      tile_indices(args.grid, args.plane, place.element, tile, indices);
    } else {
      token_indices(args.grid, args.plane, place.element, indices);
    }
    const T* from = kAccess == Access::kTiled ? reinterpret_cast<const T*>(staged) : grad_tokens;
    SENDVAE_UNROLL
    for (int i = 0; i < kWidth; ++i) grad_z_t[i] = i < count ? to_float(from[indices[i]]) : 0.0f;
  }
  const float t = args.t[place.sample];
  float e1[kWidth], std[kWidth], latent_std[kWidth], grad_mean[kWidth], grad_spread[kWidth];
  draw_normals(shared_key, Stream::kPosterior, args.sample_ids[place.sample], place.element, e1);
  to_std(spread, args.spread_is_std, std);
  load_channels<kAccess>(args.latent_std, place.element, args.plane, count, latent_std);
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    const float of_n = (1.0f - t) * grad_z_t[i] - grad_velocity[i];
    const float of_z = grad_z[i] + of_n * (1.0f / latent_std[i]);
    const InjectedGrad grad = inject_backward(of_z, spread[i], std[i], args.spread_is_std, e1[i]);
    grad_mean[i] = grad.mean;
    grad_spread[i] = grad.spread;
  }
  const int64_t offset = place.sample * static_cast<int64_t>(args.elements) + place.element;
  store_samples<kAccess>(args.grad_mean + offset, count, aligned, grad_mean);
  store_samples<kAccess>(args.grad_spread + offset, count, aligned, grad_spread);
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

template <typename T>
bool is_aligned(const Samples<T>& samples) {
  return samples.uniform || is_vector_aligned(samples.data, samples.stride);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> noise_inject_cuda(const Tensor& mean, const Tensor& spread,
                                                             const Tensor& latent_mean, const Tensor& latent_std,
                                                             const Tensor& key, const Tensor& sample_ids,
                                                             const std::optional<Tensor>& t, bool spread_is_std,
                                                             const std::optional<int64_t>& patch_size) {
  const torch::stable::accelerator::DeviceGuard guard(mean.get_device_index());
  const NoiseInject call(mean, spread, latent_mean, latent_std, key, sample_ids, t, spread_is_std, patch_size);
  dispatch_float(mean.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const NoiseInjectArgs<T> args = call.args<T>();
    if (args.batch == 0) return;
    const bool aligned = is_aligned(args.mean) && is_aligned(args.spread) && is_vector_aligned(args.z, args.elements) &&
                         is_vector_aligned(args.z_t, args.elements) && is_vector_aligned(args.velocity, args.elements);
    const auto [access, tile, grid] = launch_for<T>(call.kName, args, aligned);
    const auto kernel = access == Access::kTiled   ? forward_kernel<T, Access::kTiled>
                        : access == Access::kWhole ? forward_kernel<T, Access::kWhole>
                                                   : forward_kernel<T, Access::kAny>;
    kernel<<<grid.blocks, grid.threads, 0, current_stream(mean)>>>(args, grid.blocks_per_sample, tile, aligned);
    check_launch(call.kName);
  });
  return call.outputs();
}

std::tuple<Tensor, Tensor> noise_inject_backward_cuda(const Tensor& grad_z, const Tensor& grad_z_t,
                                                      const Tensor& grad_velocity, const Tensor& spread,
                                                      const Tensor& latent_std, const Tensor& key,
                                                      const Tensor& sample_ids, const Tensor& t, bool spread_is_std,
                                                      const std::optional<int64_t>& patch_size) {
  const torch::stable::accelerator::DeviceGuard guard(grad_z.get_device_index());
  const NoiseInjectBackward call(grad_z, grad_z_t, grad_velocity, spread, latent_std, key, sample_ids, t, spread_is_std,
                                 patch_size);
  dispatch_float(grad_z.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const NoiseInjectBackwardArgs<T> args = call.args<T>();
    if (args.batch == 0 || args.elements == 0) return;
    const bool aligned = is_aligned(args.grad_z) && is_aligned(args.grad_z_t) && is_aligned(args.grad_velocity) &&
                         is_aligned(args.spread) && is_vector_aligned(args.grad_mean, args.elements) &&
                         is_vector_aligned(args.grad_spread, args.elements);
    const auto [access, tile, grid] = launch_for<T>(call.kName, args, aligned);
    const auto kernel = access == Access::kTiled   ? backward_kernel<T, Access::kTiled>
                        : access == Access::kWhole ? backward_kernel<T, Access::kWhole>
                                                   : backward_kernel<T, Access::kAny>;
    kernel<<<grid.blocks, grid.threads, 0, current_stream(grad_z)>>>(args, grid.blocks_per_sample, tile, aligned);
    check_launch(call.kName);
  });
  return call.outputs();
}

}  // namespace
}  // namespace sendvae

STABLE_TORCH_LIBRARY_IMPL(sendvae, CUDA, library) {
  library.impl("noise_inject", TORCH_BOX(&sendvae::noise_inject_cuda));
  library.impl("noise_inject_backward", TORCH_BOX(&sendvae::noise_inject_backward_cuda));
}
