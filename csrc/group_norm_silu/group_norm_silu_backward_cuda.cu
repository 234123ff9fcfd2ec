// group_norm_silu's backward on CUDA, in four launches: the chunks' parts of dbias and dweight; the groups' means of
// weight dz and weight dz xhat from them; the input's gradient; dbias and dweight over the batch. Maps are read twice
// and the gradient is written once. Every sum has a fixed order, so results repeat bit for bit.
#include "group_norm_silu.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "tiles.cuh"

namespace sendvae {
namespace {

// parts [B, chunks, 2, C]: of dbias and of dweight / rstd.
template <typename T, bool kSilu, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2)
    parameter_grads_kernel(GroupNormSiluBackwardArgs<T> args, Tiling tiling, float* parts) {
  constexpr int kWidth = kVectorWidth<T>;
  constexpr int kNum = kBatch<kAligned>;
  const Place<kWidth> place(args.shape, tiling, blockIdx.x);
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
  exchange(sums);
  float bias_part = 0.0f, weight_part = 0.0f;
  SENDVAE_UNROLL
  for (int row = 0; row < kWidth; ++row) {
    bias_part += sums[0][row];
    weight_part += sums[1][row];
  }
  store_parts(args.shape, tiling, place, bias_part, weight_part, parts);
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

// A block for each sample and group: the sample's parts of dbias and dweight, sums [B, 2, C], and the GroupGrad.
__global__ void __launch_bounds__(kJoinThreads)
    join_parameter_grads_kernel(GroupNormShape shape, Tiling tiling, const float* rstds, const float* weight,
                                const float* parts, float* sums, GroupGrad* group_grads) {
  const int64_t sample = blockIdx.x / shape.groups, width = shape.channels_per_group();
  const int64_t first_channel = blockIdx.x % shape.groups * width;
  const float rstd = rstds[blockIdx.x];
  float group_sums[2] = {};
  for (int64_t begin = first_channel; begin < first_channel + width; begin += blockDim.x) {
    const int64_t channel = begin + threadIdx.x;
    const bool has_channel = channel < first_channel + width;
    float pair[2] = {};
    if (has_channel) {
      for (int64_t chunk = threadIdx.y; chunk < tiling.chunks; chunk += blockDim.y) {
        const float* part = parts + (sample * tiling.chunks + chunk) * 2 * shape.channels + channel;
        pair[0] += part[0];
        pair[1] += part[shape.channels];
      }
    }
    sum_rows(pair);
    if (threadIdx.y == 0 && has_channel) {
      pair[1] *= rstd;
      sums[sample * 2 * shape.channels + channel] = pair[0];
      sums[(sample * 2 + 1) * shape.channels + channel] = pair[1];
      group_sums[0] += weight[channel] * pair[0];
      group_sums[1] += weight[channel] * pair[1];
    }
  }
  // Only the first row of threads has something, which is in the first warp.
  if (threadIdx.y * blockDim.x + threadIdx.x >= kWarp) return;
  const float sum = warp_sum(group_sums[0]), sum_xhat = warp_sum(group_sums[1]);
  if (threadIdx.x > 0 || threadIdx.y > 0) return;
  const float count = static_cast<float>(shape.pixels * width);
  group_grads[blockIdx.x] = group_grad(sum / count, sum_xhat / count, rstd);
}

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

// What the gradients of a channel's inputs have in common.
struct ChannelGrad {
  Normalisation normalisation;
  GroupGrad group;
};

template <typename T, bool kSilu, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2)
    input_grad_kernel(GroupNormSiluBackwardArgs<T> args, Tiling tiling, const GroupGrad* group_grads) {
  constexpr int kWidth = kVectorWidth<T>;
  constexpr int kNum = kBatch<kAligned>;
  // Last tile first: what was read last may still be in the L2 cache.
  const Place<kWidth> place(args.shape, tiling, gridDim.x - 1 - blockIdx.x);
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

// Writes grad_x, and the samples' parts of dbias and dweight into sums [B, 2, C].
template <typename T, bool kSilu, bool kAligned>
void launch_backward(const GroupNormSiluBackwardArgs<T>& args, const Tensor& s, float* sums) {
  constexpr int kWidth = kVectorWidth<T>;
  const GroupNormShape& shape = args.shape;
  const char* op = GroupNormSiluBackward::kName;
  const Tiling tiling = tiling_for(op, shape, kWidth, kThreadPixels);
  const dim3 blocks(checked_blocks(op, shape.batch * tiling.sample_blocks), tiling.column_tiles);
  const dim3 threads = tiling.block(kWidth);
  const uint32_t groups = checked_blocks(op, shape.batch * shape.groups);
  const dim3 join = join_threads(shape, tiling);
  const Tensor parts = workspace(s, shape.batch * tiling.chunks * 2 * shape.channels);
  const Tensor group_grads = workspace(s, shape.batch * shape.groups * 2);
  const cudaStream_t stream = current_stream(s);
  parameter_grads_kernel<T, kSilu, kAligned><<<blocks, threads, 0, stream>>>(args, tiling, mutable_data<float>(parts));
  check_launch(op);
  join_parameter_grads_kernel<<<groups, join, 0, stream>>>(shape, tiling, args.rstd, args.weight, data<float>(parts),
                                                           sums, mutable_data<GroupGrad>(group_grads));
  check_launch(op);
  input_grad_kernel<T, kSilu, kAligned><<<blocks, threads, 0, stream>>>(args, tiling, data<GroupGrad>(group_grads));
  check_launch(op);
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward_cuda(const Tensor& grad_y,
                                                                 const std::optional<Tensor>& grad_s, const Tensor& s,
                                                                 const Tensor& mean, const Tensor& rstd,
                                                                 const Tensor& weight, const Tensor& bias,
                                                                 int64_t num_groups, bool silu) {
  const torch::stable::accelerator::DeviceGuard guard(s.get_device_index());
  const GroupNormSiluBackward call(grad_y, grad_s, s, mean, rstd, weight, bias, num_groups);
  const GroupNormShape& shape = call.shape;
  const Tensor sums = workspace(s, shape.batch * 2 * shape.channels);
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
