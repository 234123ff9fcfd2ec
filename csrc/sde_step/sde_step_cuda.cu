// sde_step on CUDA: one launch, a thread takes the four elements of one Philox block, in vectors of up to 16 bytes
// where they lie side by side and aligned.
#include "sde_step.h"

#include <cstring>
#include <type_traits>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../common/cuda_samples.cuh"

namespace sendvae {
namespace {

constexpr int kWidth = 4;

// A thread's elements in one access, or two of fp64.
template <typename V>
using Piece = std::conditional_t<sizeof(V) == 2, uint2, uint4>;
template <typename V>
constexpr int kPieces = kWidth * sizeof(V) / sizeof(Piece<V>);

template <typename V>
bool can_be_whole(const V* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % sizeof(Piece<V>) == 0 && stride % kWidth == 0;
}

template <typename V>
__device__ __forceinline__ void load_whole(const V* data, V (&out)[kWidth]) {
  Piece<V> pieces[kPieces<V>];
  SENDVAE_UNROLL
  for (int i = 0; i < kPieces<V>; ++i) pieces[i] = reinterpret_cast<const Piece<V>*>(data)[i];
  memcpy(out, pieces, sizeof pieces);
}

template <typename V>
__device__ __forceinline__ void store_whole(V* data, const V (&values)[kWidth]) {
  Piece<V> pieces[kPieces<V>];
  memcpy(pieces, values, sizeof pieces);
  SENDVAE_UNROLL
  for (int i = 0; i < kPieces<V>; ++i) reinterpret_cast<Piece<V>*>(data)[i] = pieces[i];
}

// Whether every thread's elements of the state and of the outputs lie side by side and aligned. (The outputs are packed
// and fresh, so aligned.)
template <typename S, typename T>
bool is_whole(const SdeStepArgs<S, T>& args) {
  return args.elements % kWidth == 0 && can_be_whole(args.x, args.x_stride);
}

// One by one: a network gives them channel by channel, so that neighbours lie apart.
template <typename T>
__device__ __forceinline__ void load_velocity(const Planes<T>& velocity, const Place& place, uint32_t plane,
                                              uint32_t count, T (&out)[kWidth]) {
  const T* data = velocity.data + place.sample * velocity.stride_b;
  ChannelCursor cursor(place.element, plane);
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    if (i >= count) break;
    out[i] = data[cursor.channel * velocity.stride_c + cursor.position() * velocity.stride_p];
    cursor.advance();
  }
}

// kWhole: all four are there, those of the state and the outputs side by side and aligned.
template <typename S, typename T, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads) step_kernel(SdeStepArgs<S, T> args, uint32_t blocks_per_sample) {
  const Place place = find_place(blocks_per_sample, kWidth);
  if (place.element >= args.elements) return;
  const uint32_t count = args.elements - place.element;
  const S* x_data = args.x + place.sample * args.x_stride + place.element;
  S x[kWidth] = {};
  T velocity[kWidth] = {}, unconditional[kWidth] = {};
  if constexpr (kWhole) {
    load_whole(x_data, x);
  } else {
    SENDVAE_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      if (i < count) x[i] = x_data[i];
    }
  }
  const uint32_t num_velocities = kWhole ? kWidth : count;
  load_velocity(args.velocity, place, args.plane, num_velocities, velocity);
  if (args.guided) load_velocity(args.unconditional, place, args.plane, num_velocities, unconditional);

  const SdeCoefficients<S> coefficients = sde_coefficients<S>(args.times);
  float noise[kWidth] = {};
  if (!args.last) {
    const PhiloxKey key = make_key(args.key[0], args.key[1]);
    draw_normals(key, Stream::kSamplerStep, args.sample_ids[place.sample], place.element, noise);
  }
  T network_input[kWidth];
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    S v = to_float(velocity[i]);
    if (args.guided) v = guide(v, static_cast<S>(to_float(unconditional[i])), args.scale);
    x[i] = sde_drift_step(x[i], v, coefficients);
    if (!args.last) x[i] += coefficients.noise * noise[i];
    network_input[i] = from_float<T>(static_cast<float>(x[i]));
  }

  const int64_t offset = place.sample * static_cast<int64_t>(args.elements) + place.element;
  if constexpr (kWhole) {
    store_whole(args.x_next + offset, x);
    store_whole(args.network_input + offset, network_input);
  } else {
    SENDVAE_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      if (i >= count) break;
      args.x_next[offset + i] = x[i];
      args.network_input[offset + i] = network_input[i];
    }
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
    const auto kernel = is_whole(args) ? step_kernel<S, T, true> : step_kernel<S, T, false>;
    kernel<<<grid.blocks, grid.threads, 0, current_stream(x)>>>(args, grid.blocks_per_sample);
    check_launch(call.kName);
  });
  return call.outputs();
}

}  // namespace
}  // namespace sendvae

STABLE_TORCH_LIBRARY_IMPL(sendvae, CUDA, library) { library.impl("sde_step", TORCH_BOX(&sendvae::sde_step_cuda)); }
