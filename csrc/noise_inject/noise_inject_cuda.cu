// noise_inject on CUDA: a thread takes one 16-byte vector of one sample, and draws the Philox blocks of exactly those
// elements; a block of threads stays within one sample. Forward reads 2 and writes 1 to 3 tensors, backward 4 and 2.
// With tokens a block takes some rows of all channels, whose tokens follow each other, and turns them in shared memory.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "access.cuh"

namespace sendvae {
namespace {

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
  const ChannelCursor cursor(place.element, args.plane);
  float z_t[kWidth];
  if (count > 0) {
    const PhiloxKey key = shared_key;
    const float t = shared_t;
    float e1[kWidth], e2[kWidth], std[kWidth], latent_mean[kWidth], latent_std[kWidth];
    draw_normals(key, Stream::kPosterior, id, place.element, e1);
    draw_normals(key, Stream::kInterpolant, id, place.element, e2);
    to_std(spread, args.spread_is_std, std);
    load_channels<kAccess>(args.latent_mean, cursor, count, latent_mean);
    load_channels<kAccess>(args.latent_std, cursor, count, latent_std);
    float z[kWidth], velocity[kWidth];
    SENDVAE_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      const float unrounded = mean[i] + std[i] * e1[i];
      const Injected out = inject(unrounded, (unrounded - latent_mean[i]) * (1.0f / latent_std[i]), t, e2[i]);
      z[i] = out.z;
      z_t[i] = out.z_t;
      velocity[i] = out.velocity;
    }
    const int64_t offset = first_of_sample + place.element;
    if (args.z) store_samples<kAccess>(args.z + offset, count, aligned, z);
    if (args.velocity) store_samples<kAccess>(args.velocity + offset, count, aligned, velocity);
  }
  if constexpr (kAccess == Access::kTiled) {
    __shared__ Vector<T> staged[kMaxThreads];
    if (count > 0) {
      uint32_t indices[kWidth];
      tile_indices(args.grid, cursor, tile, indices);
      SENDVAE_UNROLL
      for (int i = 0; i < kWidth; ++i) reinterpret_cast<T*>(staged)[indices[i]] = from_float<T>(z_t[i]);
    }
    __syncthreads();
    const TileTokens tokens = tile_tokens<kWidth>(args, blocks_per_sample, tile);
    Vector<T>* out = reinterpret_cast<Vector<T>*>(args.z_t + first_of_sample + tokens.first);
    if (threadIdx.x < tokens.vectors) out[threadIdx.x] = staged[swizzled<1>(threadIdx.x)];
  } else if (args.grid.patch) {
    uint32_t indices[kWidth];
    token_indices(args.grid, cursor, indices);
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

  const ChannelCursor cursor(place.element, args.plane);
  if (has_tokens) {
    uint32_t indices[kWidth];
    if constexpr (kAccess == Access::kTiled) {
      tile_indices(args.grid, cursor, tile, indices);
    } else {
      token_indices(args.grid, cursor, indices);
    }
    const T* from = kAccess == Access::kTiled ? reinterpret_cast<const T*>(staged) : grad_tokens;
    SENDVAE_UNROLL
    for (int i = 0; i < kWidth; ++i) grad_z_t[i] = i < count ? to_float(from[indices[i]]) : 0.0f;
  }
  const float t = args.t[place.sample];
  float e1[kWidth], std[kWidth], latent_std[kWidth], grad_mean[kWidth], grad_spread[kWidth];
  draw_normals(shared_key, Stream::kPosterior, args.sample_ids[place.sample], place.element, e1);
  to_std(spread, args.spread_is_std, std);
  load_channels<kAccess>(args.latent_std, cursor, count, latent_std);
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

std::tuple<Tensor, Tensor, Tensor, Tensor> noise_inject_cuda(const Tensor& mean, const Tensor& spread,
                                                             const Tensor& latent_mean, const Tensor& latent_std,
                                                             const Tensor& key, const Tensor& sample_ids,
                                                             const std::optional<Tensor>& t, bool spread_is_std,
                                                             const std::optional<int64_t>& patch_size, bool need_z,
                                                             bool need_velocity) {
  const torch::stable::accelerator::DeviceGuard guard(mean.get_device_index());
  const NoiseInject call(mean, spread, latent_mean, latent_std, key, sample_ids, t, spread_is_std, patch_size, need_z,
                         need_velocity);
  dispatch_float(mean.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const NoiseInjectArgs<T> args = call.args<T>();
    if (args.batch == 0) return;
    // A null z or velocity counts as aligned.
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
