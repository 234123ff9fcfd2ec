// noise_inject on the CPU: samples are cut into tiles; a tile's noise is drawn into a small buffer and then used, both in
// loops that compilers vectorise. Tiles depend on nothing but the sample, so neither do results: not on the number of
// threads, not on the place in the batch.
#include "noise_inject.h"

#include <algorithm>

#include <torch/csrc/stable/library.h>

#include "../common/cpu.h"

namespace sendvae {
namespace {

constexpr uint32_t kTile = 1024;   // elements; a multiple of 4, and small enough for two noise buffers in L1
constexpr int64_t kGrain = 4;      // tiles a thread takes at least

SENDVAE_HD void fill_normals(PhiloxKey key, Stream stream, int64_t sample_id, uint32_t begin, uint32_t count,
                             float* __restrict__ out) {
  const uint32_t first = begin / 4;
  const uint32_t blocks = (count + 3) / 4;
  for (uint32_t i = 0; i < blocks; ++i) {
    const Normal4 normals = sample_normals(key, stream, sample_id, first + i);
    out[4 * i] = normals.x;
    out[4 * i + 1] = normals.y;
    out[4 * i + 2] = normals.z;
    out[4 * i + 3] = normals.w;
  }
}

template <typename T>
SENDVAE_CPU_CLONES void forward_tile(const NoiseInjectArgs<T>& args, int64_t sample, uint32_t begin, uint32_t end) {
  float e1[kTile], e2[kTile];
  const PhiloxKey key = make_key(args.key[0], args.key[1]);
  const int64_t id = args.sample_ids[sample];
  fill_normals(key, Stream::kPosterior, id, begin, end - begin, e1);
  fill_normals(key, Stream::kInterpolant, id, begin, end - begin, e2);

  const float t = args.t[sample];
  const bool spread_is_std = args.spread_is_std;
  const T* __restrict__ mean = args.mean.data + sample * args.mean.stride;
  const T* __restrict__ spread = args.spread.data + sample * args.spread.stride;
  const int64_t offset = sample * static_cast<int64_t>(args.elements);
  T* __restrict__ z = args.z + offset;
  T* __restrict__ z_t = args.z_t + offset;
  T* __restrict__ velocity = args.velocity + offset;
  for (uint32_t from = begin, to; from < end; from = to) {  // one channel at a time
    const uint32_t channel = from / args.plane;
    to = std::min(end, (channel + 1) * args.plane);
    const float latent_mean = args.latent_mean[channel], latent_std = args.latent_std[channel];
    for (uint32_t i = from; i < to; ++i) {
      const float std = std_from_spread(to_float(spread[i]), spread_is_std);
      const Injected out =
          inject(to_float(mean[i]), std, latent_mean, latent_std, t, e1[i - begin], e2[i - begin]);
      z[i] = from_float<T>(out.z);
      z_t[i] = from_float<T>(out.z_t);
      velocity[i] = from_float<T>(out.velocity);
    }
  }
}

template <typename T>
SENDVAE_CPU_CLONES void backward_tile(const NoiseInjectBackwardArgs<T>& args, int64_t sample, uint32_t begin,
                                      uint32_t end) {
  float e1[kTile];
  const PhiloxKey key = make_key(args.key[0], args.key[1]);
  fill_normals(key, Stream::kPosterior, args.sample_ids[sample], begin, end - begin, e1);

  const float t = args.t[sample];
  const bool spread_is_std = args.spread_is_std;
  const T* __restrict__ grad_z = args.grad_z.data + sample * args.grad_z.stride;
  const T* __restrict__ grad_z_t = args.grad_z_t.data + sample * args.grad_z_t.stride;
  const T* __restrict__ grad_velocity = args.grad_velocity.data + sample * args.grad_velocity.stride;
  const T* __restrict__ spread = args.spread.data + sample * args.spread.stride;
  const int64_t offset = sample * static_cast<int64_t>(args.elements);
  T* __restrict__ grad_mean = args.grad_mean + offset;
  T* __restrict__ grad_spread = args.grad_spread + offset;
  for (uint32_t from = begin, to; from < end; from = to) {  // one channel at a time
    const uint32_t channel = from / args.plane;
    to = std::min(end, (channel + 1) * args.plane);
    const float latent_std = args.latent_std[channel];
    for (uint32_t i = from; i < to; ++i) {
      const InjectedGrad grad =
          inject_backward(to_float(grad_z[i]), to_float(grad_z_t[i]), to_float(grad_velocity[i]), to_float(spread[i]),
                          spread_is_std, latent_std, t, e1[i - begin]);
      grad_mean[i] = from_float<T>(grad.mean);
      grad_spread[i] = from_float<T>(grad.spread);
    }
  }
}

// Runs tile(args, sample, begin, end) over all tiles of all samples.
template <typename Args>
void for_each_tile(const Args& args, void (*tile)(const Args&, int64_t, uint32_t, uint32_t)) {
  const int64_t tiles = (static_cast<int64_t>(args.elements) + kTile - 1) / kTile;  // of one sample
  torch::stable::parallel_for(0, args.batch * tiles, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const uint32_t begin = static_cast<uint32_t>(i % tiles) * kTile;
      tile(args, i / tiles, begin, std::min(args.elements, begin + kTile));
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> noise_inject_cpu(
    const Tensor& mean, const Tensor& spread, const Tensor& latent_mean, const Tensor& latent_std, const Tensor& key,
    const Tensor& sample_ids, const std::optional<Tensor>& t, bool spread_is_std) {
  const NoiseInject call(mean, spread, latent_mean, latent_std, key, sample_ids, t, spread_is_std);
  dispatch_float(mean.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const NoiseInjectArgs<T> args = call.args<T>();
    const PhiloxKey philox_key = make_key(args.key[0], args.key[1]);
    for (int64_t i = 0; i < args.batch; ++i) {
      args.t[i] = args.given_t ? args.given_t[i] : sample_time(philox_key, args.sample_ids[i]);
    }
    for_each_tile(args, forward_tile<T>);
  });
  return call.outputs();
}

std::tuple<Tensor, Tensor> noise_inject_backward_cpu(
    const Tensor& grad_z, const Tensor& grad_z_t, const Tensor& grad_velocity, const Tensor& spread,
    const Tensor& latent_std, const Tensor& key, const Tensor& sample_ids, const Tensor& t, bool spread_is_std) {
  const NoiseInjectBackward call(grad_z, grad_z_t, grad_velocity, spread, latent_std, key, sample_ids, t,
                                 spread_is_std);
  dispatch_float(spread.scalar_type(), [&](auto type) {
    using T = decltype(type);
    for_each_tile(call.args<T>(), backward_tile<T>);
  });
  return call.outputs();
}

}  // namespace
}  // namespace sendvae

STABLE_TORCH_LIBRARY_IMPL(sendvae, CPU, library) {
  library.impl("noise_inject", TORCH_BOX(&sendvae::noise_inject_cpu));
  library.impl("noise_inject_backward", TORCH_BOX(&sendvae::noise_inject_backward_cpu));
}
