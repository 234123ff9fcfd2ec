// sde_step on CUDA: one launch, a thread takes the four elements of one Philox block. Loads and stores are of single
// elements: a step moves a few MB at most and costs what a launch costs.
#include "sde_step.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../common/cuda_samples.cuh"

namespace sendvae {
namespace {

constexpr int kWidth = 4;

template <typename S, typename T>
__global__ void __launch_bounds__(kMaxThreads) step_kernel(SdeStepArgs<S, T> args, uint32_t blocks_per_sample) {
  const Place place = find_place(blocks_per_sample, kWidth);
  if (place.element >= args.elements) return;
  const SdeCoefficients<S> coefficients = sde_coefficients<S>(args.times);
  float noise[kWidth] = {};
  if (!args.last) {
    const PhiloxKey key = make_key(args.key[0], args.key[1]);
    draw_normals(key, Stream::kSamplerStep, args.sample_ids[place.sample], place.element, noise);
  }

  const S* x = args.x + place.sample * args.x_stride + place.element;
  const T* velocity = args.velocity.data + place.sample * args.velocity.stride_b;
  const T* unconditional = args.unconditional.data + place.sample * args.unconditional.stride_b;
  const int64_t offset = place.sample * static_cast<int64_t>(args.elements) + place.element;
  const uint32_t count = args.elements - place.element;
  ChannelCursor cursor(place.element, args.plane);
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    if (i >= count) break;
    const int64_t position = cursor.channel * args.velocity.stride_c + cursor.position() * args.velocity.stride_p;
    S v = to_float(velocity[position]);
    if (args.guided) v = guide(v, static_cast<S>(to_float(unconditional[position])), args.scale);
    S x_next = sde_drift_step(x[i], v, coefficients);
    if (!args.last) x_next += coefficients.noise * noise[i];
    args.x_next[offset + i] = x_next;
    args.network_input[offset + i] = from_float<T>(static_cast<float>(x_next));
    cursor.advance();
  }
}

std::tuple<Tensor, Tensor> sde_step_cuda(const Tensor& x, const Tensor& velocity, const Tensor& times,
                                         const Tensor& key, const Tensor& sample_ids, std::optional<double> scale,
                                         bool last) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const SdeStep call(x, velocity, times, key, sample_ids, scale, last);
  call.dispatch([&]<typename S, typename T>(const SdeStepArgs<S, T>& args) {
    if (args.batch == 0) return;
    const Grid grid = grid_for(call.kName, args.batch, args.elements, kWidth);
    step_kernel<<<grid.blocks, grid.threads, 0, current_stream(x)>>>(args, grid.blocks_per_sample);
    check_launch(call.kName);
  });
  return call.outputs();
}

}  // namespace
}  // namespace sendvae

STABLE_TORCH_LIBRARY_IMPL(sendvae, CUDA, library) { library.impl("sde_step", TORCH_BOX(&sendvae::sde_step_cuda)); }
