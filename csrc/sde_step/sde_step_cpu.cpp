// sde_step on the CPU: a tile's velocity and noise go into small buffers, and from there through loops that compilers
// vectorise.
#include "sde_step.h"

#include <torch/csrc/stable/library.h>

#include "../common/cpu_samples.h"

namespace sendvae {
namespace {

// Reads elements [begin, end) of a sample, in [C, H, W] order, from any memory format.
template <typename S, typename T>
SENDVAE_HD void gather(const Planes<T>& planes, int64_t sample, uint32_t begin, uint32_t end, uint32_t plane,
                       S* __restrict__ out) {
  for_each_channel(begin, end, plane, [&](Run run) __attribute__((always_inline)) {
    const int64_t position = begin + run.begin - run.channel * plane;
    const T* __restrict__ from =
        planes.data + sample * planes.stride_b + run.channel * planes.stride_c + position * planes.stride_p;
    const int64_t count = run.end - run.begin, stride = planes.stride_p;
    S* __restrict__ to = out + run.begin;
    if (stride == 1) {
      for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i * stride]);
    }
  });
}

template <typename S, typename T>
SENDVAE_CPU_CLONES void step_tile(const SdeStepArgs<S, T>& args, int64_t sample, uint32_t begin, uint32_t end) {
  const uint32_t count = end - begin;
  const SdeCoefficients<S> coefficients = sde_coefficients<S>(args.times);
  S velocity[kTile];
  gather(args.velocity, sample, begin, end, args.plane, velocity);
  if (args.guided) {
    S unconditional[kTile];
    gather(args.unconditional, sample, begin, end, args.plane, unconditional);
    for (uint32_t i = 0; i < count; ++i) velocity[i] = guide(velocity[i], unconditional[i], args.scale);
  }

  const S* __restrict__ x = args.x + sample * args.x_stride + begin;
  const int64_t offset = sample * static_cast<int64_t>(args.elements) + begin;
  S* __restrict__ x_next = args.x_next + offset;
  for (uint32_t i = 0; i < count; ++i) x_next[i] = sde_drift_step(x[i], velocity[i], coefficients);
  if (!args.last) {
    float noise[kTile];
    const PhiloxKey key = make_key(args.key[0], args.key[1]);
    fill_normals(key, Stream::kSamplerStep, args.sample_ids[sample], begin, count, noise);
    for (uint32_t i = 0; i < count; ++i) x_next[i] += coefficients.noise * noise[i];
  }

  T* __restrict__ network_input = args.network_input + offset;
  for (uint32_t i = 0; i < count; ++i) network_input[i] = from_float<T>(static_cast<float>(x_next[i]));
}

std::tuple<Tensor, Tensor> sde_step_cpu(const Tensor& x, const Tensor& velocity, const Tensor& times, const Tensor& key,
                                        const Tensor& sample_ids, std::optional<double> scale, bool last) {
  const SdeStep call(x, velocity, times, key, sample_ids, scale, last);
  call.dispatch([]<typename S, typename T>(const SdeStepArgs<S, T>& args) { for_each_tile(args, step_tile<S, T>); });
  return call.outputs();
}

}  // namespace
}  // namespace sendvae

STABLE_TORCH_LIBRARY_IMPL(sendvae, CPU, library) { library.impl("sde_step", TORCH_BOX(&sendvae::sde_step_cpu)); }
