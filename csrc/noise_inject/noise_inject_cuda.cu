// noise_inject on CUDA: a thread takes one 16-byte vector of one sample, and draws the Philox blocks of exactly those
// elements; a block of threads stays within one sample. Forward reads 2 and writes 3 tensors, backward 4 and 2.
#include "noise_inject.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../common/cuda_samples.cuh"

namespace sendvae {
namespace {

// kWhole says of all of a thread's vectors that they are full, aligned, of one channel and, with tokens, of one row.

template <bool kWhole, typename T>
__device__ __forceinline__ void load_samples(const Samples<T>& samples, const Place& place, uint32_t count,
                                             bool aligned, float (&out)[kVectorWidth<T>]) {
  const T* data = samples.data + place.sample * samples.stride + place.element;
  if (samples.uniform) {
    const float value = to_float(*samples.data);
    SENDVAE_UNROLL
    for (int i = 0; i < kVectorWidth<T>; ++i) out[i] = value;
  } else if constexpr (kWhole) {
    const Vector<T> vector = *reinterpret_cast<const Vector<T>*>(data);
    unpack(vector.values, out);
  } else {
    load_vector(data, count, aligned, out);
  }
}

template <bool kWhole, typename T>
__device__ __forceinline__ void store_samples(T* data, uint32_t count, bool aligned,
                                              const float (&values)[kVectorWidth<T>]) {
  if constexpr (kWhole) {
    Vector<T> vector;
    pack(values, vector.values);
    *reinterpret_cast<Vector<T>*>(data) = vector;
  } else {
    store_vector(data, count, aligned, values);
  }
}

// A channel's number for each of a thread's elements.
template <bool kWhole, int kWidth>
__device__ __forceinline__ void load_channels(const float* data, uint32_t element, uint32_t plane, uint32_t count,
                                              float (&out)[kWidth]) {
  ChannelCursor cursor(element, plane);
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    out[i] = kWhole || i < count ? data[cursor.channel] : 0.0f;
    if constexpr (!kWhole) cursor.advance();
  }
}

// Where a thread's elements go among the sample's tokens. Neighbouring threads are far apart there (C P P elements or
// P): the L2 cache gathers what they write before it goes to memory.
template <bool kWhole, int kWidth>
__device__ __forceinline__ void token_indices(const PatchGrid& grid, uint32_t plane, uint32_t element,
                                              uint32_t (&out)[kWidth]) {
  ChannelCursor cursor(element, plane);
  if constexpr (kWhole) {
    const uint32_t row = cursor.position() / grid.width, column = cursor.position() % grid.width;
    out[0] = token_index(grid, cursor.channel, row, column);
    uint32_t in_patch = column % grid.patch;
    SENDVAE_UNROLL
    for (int i = 1; i < kWidth; ++i) {  // features of a patch follow each other; then comes the next token
      const bool is_next = ++in_patch == grid.patch;
      in_patch = is_next ? 0 : in_patch;
      out[i] = out[i - 1] + (is_next ? grid.features - grid.patch + 1 : 1);
    }
  } else {
    SENDVAE_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      const uint32_t position = cursor.position();
      out[i] = token_index(grid, cursor.channel, position / grid.width, position % grid.width);
      cursor.advance();
    }
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

template <typename T, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads)
    forward_kernel(NoiseInjectArgs<T> args, uint32_t blocks_per_sample, bool aligned) {
  constexpr int kWidth = kVectorWidth<T>;
  __shared__ PhiloxKey shared_key;
  __shared__ float shared_t;
  const Place place = find_place(blocks_per_sample, kWidth);
  const uint32_t count = place.element < args.elements ? args.elements - place.element : 0;
  const int64_t id = args.sample_ids[place.sample];
  float mean[kWidth] = {}, spread[kWidth] = {};
  if (count > 0) {  // on their way while one thread makes the key
    load_samples<kWhole>(args.mean, place, count, aligned, mean);
    load_samples<kWhole>(args.spread, place, count, aligned, spread);
  }
  if (threadIdx.x == 0) {
    shared_key = make_key(args.key[0], args.key[1]);
    shared_t = args.given_t ? args.given_t[place.sample] : sample_time(shared_key, id);
    if (place.first_of_sample) args.t[place.sample] = shared_t;
  }
  __syncthreads();
  if (count == 0) return;

  const PhiloxKey key = shared_key;
  const float t = shared_t;
  float e1[kWidth], e2[kWidth], std[kWidth], latent_mean[kWidth], latent_std[kWidth];
  draw_normals(key, Stream::kPosterior, id, place.element, e1);
  draw_normals(key, Stream::kInterpolant, id, place.element, e2);
  to_std(spread, args.spread_is_std, std);
  load_channels<kWhole>(args.latent_mean, place.element, args.plane, count, latent_mean);
  load_channels<kWhole>(args.latent_std, place.element, args.plane, count, latent_std);
  float z[kWidth], z_t[kWidth], velocity[kWidth];
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    const float unrounded = mean[i] + std[i] * e1[i];
    const Injected out = inject(unrounded, (unrounded - latent_mean[i]) * (1.0f / latent_std[i]), t, e2[i]);
    z[i] = out.z;
    z_t[i] = out.z_t;
    velocity[i] = out.velocity;
  }
  const int64_t first_of_sample = place.sample * static_cast<int64_t>(args.elements);
  const int64_t offset = first_of_sample + place.element;
  store_samples<kWhole>(args.z + offset, count, aligned, z);
  if (args.grid.patch) {
    T* tokens = args.z_t + first_of_sample;
    uint32_t indices[kWidth];
    token_indices<kWhole>(args.grid, args.plane, place.element, indices);
    SENDVAE_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      if (kWhole || i < count) tokens[indices[i]] = from_float<T>(z_t[i]);
    }
  } else {
    store_samples<kWhole>(args.z_t + offset, count, aligned, z_t);
  }
  store_samples<kWhole>(args.velocity + offset, count, aligned, velocity);
}

template <typename T, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads)
    backward_kernel(NoiseInjectBackwardArgs<T> args, uint32_t blocks_per_sample, bool aligned) {
  constexpr int kWidth = kVectorWidth<T>;
  __shared__ PhiloxKey shared_key;
  const Place place = find_place(blocks_per_sample, kWidth);
  const uint32_t count = place.element < args.elements ? args.elements - place.element : 0;
  float grad_z[kWidth] = {}, grad_z_t[kWidth] = {}, grad_velocity[kWidth] = {}, spread[kWidth] = {};
  if (count > 0) {  // on their way while one thread makes the key
    load_samples<kWhole>(args.grad_z, place, count, aligned, grad_z);
    if (args.grid.patch && !args.grad_z_t.uniform) {
      const T* tokens = args.grad_z_t.data + place.sample * args.grad_z_t.stride;
      uint32_t indices[kWidth];
      token_indices<kWhole>(args.grid, args.plane, place.element, indices);
      SENDVAE_UNROLL
      for (int i = 0; i < kWidth; ++i) grad_z_t[i] = kWhole || i < count ? to_float(tokens[indices[i]]) : 0.0f;
    } else {
      load_samples<kWhole>(args.grad_z_t, place, count, aligned, grad_z_t);
    }
    load_samples<kWhole>(args.grad_velocity, place, count, aligned, grad_velocity);
    load_samples<kWhole>(args.spread, place, count, aligned, spread);
  }
  if (threadIdx.x == 0) shared_key = make_key(args.key[0], args.key[1]);
  __syncthreads();
  if (count == 0) return;

  const float t = args.t[place.sample];
  float e1[kWidth], std[kWidth], latent_std[kWidth], grad_mean[kWidth], grad_spread[kWidth];
  draw_normals(shared_key, Stream::kPosterior, args.sample_ids[place.sample], place.element, e1);
  to_std(spread, args.spread_is_std, std);
  load_channels<kWhole>(args.latent_std, place.element, args.plane, count, latent_std);
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    const float of_n = (1.0f - t) * grad_z_t[i] - grad_velocity[i];
    const float of_z = grad_z[i] + of_n * (1.0f / latent_std[i]);
    const InjectedGrad grad = inject_backward(of_z, spread[i], std[i], args.spread_is_std, e1[i]);
    grad_mean[i] = grad.mean;
    grad_spread[i] = grad.spread;
  }
  const int64_t offset = place.sample * static_cast<int64_t>(args.elements) + place.element;
  store_samples<kWhole>(args.grad_mean + offset, count, aligned, grad_mean);
  store_samples<kWhole>(args.grad_spread + offset, count, aligned, grad_spread);
}

// Whether vectors of aligned samples are also full, of one channel and, with tokens, of one row.
template <typename T, typename Args>
bool is_whole(const Args& args) {
  return args.plane % kVectorWidth<T> == 0 && (args.grid.patch == 0 || args.grid.width % kVectorWidth<T> == 0);
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
    const Grid grid = grid_for(call.kName, args.batch, args.elements, kVectorWidth<T>);
    const bool aligned = is_aligned(args.mean) && is_aligned(args.spread) && is_vector_aligned(args.z, args.elements) &&
                         is_vector_aligned(args.z_t, args.elements) && is_vector_aligned(args.velocity, args.elements);
    const auto kernel = aligned && is_whole<T>(args) ? forward_kernel<T, true> : forward_kernel<T, false>;
    kernel<<<grid.blocks, grid.threads, 0, current_stream(mean)>>>(args, grid.blocks_per_sample, aligned);
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
    const Grid grid = grid_for(call.kName, args.batch, args.elements, kVectorWidth<T>);
    const bool aligned = is_aligned(args.grad_z) && is_aligned(args.grad_z_t) && is_aligned(args.grad_velocity) &&
                         is_aligned(args.spread) && is_vector_aligned(args.grad_mean, args.elements) &&
                         is_vector_aligned(args.grad_spread, args.elements);
    const auto kernel = aligned && is_whole<T>(args) ? backward_kernel<T, true> : backward_kernel<T, false>;
    kernel<<<grid.blocks, grid.threads, 0, current_stream(grad_z)>>>(args, grid.blocks_per_sample, aligned);
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
