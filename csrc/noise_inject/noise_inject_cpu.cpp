// noise_inject on the CPU: samples are cut into tiles; a tile's noise is drawn into a small buffer and then used, both
// in loops that compilers vectorise. Tiles depend on nothing but the sample, so neither do results: not on the number
// of threads, not on the place in the batch.
#include "noise_inject.h"

#include <algorithm>

#include <torch/csrc/stable/library.h>

#include "../common/cpu_samples.h"

namespace sendvae {
namespace {

// A tensor's elements `begin` ... `begin + count` of a sample: in place, or written to `scratch` if it is uniform.
template <typename T>
SENDVAE_HD const T* tile_of(const Samples<T>& samples, int64_t sample, uint32_t begin, uint32_t count, T* scratch) {
  if (!samples.uniform) return samples.data + sample * samples.stride + begin;
  std::fill_n(scratch, count, *samples.data);
  return scratch;
}

// Calls body(i, index) for elements `begin` + i of a sample and their indices among its tokens.
template <typename Body>
SENDVAE_HD void for_each_token_index(const PatchGrid& grid, uint32_t plane, uint32_t begin, uint32_t end,
                                     const Body& body) {
  for_each_channel(begin, end, plane, [&](Run run) __attribute__((always_inline)) {
    const uint32_t first = static_cast<uint32_t>(begin + run.begin - run.channel * plane);  // in the plane
    uint32_t row = first / grid.width, column = first % grid.width;
    for (int64_t i = run.begin; i < run.end; ++row, column = 0) {
      // Along a row, features of a patch follow each other; then comes the same place in the next token.
      uint32_t index = token_index(grid, static_cast<uint32_t>(run.channel), row, column);
      uint32_t in_patch = column % grid.patch;
      const int64_t row_end = std::min<int64_t>(run.end, i + grid.width - column);
      for (; i < row_end; ++i, ++index) {
        body(i, index);
        if (++in_patch == grid.patch) {
          in_patch = 0;
          index += grid.features - grid.patch;
        }
      }
    }
  });
}

// kSpreadIsStd is a constant here because a choice that a loop makes afresh for each element keeps it from vectorising.
template <typename T, bool kSpreadIsStd>
SENDVAE_CPU_CLONES void forward_tile(const NoiseInjectArgs<T>& args, int64_t sample, uint32_t begin, uint32_t end) {
  float e1_tile[kTile], e2_tile[kTile];
  const PhiloxKey key = make_key(args.key[0], args.key[1]);
  const int64_t id = args.sample_ids[sample];
  fill_normals(key, Stream::kPosterior, id, begin, end - begin, e1_tile);
  fill_normals(key, Stream::kInterpolant, id, begin, end - begin, e2_tile);

  T mean_scratch[kTile], spread_scratch[kTile], z_t_scratch[kTile];
  T z_scratch[kTile], velocity_scratch[kTile];  // for what nobody needs
  const T* mean_tile = tile_of(args.mean, sample, begin, end - begin, mean_scratch);
  const T* spread_tile = tile_of(args.spread, sample, begin, end - begin, spread_scratch);

  const float t = args.t[sample];
  const int64_t first_of_sample = sample * static_cast<int64_t>(args.elements);
  const int64_t offset = first_of_sample + begin;
  T* z_t_tile = args.grid.patch ? z_t_scratch : args.z_t + offset;
  for_each_channel(begin, end, args.plane, [&](Run run) __attribute__((always_inline)) {
    const float latent_mean = args.latent_mean[run.channel], latent_std = args.latent_std[run.channel];
    const T* __restrict__ mean = mean_tile + run.begin;
    const T* __restrict__ spread = spread_tile + run.begin;
    const float* __restrict__ e1 = e1_tile + run.begin;
    const float* __restrict__ e2 = e2_tile + run.begin;
    T* __restrict__ z = (args.z ? args.z + offset : z_scratch) + run.begin;
    T* __restrict__ z_t = z_t_tile + run.begin;
    T* __restrict__ velocity = (args.velocity ? args.velocity + offset : velocity_scratch) + run.begin;
    const int64_t count = run.end - run.begin;
    for (int64_t i = 0; i < count; ++i) {
      const float std = std_from_spread(to_float(spread[i]), kSpreadIsStd);
      const float z_unrounded = to_float(mean[i]) + std * e1[i];
      const Injected out = inject(z_unrounded, (z_unrounded - latent_mean) / latent_std, t, e2[i]);
      z[i] = from_float<T>(out.z);
      z_t[i] = from_float<T>(out.z_t);
      velocity[i] = from_float<T>(out.velocity);
    }
  });
  if (!args.grid.patch) return;
  T* __restrict__ tokens = args.z_t + first_of_sample;
  for_each_token_index(args.grid, args.plane, begin, end,
                       [&](int64_t i, uint32_t index) __attribute__((always_inline)) { tokens[index] = z_t_tile[i]; });
}

template <typename T, bool kSpreadIsStd>
SENDVAE_CPU_CLONES void backward_tile(const NoiseInjectBackwardArgs<T>& args, int64_t sample, uint32_t begin,
                                      uint32_t end) {
  float e1_tile[kTile];
  const PhiloxKey key = make_key(args.key[0], args.key[1]);
  fill_normals(key, Stream::kPosterior, args.sample_ids[sample], begin, end - begin, e1_tile);

  T grad_z_scratch[kTile], grad_z_t_scratch[kTile], grad_velocity_scratch[kTile], spread_scratch[kTile];
  const T* grad_z_tile = tile_of(args.grad_z, sample, begin, end - begin, grad_z_scratch);
  const T* grad_z_t_tile = grad_z_t_scratch;
  if (args.grid.patch && !args.grad_z_t.uniform) {
    const T* tokens = args.grad_z_t.data + sample * args.grad_z_t.stride;
    for_each_token_index(args.grid, args.plane, begin, end,
                         [&](int64_t i, uint32_t index)
                             __attribute__((always_inline)) { grad_z_t_scratch[i] = tokens[index]; });
  } else {
    grad_z_t_tile = tile_of(args.grad_z_t, sample, begin, end - begin, grad_z_t_scratch);
  }
  const T* grad_velocity_tile = tile_of(args.grad_velocity, sample, begin, end - begin, grad_velocity_scratch);
  const T* spread_tile = tile_of(args.spread, sample, begin, end - begin, spread_scratch);

  const float t = args.t[sample];
  const int64_t offset = sample * static_cast<int64_t>(args.elements) + begin;
  for_each_channel(begin, end, args.plane, [&](Run run) __attribute__((always_inline)) {
    const float latent_std = args.latent_std[run.channel];
    const T* __restrict__ grad_z = grad_z_tile + run.begin;
    const T* __restrict__ grad_z_t = grad_z_t_tile + run.begin;
    const T* __restrict__ grad_velocity = grad_velocity_tile + run.begin;
    const T* __restrict__ spread = spread_tile + run.begin;
    const float* __restrict__ e1 = e1_tile + run.begin;
    T* __restrict__ grad_mean = args.grad_mean + offset + run.begin;
    T* __restrict__ grad_spread = args.grad_spread + offset + run.begin;
    const int64_t count = run.end - run.begin;
    for (int64_t i = 0; i < count; ++i) {
      const float of_n = (1.0f - t) * to_float(grad_z_t[i]) - to_float(grad_velocity[i]);
      const float of_z = to_float(grad_z[i]) + of_n / latent_std, spread_i = to_float(spread[i]);
      const float std = std_from_spread(spread_i, kSpreadIsStd);
      const InjectedGrad grad = inject_backward(of_z, spread_i, std, kSpreadIsStd, e1[i]);
      grad_mean[i] = from_float<T>(grad.mean);
      grad_spread[i] = from_float<T>(grad.spread);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> noise_inject_cpu(const Tensor& mean, const Tensor& spread,
                                                            const Tensor& latent_mean, const Tensor& latent_std,
                                                            const Tensor& key, const Tensor& sample_ids,
                                                            const std::optional<Tensor>& t, bool spread_is_std,
                                                            const std::optional<int64_t>& patch_size, bool need_z,
                                                            bool need_velocity) {
  const NoiseInject call(mean, spread, latent_mean, latent_std, key, sample_ids, t, spread_is_std, patch_size, need_z,
                         need_velocity);
  dispatch_float(mean.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const NoiseInjectArgs<T> args = call.args<T>();
    const PhiloxKey philox_key = make_key(args.key[0], args.key[1]);
    for (int64_t i = 0; i < args.batch; ++i) {
      args.t[i] = args.given_t ? args.given_t[i] : sample_time(philox_key, args.sample_ids[i]);
    }
    for_each_tile(args, args.spread_is_std ? forward_tile<T, true> : forward_tile<T, false>);
  });
  return call.outputs();
}

std::tuple<Tensor, Tensor> noise_inject_backward_cpu(const Tensor& grad_z, const Tensor& grad_z_t,
                                                     const Tensor& grad_velocity, const Tensor& spread,
                                                     const Tensor& latent_std, const Tensor& key,
                                                     const Tensor& sample_ids, const Tensor& t, bool spread_is_std,
                                                     const std::optional<int64_t>& patch_size) {
  const NoiseInjectBackward call(grad_z, grad_z_t, grad_velocity, spread, latent_std, key, sample_ids, t, spread_is_std,
                                 patch_size);
  dispatch_float(spread.scalar_type(), [&](auto type) {
    using T = decltype(type);
    for_each_tile(call.args<T>(), spread_is_std ? backward_tile<T, true> : backward_tile<T, false>);
  });
  return call.outputs();
}

}  // namespace
}  // namespace sendvae

STABLE_TORCH_LIBRARY_IMPL(sendvae, CPU, library) {
  library.impl("noise_inject", TORCH_BOX(&sendvae::noise_inject_cpu));
  library.impl("noise_inject_backward", TORCH_BOX(&sendvae::noise_inject_backward_cpu));
}
