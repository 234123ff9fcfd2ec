// group_norm_silu's backward on CUDA, in four launches: the chunks' parts of dbias and dweight; the groups' means of
// weight dz and weight dz xhat from them; the input's gradient; dbias and dweight over the batch. Maps are read twice
// and the gradient is written once. The first three are one launch for a map of which a block can hold all pixels; that
// is read once. Every sum has a fixed order, so results repeat bit for bit.
#include "group_norm_silu.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "tiles.cuh"

namespace sendvae {
namespace {

// A channel's parts of dbias and dweight; before they are joined that of dweight is divided by rstd.
struct ParameterGrads {
  float bias, weight;
};

// The parts of the exchanged channel in the thread's chunk.
template <int kMaxThreads, bool kSilu, bool kAligned, typename T>
__device__ __forceinline__ ParameterGrads chunk_parameter_grads(const GroupNormSiluBackwardArgs<T>& args,
                                                                const Tiling& tiling,
                                                                const Place<kVectorWidth<T>>& place) {
  constexpr int kWidth = kVectorWidth<T>;
  constexpr int kNum = kBatch<kAligned>;
  Normalisation normalisation[kWidth];
  const auto of_channel = [&](uint32_t channel, int64_t group) { return normalisation_of(args, channel, group); };
  for_channels(args.shape, tiling, place, of_channel, normalisation);
  float sums[2][kWidth] = {};
  for_batches<kNum>(place, [&](int64_t offset, int rows) {
    Packed x[kNum], grad_y[kNum];
    load_rows<kAligned>(args.s + offset, place, rows, x);
    load_rows<kAligned>(args.grad_y + offset, place, rows, grad_y);
    SENDVAE_UNROLL
    for (int row = 0; row < kNum; ++row) {
      if (row >= rows) continue;
      float values[kWidth], grads[kWidth];
      unpack<T>(x[row], values);
      unpack<T>(grad_y[row], grads);
      SENDVAE_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        const float grad_z = pre_activation_grad<T, kSilu>(grads[i], values[i], normalisation[i]);
        sums[0][i] += grad_z;
        sums[1][i] += grad_z * (values[i] - normalisation[i].mean);
      }
    }
  });
  exchange<kMaxThreads>(sums);
  ParameterGrads chunk{};
  SENDVAE_UNROLL
  for (int row = 0; row < kWidth; ++row) {
    chunk.bias += sums[0][row];
    chunk.weight += sums[1][row];
  }
  return chunk;
}

// The sum of a channel's parts [B, chunks, 2, C] in every `step`-th chunk of a sample.
__device__ __forceinline__ ParameterGrads sum_of_chunks(const GroupNormShape& shape, const Tiling& tiling,
                                                        const float* parts, int64_t sample, int64_t channel,
                                                        uint32_t first_chunk, uint32_t step) {
  ParameterGrads sum{};
  for (uint32_t chunk = first_chunk; chunk < tiling.chunks; chunk += step) {
    const float* part = parts + (sample * tiling.chunks + chunk) * 2 * shape.channels + channel;
    sum.bias += part[0];
    sum.weight += part[shape.channels];
  }
  return sum;
}

// Writes a channel's sums over a sample to `sums` [B, 2, C], and adds them, times its weight, to what a thread gathers.
__device__ __forceinline__ void write_channel(const GroupNormShape& shape, int64_t sample, int64_t channel,
                                              const ParameterGrads& grads, const float* weight, float* sums,
                                              ParameterGrads& weighted) {
  sums[sample * 2 * shape.channels + channel] = grads.bias;
  sums[(sample * 2 + 1) * shape.channels + channel] = grads.weight;
  weighted.bias += weight[channel] * grads.bias;
  weighted.weight += weight[channel] * grads.weight;
}

// Of a sample and group, from lanes that have the sums of weight dbias and of weight dweight over some channels each.
__device__ __forceinline__ void write_group_grad(const GroupNormShape& shape, const Tiling& tiling,
                                                 const ParameterGrads& weighted, float rstd, uint32_t lane,
                                                 GroupGrad* out) {
  const float count = static_cast<float>(shape.pixels * tiling.group_channels);
  const float sum = warp_sum(weighted.bias), sum_xhat = warp_sum(weighted.weight);
  if (lane == 0) *out = group_grad(sum / count, sum_xhat / count, rstd);
}

// What the gradients of a channel's inputs have in common.
struct ChannelGrad {
  Normalisation normalisation;
  GroupGrad group;
};

// From the groups' GroupGrad.
template <bool kSilu, bool kAligned, typename T>
__device__ __forceinline__ void write_input_grads(const GroupNormSiluBackwardArgs<T>& args, const Tiling& tiling,
                                                  const Place<kVectorWidth<T>>& place, const GroupGrad* group_grads) {
  constexpr int kWidth = kVectorWidth<T>;
  constexpr int kNum = kBatch<kAligned>;
  ChannelGrad channels[kWidth];
  const auto of_channel = [&](uint32_t channel, int64_t group) {
    return ChannelGrad{normalisation_of(args, channel, group), group_grads[group]};
  };
  for_channels(args.shape, tiling, place, of_channel, channels);
  for_batches<kNum>(place, [&](int64_t offset, int rows) {
    Packed x[kNum], grad_y[kNum], grad_s[kNum] = {};  // all bits zero: the number zero
    load_rows<kAligned>(args.s + offset, place, rows, x);
    load_rows<kAligned>(args.grad_y + offset, place, rows, grad_y);
    if (args.grad_s) load_rows<kAligned>(args.grad_s + offset, place, rows, grad_s);
    SENDVAE_UNROLL
    for (int row = 0; row < kNum; ++row) {
      if (row >= rows) continue;
      float values[kWidth], grads[kWidth], others[kWidth];
      unpack<T>(x[row], values);
      unpack<T>(grad_y[row], grads);
      unpack<T>(grad_s[row], others);
      SENDVAE_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        const Normalisation& normalisation = channels[i].normalisation;
        const float grad_z = pre_activation_grad<T, kSilu>(grads[i], values[i], normalisation);
        grads[i] = input_grad(grad_z, values[i], normalisation, channels[i].group) + others[i];
      }
      store_packed<kAligned>(args.grad_x + offset + row * place.step, place.count, pack<T>(grads));
    }
  });
}

// ---- A map of any size: three launches ----

// parts [B, chunks, 2, C]
template <typename T, bool kSilu, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2)
    parameter_grads_kernel(GroupNormSiluBackwardArgs<T> args, Tiling tiling, float* parts) {
  const Place<kVectorWidth<T>> place(args.shape, tiling, blockIdx.x);
  const ParameterGrads chunk = chunk_parameter_grads<kThreads, kSilu, kAligned>(args, tiling, place);
  store_parts(args.shape, tiling, place, chunk.bias, chunk.weight, parts);
}

// Adds up each thread column of a block, in every thread of it. All threads of the block must call it.
template <int kNum>
__device__ __forceinline__ void sum_rows(float (&values)[kNum]) {
  __shared__ float shared[kNum][kJoinThreads];
  const uint32_t thread = threadIdx.y * blockDim.x + threadIdx.x;
  SENDVAE_UNROLL
  for (int i = 0; i < kNum; ++i) shared[i][thread] = values[i];
  __syncthreads();
  for (uint32_t half = blockDim.y / 2; half > 0; half /= 2) {
    if (threadIdx.y < half) {
      SENDVAE_UNROLL
      for (int i = 0; i < kNum; ++i) shared[i][thread] += shared[i][thread + half * blockDim.x];
    }
    __syncthreads();
  }
  SENDVAE_UNROLL
  for (int i = 0; i < kNum; ++i) values[i] = shared[i][threadIdx.x];
  __syncthreads();
}

// [rows, columns] threads to go through a group: columns for its channels, rows for the chunks.
dim3 group_threads(const Tiling& tiling) {
  uint32_t columns = 1;
  while (columns < tiling.group_channels && columns < kWarp) columns *= 2;
  return {columns, join_threads(static_cast<int64_t>(tiling.chunks) * columns) / columns};
}

// A block for each sample and group: the sample's parts of dbias and dweight, sums [B, 2, C], and the GroupGrad.
__global__ void __launch_bounds__(kJoinThreads)
    join_parameter_grads_kernel(GroupNormShape shape, Tiling tiling, const float* rstds, const float* weight,
                                const float* parts, float* sums, GroupGrad* group_grads) {
  const int64_t sample = blockIdx.x / shape.groups, width = tiling.group_channels;
  const int64_t first_channel = blockIdx.x % shape.groups * width;
  const float rstd = rstds[blockIdx.x];
  ParameterGrads weighted{};
  for (int64_t begin = first_channel; begin < first_channel + width; begin += blockDim.x) {
    const int64_t channel = begin + threadIdx.x;
    const bool has_channel = channel < first_channel + width;
    ParameterGrads of_thread{};
    if (has_channel) of_thread = sum_of_chunks(shape, tiling, parts, sample, channel, threadIdx.y, blockDim.y);
    float pair[2] = {of_thread.bias, of_thread.weight};
    sum_rows(pair);
    if (threadIdx.y > 0 || !has_channel) continue;
    write_channel(shape, sample, channel, {pair[0], pair[1] * rstd}, weight, sums, weighted);
  }
  // Only the first row of threads has something, and is in the first warp.
  const uint32_t thread = threadIdx.y * blockDim.x + threadIdx.x;
  if (thread < kWarp) write_group_grad(shape, tiling, weighted, rstd, thread, group_grads + blockIdx.x);
}

template <typename T, bool kSilu, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2)
    input_grad_kernel(GroupNormSiluBackwardArgs<T> args, Tiling tiling, const GroupGrad* group_grads) {
  // Last tile first: what was read last may still be in the L2 cache.
  const Place<kVectorWidth<T>> place(args.shape, tiling, gridDim.x - 1 - blockIdx.x);
  write_input_grads<kSilu, kAligned>(args, tiling, place, group_grads);
}

// ---- A small map: one launch, and what is read again comes from a cache ----

template <typename T, bool kSilu, bool kAligned>
__global__ void __launch_bounds__(kWholeThreads, 1)
    whole_backward_kernel(GroupNormSiluBackwardArgs<T> args, Tiling tiling, float* parts, float* sums,
                          GroupGrad* group_grads) {
  const GroupNormShape& shape = args.shape;
  const Place<kVectorWidth<T>> place(shape, tiling, blockIdx.x);
  const ParameterGrads chunk = chunk_parameter_grads<kWholeThreads, kSilu, kAligned>(args, tiling, place);
  store_parts(shape, tiling, place, chunk.bias, chunk.weight, parts);
  __syncthreads();
  for_groups(shape, tiling, place, [&](int64_t first_channel, int64_t group, uint32_t lane) {
    const float rstd = args.rstd[group];
    ParameterGrads weighted{};
    for (uint32_t i = lane; i < tiling.group_channels; i += kWarp) {
      const ParameterGrads sum = sum_of_chunks(shape, tiling, parts, place.sample, first_channel + i, 0, 1);
      write_channel(shape, place.sample, first_channel + i, {sum.bias, sum.weight * rstd}, args.weight, sums, weighted);
    }
    write_group_grad(shape, tiling, weighted, rstd, lane, group_grads + group);
  });
  __syncthreads();
  write_input_grads<kSilu, kAligned>(args, tiling, place, group_grads);
}

// ---- The batch ----

// dbias and dweight [C] from the samples' sums [B, 2, C].
__global__ void __launch_bounds__(kJoinThreads)
    batch_sum_kernel(GroupNormShape shape, const float* sums, float* grad_bias, float* grad_weight) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t columns = 2 * shape.channels;
  float sum[1] = {};
  if (column < columns) {
    for (int64_t sample = threadIdx.y; sample < shape.batch; sample += blockDim.y) {
      sum[0] += sums[sample * columns + column];
    }
  }
  sum_rows(sum);
  if (threadIdx.y != 0 || column >= columns) return;
  if (column < shape.channels) {
    grad_bias[column] = sum[0];
  } else {
    grad_weight[column - shape.channels] = sum[0];
  }
}

// ---- Launches ----

// Writes grad_x, and the samples' parts of dbias and dweight into sums [B, 2, C].
template <typename T, bool kSilu, bool kAligned>
void launch_backward(const GroupNormSiluBackwardArgs<T>& args, const Tensor& s, float* sums) {
  constexpr int kWidth = kVectorWidth<T>;
  const GroupNormShape& shape = args.shape;
  const char* op = GroupNormSiluBackward::kName;
  const std::optional<Tiling> whole = whole_tiling(op, shape, kWidth);
  const Tiling tiling = whole ? *whole : wide_tiling(op, shape, kWidth);
  const dim3 blocks(checked_blocks(op, shape.batch * tiling.sample_blocks), tiling.column_tiles);
  const dim3 threads = tiling.block(kWidth);
  const Tensor parts_tensor = new_floats(s, shape.batch * tiling.chunks * 2 * shape.channels);
  const Tensor group_grads_tensor = new_floats(s, shape.batch * shape.groups * 2);
  float* parts = mutable_data<float>(parts_tensor);
  GroupGrad* group_grads = mutable_data<GroupGrad>(group_grads_tensor);
  const cudaStream_t stream = current_stream(s);
  if (whole) {
    whole_backward_kernel<T, kSilu, kAligned><<<blocks, threads, 0, stream>>>(args, tiling, parts, sums, group_grads);
    return check_launch(op);
  }
  const uint32_t groups = checked_blocks(op, shape.batch * shape.groups);
  const dim3 join = group_threads(tiling);
  parameter_grads_kernel<T, kSilu, kAligned><<<blocks, threads, 0, stream>>>(args, tiling, parts);
  check_launch(op);
  join_parameter_grads_kernel<<<groups, join, 0, stream>>>(shape, tiling, args.rstd, args.weight, parts, sums,
                                                           group_grads);
  check_launch(op);
  input_grad_kernel<T, kSilu, kAligned><<<blocks, threads, 0, stream>>>(args, tiling, group_grads);
  check_launch(op);
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward_cuda(const Tensor& grad_y,
                                                                 const std::optional<Tensor>& grad_s, const Tensor& s,
                                                                 const Tensor& stats, const Tensor& weight,
                                                                 const Tensor& bias, int64_t num_groups, bool silu) {
  const torch::stable::accelerator::DeviceGuard guard(s.get_device_index());
  const GroupNormSiluBackward call(grad_y, grad_s, s, stats, weight, bias, num_groups);
  const GroupNormShape& shape = call.shape;
  const Tensor sums = new_floats(s, shape.batch * 2 * shape.channels);
  dispatch_float(s.scalar_type(), [&](auto type) {
    using T = decltype(type);
    if (shape.batch == 0) return;
    const GroupNormSiluBackwardArgs<T> args = call.args<T>();
    // A null grad_s counts as aligned.
    const bool aligned = is_vector_aligned(args.grad_y, shape.channels) &&
                         is_vector_aligned(args.grad_s, shape.channels) && is_vector_aligned(args.s, shape.channels) &&
                         is_vector_aligned(args.grad_x, shape.channels);
    dispatch_flags(silu, aligned, [&](auto with_silu, auto is_aligned) {
      launch_backward<T, with_silu.value, is_aligned.value>(args, s, mutable_data<float>(sums));
    });
  });
  const dim3 threads(kWarp, kJoinThreads / kWarp);
  const uint32_t blocks = checked_blocks(call.kName, (2 * shape.channels + kWarp - 1) / kWarp);
  batch_sum_kernel<<<blocks, threads, 0, current_stream(s)>>>(
      shape, data<float>(sums), mutable_data<float>(call.grad_bias), mutable_data<float>(call.grad_weight));
  check_launch(call.kName);
  return call.outputs();
}

}  // namespace
}  // namespace sendvae

STABLE_TORCH_LIBRARY_IMPL(sendvae, CUDA, library) {
  library.impl("group_norm_silu_backward", TORCH_BOX(&sendvae::group_norm_silu_backward_cuda));
}
