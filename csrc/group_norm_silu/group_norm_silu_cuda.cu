// group_norm_silu on CUDA. A block takes a tile: some pixels of one sample, all or some of the channels. Forward is
// three launches: the channels' moments in each tile; the groups' mean and rstd from them; the outputs. Backward is
// four: the tiles' parts of dbias and dweight; the groups' means of weight dz and weight dz xhat from them; the input's
// gradient; dbias and dweight over the batch. Maps are read twice and written once. A large batch and a large single
// map both make many tiles. Every sum has a fixed order, so results repeat bit for bit.
#include "group_norm_silu.h"

#include <algorithm>
#include <type_traits>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "tiles.cuh"

namespace sendvae {
namespace {

// ---- Forward ----

// Turns the thread's rows of x into those of s, and writes them.
template <bool kAligned, typename T>
__device__ __forceinline__ void add_residual(const GroupNormSiluArgs<T>& args, const Place<kVectorWidth<T>>& place,
                                             Packed (&x)[kRows]) {
  SENDVAE_UNROLL
  for (int first = 0; first < kRows; first += kResidualBatch) {
    Packed residual[kResidualBatch];
    load_rows<kAligned>(args.residual, args.shape, place, first, residual);
    SENDVAE_UNROLL
    for (int row = 0; row < kResidualBatch; ++row) {
      if (!place.has(first + row)) continue;
      float values[kVectorWidth<T>], others[kVectorWidth<T>];
      unpack<T>(x[first + row], values);
      unpack<T>(residual[row], others);
      SENDVAE_UNROLL
      for (int i = 0; i < kVectorWidth<T>; ++i) values[i] += others[i];
      x[first + row] = pack<T>(values);
      store_packed<kAligned>(args.s + place.element(args.shape, first + row), place.count, x[first + row]);
    }
  }
}

// moments [B, chunks, 2, C]: the channels' means in each chunk, and their sums of squares around them. Forms s.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 3)
    moments_kernel(GroupNormSiluArgs<T> args, Tiling tiling, float* moments) {
  constexpr int kWidth = kVectorWidth<T>;
  const Place<kWidth> place(args.shape, tiling, blockIdx.x);
  Packed x[kRows];
  load_rows<kAligned>(args.x, args.shape, place, 0, x);
  if (args.residual) add_residual<kAligned>(args, place, x);
  float values[kWidth], centres[kWidth] = {}, errors[kWidth] = {}, squares[kWidth] = {};
  SENDVAE_UNROLL
  for (int row = 0; row < kRows; ++row) {
    if (!place.has(row)) continue;
    unpack<T>(x[row], values);
    SENDVAE_UNROLL
    for (int i = 0; i < kWidth; ++i) centres[i] += values[i];
  }
  sum_rows(centres);
  const float pixels = static_cast<float>(place.pixels);
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) centres[i] /= pixels;
  SENDVAE_UNROLL
  for (int row = 0; row < kRows; ++row) {
    if (!place.has(row)) continue;
    unpack<T>(x[row], values);
    SENDVAE_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      const float distance = values[i] - centres[i];
      errors[i] += distance;
      squares[i] += distance * distance;
    }
  }
  // What rounding took from the centres: of a large mean, more than of the distances.
  sum_rows(errors);
  sum_rows(squares);
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    squares[i] -= errors[i] * errors[i] / pixels;
    centres[i] += errors[i] / pixels;
  }
  store_parts(args.shape, tiling, place, centres, squares, moments);
}

// A block for each sample and group: mean and rstd from the moments of its channels in all chunks.
template <typename T>
__global__ void __launch_bounds__(kJoinThreads)
    join_moments_kernel(GroupNormSiluArgs<T> args, Tiling tiling, const float* moments) {
  const GroupNormShape& shape = args.shape;
  const int64_t sample = blockIdx.x / shape.groups, width = shape.channels_per_group();
  const int64_t first_channel = blockIdx.x % shape.groups * width;
  const float* first = moments + sample * tiling.chunks * 2 * shape.channels + first_channel;
  const float count = static_cast<float>(shape.pixels * width);
  const float base = *first;  // sums of distances from a value near the mean lose nothing to a large mean
  float distance = 0.0f;
  for (int64_t chunk = threadIdx.y; chunk < tiling.chunks; chunk += blockDim.y) {
    const float* means = first + chunk * 2 * shape.channels;
    const float pixels = static_cast<float>(pixels_in(shape, tiling, chunk));
    for (int64_t i = threadIdx.x; i < width; i += blockDim.x) distance += pixels * (means[i] - base);
  }
  const float mean = base + sum_threads(distance) / count;
  float squares = 0.0f;
  for (int64_t chunk = threadIdx.y; chunk < tiling.chunks; chunk += blockDim.y) {
    const float* means = first + chunk * 2 * shape.channels;
    const float pixels = static_cast<float>(pixels_in(shape, tiling, chunk));
    for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
      squares += means[shape.channels + i] + pixels * (means[i] - mean) * (means[i] - mean);
    }
  }
  const float variance = sum_threads(squares) / count;
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    args.mean[blockIdx.x] = mean;
    args.rstd[blockIdx.x] = rstd_of(variance, args.eps);
  }
}

template <typename T, bool kSilu, bool kAligned>
__global__ void __launch_bounds__(kThreads, 3) output_kernel(GroupNormSiluArgs<T> args, Tiling tiling) {
  constexpr int kWidth = kVectorWidth<T>;
  // Last tile first: what was read last may still be in the L2 cache.
  const Place<kWidth> place(args.shape, tiling, gridDim.x - 1 - blockIdx.x);
  const T* map = args.residual ? args.s : args.x;
  Normalisation normalisation[kWidth];
  load_normalisation(args, place, normalisation);
#pragma unroll 1
  for (int first = 0; first < kRows; first += kBatch) {
    Packed x[kBatch];
    load_rows<kAligned>(map, args.shape, place, first, x);
    SENDVAE_UNROLL
    for (int row = 0; row < kBatch; ++row) {
      if (!place.has(first + row)) continue;
      float values[kWidth];
      unpack<T>(x[row], values);
      SENDVAE_UNROLL
      for (int i = 0; i < kWidth; ++i) values[i] = group_norm_silu<kSilu>(values[i], normalisation[i]);
      store_packed<kAligned>(args.y + place.element(args.shape, first + row), place.count, pack<T>(values));
    }
  }
}

// ---- Backward ----

// parts [B, chunks, 2, C]: of dbias and of dweight / rstd.
template <typename T, bool kSilu, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2)
    parameter_grads_kernel(GroupNormSiluBackwardArgs<T> args, Tiling tiling, float* parts) {
  constexpr int kWidth = kVectorWidth<T>;
  const Place<kWidth> place(args.shape, tiling, blockIdx.x);
  Normalisation normalisation[kWidth];
  load_normalisation(args, place, normalisation);
  float bias_sums[kWidth] = {}, weight_sums[kWidth] = {};
#pragma unroll 1
  for (int first = 0; first < kRows; first += kBatch) {
    Packed x[kBatch], grad_y[kBatch];
    load_rows<kAligned>(args.s, args.shape, place, first, x);
    load_rows<kAligned>(args.grad_y, args.shape, place, first, grad_y);
    SENDVAE_UNROLL
    for (int row = 0; row < kBatch; ++row) {
      if (!place.has(first + row)) continue;
      float values[kWidth], grads[kWidth];
      unpack<T>(x[row], values);
      unpack<T>(grad_y[row], grads);
      SENDVAE_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        const float grad_z = pre_activation_grad<kSilu>(grads[i], values[i], normalisation[i]);
        bias_sums[i] += grad_z;
        weight_sums[i] += grad_z * (values[i] - normalisation[i].mean);
      }
    }
  }
  sum_rows(bias_sums);
  sum_rows(weight_sums);
  store_parts(args.shape, tiling, place, bias_sums, weight_sums, parts);
}

// A block for each sample and group: the sample's parts of dbias and dweight, sums [B, 2, C], and the GroupGrad.
__global__ void __launch_bounds__(kJoinThreads)
    join_parameter_grads_kernel(GroupNormShape shape, Tiling tiling, const float* rstds, const float* weight,
                                const float* parts, float* sums, GroupGrad* group_grads) {
  const int64_t sample = blockIdx.x / shape.groups, width = shape.channels_per_group();
  const int64_t first_channel = blockIdx.x % shape.groups * width;
  const float rstd = rstds[blockIdx.x];
  float group_sum = 0.0f, group_sum_xhat = 0.0f;
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
      group_sum += weight[channel] * pair[0];
      group_sum_xhat += weight[channel] * pair[1];
    }
  }
  const float count = static_cast<float>(shape.pixels * width);
  const float mean = sum_threads(group_sum) / count, mean_xhat = sum_threads(group_sum_xhat) / count;
  if (threadIdx.x == 0 && threadIdx.y == 0) group_grads[blockIdx.x] = group_grad(mean, mean_xhat, rstd);
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

template <typename T, bool kSilu, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2)
    input_grad_kernel(GroupNormSiluBackwardArgs<T> args, Tiling tiling, const GroupGrad* group_grads) {
  constexpr int kWidth = kVectorWidth<T>;
  // Last tile first: what was read last may still be in the L2 cache.
  const Place<kWidth> place(args.shape, tiling, gridDim.x - 1 - blockIdx.x);
  Normalisation normalisation[kWidth];
  load_normalisation(args, place, normalisation);
  GroupGrad group[kWidth];
  GroupCursor cursor(place.channel, args.shape);
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    if (i < place.count) group[i] = group_grads[place.sample * args.shape.groups + cursor.group];
    cursor.advance();
  }
#pragma unroll 1
  for (int first = 0; first < kRows; first += kBatch) {
    Packed x[kBatch], grad_y[kBatch], grad_s[kBatch] = {};  // all bits zero: the number zero
    load_rows<kAligned>(args.s, args.shape, place, first, x);
    load_rows<kAligned>(args.grad_y, args.shape, place, first, grad_y);
    if (args.grad_s) load_rows<kAligned>(args.grad_s, args.shape, place, first, grad_s);
    SENDVAE_UNROLL
    for (int row = 0; row < kBatch; ++row) {
      if (!place.has(first + row)) continue;
      float values[kWidth], grads[kWidth], others[kWidth];
      unpack<T>(x[row], values);
      unpack<T>(grad_y[row], grads);
      unpack<T>(grad_s[row], others);
      SENDVAE_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        const float grad_z = pre_activation_grad<kSilu>(grads[i], values[i], normalisation[i]);
        grads[i] = input_grad(grad_z, values[i], normalisation[i], group[i]) + others[i];
      }
      store_packed<kAligned>(args.grad_x + place.element(args.shape, first + row), place.count, pack<T>(grads));
    }
  }
}

// ---- Launches ----

uint32_t checked_blocks(const char* op, int64_t blocks) {
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), op, ": too large for one launch: ", blocks, " blocks");
  return static_cast<uint32_t>(blocks);
}

Tiling tiling_for(const char* op, const GroupNormShape& shape, int vector_width) {
  const int64_t vectors = (shape.channels + vector_width - 1) / vector_width;
  Tiling tiling;
  tiling.columns = static_cast<uint32_t>(std::min<int64_t>(vectors, kMaxColumns));
  tiling.rows = kThreads / tiling.columns;
  tiling.column_tiles = checked_blocks(op, (vectors + tiling.columns - 1) / tiling.columns);
  tiling.chunks = checked_blocks(op, (shape.pixels + tiling.chunk_pixels() - 1) / tiling.chunk_pixels());
  tiling.blocks = checked_blocks(op, shape.batch * tiling.chunks * tiling.column_tiles);
  return tiling;
}

// [rows, columns] threads to go through a group: columns for its channels, rows for the chunks.
dim3 join_threads(int64_t channels_per_group) {
  uint32_t columns = 1;
  while (columns < channels_per_group && columns < kWarp) columns *= 2;
  return {columns, kJoinThreads / columns};
}

Tensor workspace(const Tensor& like, int64_t size) { return torch::stable::new_empty(like, {size}, ScalarType::Float); }

template <typename T, bool kSilu, bool kAligned>
void launch_forward(const GroupNormSiluArgs<T>& args, const Tensor& x) {
  const GroupNormShape& shape = args.shape;
  const char* op = GroupNormSilu::kName;
  const Tiling tiling = tiling_for(op, shape, kVectorWidth<T>);
  const uint32_t groups = checked_blocks(op, shape.batch * shape.groups);
  const Tensor moments = workspace(x, shape.batch * tiling.chunks * 2 * shape.channels);
  const dim3 threads(tiling.columns, tiling.rows), join = join_threads(shape.channels_per_group());
  const cudaStream_t stream = current_stream(x);
  moments_kernel<T, kAligned><<<tiling.blocks, threads, 0, stream>>>(args, tiling, mutable_data<float>(moments));
  check_launch(op);
  join_moments_kernel<T><<<groups, join, 0, stream>>>(args, tiling, data<float>(moments));
  check_launch(op);
  output_kernel<T, kSilu, kAligned><<<tiling.blocks, threads, 0, stream>>>(args, tiling);
  check_launch(op);
}

// Writes grad_x, and the samples' parts of dbias and dweight into sums [B, 2, C].
template <typename T, bool kSilu, bool kAligned>
void launch_backward(const GroupNormSiluBackwardArgs<T>& args, const Tensor& s, float* sums) {
  const GroupNormShape& shape = args.shape;
  const char* op = GroupNormSiluBackward::kName;
  const Tiling tiling = tiling_for(op, shape, kVectorWidth<T>);
  const uint32_t groups = checked_blocks(op, shape.batch * shape.groups);
  const Tensor parts = workspace(s, shape.batch * tiling.chunks * 2 * shape.channels);
  const Tensor group_grads = workspace(s, shape.batch * shape.groups * 2);
  const dim3 threads(tiling.columns, tiling.rows), join = join_threads(shape.channels_per_group());
  const cudaStream_t stream = current_stream(s);
  parameter_grads_kernel<T, kSilu, kAligned>
      <<<tiling.blocks, threads, 0, stream>>>(args, tiling, mutable_data<float>(parts));
  check_launch(op);
  join_parameter_grads_kernel<<<groups, join, 0, stream>>>(shape, tiling, args.rstd, args.weight, data<float>(parts),
                                                           sums, mutable_data<GroupGrad>(group_grads));
  check_launch(op);
  input_grad_kernel<T, kSilu, kAligned>
      <<<tiling.blocks, threads, 0, stream>>>(args, tiling, data<GroupGrad>(group_grads));
  check_launch(op);
}

// Calls function(kSilu, kAligned) with two integral constants.
template <typename Function>
void dispatch_flags(bool silu, bool aligned, const Function& function) {
  const auto with_silu = [&](auto silu_constant) {
    aligned ? function(silu_constant, std::true_type{}) : function(silu_constant, std::false_type{});
  };
  silu ? with_silu(std::true_type{}) : with_silu(std::false_type{});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_silu_cuda(const Tensor& x, const std::optional<Tensor>& residual,
                                                                const Tensor& weight, const Tensor& bias,
                                                                int64_t num_groups, double eps, bool silu) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const GroupNormSilu call(x, residual, weight, bias, num_groups, eps);
  if (call.shape.batch == 0) return call.outputs();
  dispatch_float(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const GroupNormSiluArgs<T> args = call.args<T>();
    const int64_t channels = args.shape.channels;
    // A null residual, and the s that comes with it, count as aligned.
    const bool aligned = is_vector_aligned(args.x, channels) && is_vector_aligned(args.residual, channels) &&
                         is_vector_aligned(args.y, channels) && is_vector_aligned(args.s, channels);
    dispatch_flags(silu, aligned, [&](auto with_silu, auto is_aligned) {
      launch_forward<T, with_silu.value, is_aligned.value>(args, x);
    });
  });
  return call.outputs();
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
  library.impl("group_norm_silu", TORCH_BOX(&sendvae::group_norm_silu_cuda));
  library.impl("group_norm_silu_backward", TORCH_BOX(&sendvae::group_norm_silu_backward_cuda));
}
