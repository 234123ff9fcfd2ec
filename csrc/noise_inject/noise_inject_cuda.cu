// noise_inject on CUDA: a thread takes one 16-byte vector of one sample, and draws the Philox blocks of exactly those
// elements; a block of threads stays within one sample. Forward reads 2 and writes 3 tensors, backward 4 and 2.
#include "noise_inject.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../common/cuda_samples.cuh"

namespace sendvae {
namespace {

template <typename T>
__device__ __forceinline__ void load_samples(const Samples<T>& samples, const Place& place, uint32_t count,
                                             bool aligned, float (&out)[kVectorWidth<T>]) {
  if (samples.uniform) {
    const float value = to_float(*samples.data);
    SENDVAE_UNROLL
    for (int i = 0; i < kVectorWidth<T>; ++i) out[i] = value;
  } else {
    load_vector(samples.data + place.sample * samples.stride + place.element, count, aligned, out);
  }
}

// Where a thread's elements go among the sample's tokens. Neighbouring threads are far apart there (C P P elements or
// P): the L2 cache gathers what they write before it goes to memory.
template <int kWidth>
__device__ __forceinline__ void token_indices(const PatchGrid& grid, uint32_t plane, const Place& place,
                                              uint32_t (&out)[kWidth]) {
  ChannelCursor cursor(place.element, plane);
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    const uint32_t position = cursor.position();
    out[i] = token_index(grid, cursor.channel, position / grid.width, position % grid.width);
    cursor.advance();
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    forward_kernel(NoiseInjectArgs<T> args, uint32_t blocks_per_sample, bool aligned) {
  constexpr int kWidth = kVectorWidth<T>;
  __shared__ PhiloxKey shared_key;
  __shared__ float shared_t;
  const Place place = find_place(blocks_per_sample, kWidth);
  const int64_t id = args.sample_ids[place.sample];
  if (threadIdx.x == 0) {
    shared_key = make_key(args.key[0], args.key[1]);
    shared_t = args.given_t ? args.given_t[place.sample] : sample_time(shared_key, id);
    if (place.first_of_sample) args.t[place.sample] = shared_t;
  }
  __syncthreads();
  if (place.element >= args.elements) return;

  const PhiloxKey key = shared_key;
  const float t = shared_t;
  const uint32_t count = args.elements - place.element;
  float mean[kWidth], spread[kWidth], e1[kWidth], e2[kWidth];
  load_samples(args.mean, place, count, aligned, mean);
  load_samples(args.spread, place, count, aligned, spread);
  draw_normals(key, Stream::kPosterior, id, place.element, e1);
  draw_normals(key, Stream::kInterpolant, id, place.element, e2);

  float z[kWidth], z_t[kWidth], velocity[kWidth];
  ChannelCursor cursor(place.element, args.plane);
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    if (i >= count) break;
    const Injected out = inject(mean[i], std_from_spread(spread[i], args.spread_is_std),
                                args.latent_mean[cursor.channel], args.latent_std[cursor.channel], t, e1[i], e2[i]);
    z[i] = out.z;
    z_t[i] = out.z_t;
    velocity[i] = out.velocity;
    cursor.advance();
  }
  const int64_t offset = place.sample * static_cast<int64_t>(args.elements) + place.element;
  store_vector(args.z + offset, count, aligned, z);
  if (args.grid.patch) {
    T* tokens = args.z_t + place.sample * static_cast<int64_t>(args.elements);
    uint32_t indices[kWidth];
    token_indices(args.grid, args.plane, place, indices);
    SENDVAE_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      if (i < count) tokens[indices[i]] = from_float<T>(z_t[i]);
    }
  } else {
    store_vector(args.z_t + offset, count, aligned, z_t);
  }
  store_vector(args.velocity + offset, count, aligned, velocity);
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    backward_kernel(NoiseInjectBackwardArgs<T> args, uint32_t blocks_per_sample, bool aligned) {
  constexpr int kWidth = kVectorWidth<T>;
  __shared__ PhiloxKey shared_key;
  const Place place = find_place(blocks_per_sample, kWidth);
  if (threadIdx.x == 0) shared_key = make_key(args.key[0], args.key[1]);
  __syncthreads();
  if (place.element >= args.elements) return;

  const PhiloxKey key = shared_key;
  const float t = args.t[place.sample];
  const uint32_t count = args.elements - place.element;
  float grad_z[kWidth], grad_z_t[kWidth], grad_velocity[kWidth], spread[kWidth], e1[kWidth];
  load_samples(args.grad_z, place, count, aligned, grad_z);
  if (args.grid.patch && !args.grad_z_t.uniform) {
    const T* tokens = args.grad_z_t.data + place.sample * args.grad_z_t.stride;
    uint32_t indices[kWidth];
    token_indices(args.grid, args.plane, place, indices);
    SENDVAE_UNROLL
    for (int i = 0; i < kWidth; ++i) grad_z_t[i] = i < count ? to_float(tokens[indices[i]]) : 0.0f;
  } else {
    load_samples(args.grad_z_t, place, count, aligned, grad_z_t);
  }
  load_samples(args.grad_velocity, place, count, aligned, grad_velocity);
  load_samples(args.spread, place, count, aligned, spread);
  draw_normals(key, Stream::kPosterior, args.sample_ids[place.sample], place.element, e1);

  float grad_mean[kWidth], grad_spread[kWidth];
  ChannelCursor cursor(place.element, args.plane);
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    if (i >= count) break;
    const InjectedGrad grad = inject_backward(grad_z[i], grad_z_t[i], grad_velocity[i], spread[i], args.spread_is_std,
                                              args.latent_std[cursor.channel], t, e1[i]);
    grad_mean[i] = grad.mean;
    grad_spread[i] = grad.spread;
    cursor.advance();
  }
  const int64_t offset = place.sample * static_cast<int64_t>(args.elements) + place.element;
  store_vector(args.grad_mean + offset, count, aligned, grad_mean);
  store_vector(args.grad_spread + offset, count, aligned, grad_spread);
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
    forward_kernel<T><<<grid.blocks, grid.threads, 0, current_stream(mean)>>>(args, grid.blocks_per_sample, aligned);
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
    backward_kernel<T><<<grid.blocks, grid.threads, 0, current_stream(grad_z)>>>(args, grid.blocks_per_sample, aligned);
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
