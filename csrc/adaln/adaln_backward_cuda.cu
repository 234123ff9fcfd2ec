// adaln backward on CUDA: a block takes a chunk of tokens of one sample, and its threads own columns. So the modulation
// and the sums over the chunk stay in registers; a second kernel adds up the chunks. Tokens that are too wide for that,
// or whose vectors are not whole, are read twice. Every sum has a fixed order.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "adaln_cuda.cuh"

namespace sendvae {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr int64_t kMaxChunkTokens = 128, kMinChunkTokens = 4;
constexpr int64_t kMultiprocessors = 132;  // of an H200; on others the choice of chunks is a little worse

// The tokens that a block takes.
struct Chunk {
  int64_t sample, begin, end;
};

template <typename Args>
__device__ __forceinline__ Chunk block_chunk(const Args& args) {
  const uint32_t chunks = static_cast<uint32_t>(args.chunks);
  const int64_t sample = blockIdx.x / chunks, begin = blockIdx.x % chunks * args.chunk_tokens;
  const int64_t end = begin + args.chunk_tokens;
  return {sample, begin, end < args.tokens ? end : args.tokens};
}

// Where a thread's first columns of a token are.
template <typename T>
struct TokenPointers {
  const T *grad_y, *s, *grad_s, *branch;

  template <typename M>
  __device__ TokenPointers(const AdalnBackwardArgs<T, M>& args, int64_t sample, int64_t token, int64_t column)
      : grad_y(args.grad_y.at(sample, token) + column), s(args.s.at(sample, token) + column),
        grad_s(args.grad_s.at(sample, token) + column), branch(args.branch.at(sample, token) + column) {}

  template <typename M>
  __device__ void advance(const AdalnBackwardArgs<T, M>& args) {
    grad_y += args.grad_y.token_stride;
    s += args.s.token_stride;
    grad_s += args.grad_s.token_stride;
    branch += args.branch.token_stride;
  }
};

// One vector of everything that the gradient of a token is made of.
template <typename T>
struct GradInputs {
  Vector<T> grad_y, s, grad_s, branch;
};

// 0 from `count` elements on and for what is absent, so that nothing there adds to a sum.
template <bool kWhole, typename T, typename M>
__device__ __forceinline__ GradInputs<T> load_inputs(const AdalnBackwardArgs<T, M>& args, const TokenPointers<T>& from,
                                                     int64_t offset, int64_t count) {
  return {read<kWhole>(from.grad_y + offset, count), read<kWhole>(from.s + offset, count),
          read<kWhole>(from.grad_s + offset, args.has_grad_s ? count : 0),
          read<kWhole>(from.branch + offset, args.has_branch ? count : 0)};
}

// The modulation of a thread's columns, and the sums over the tokens that it has seen.
template <int kWidth>
struct ColumnState {
  float scale_plus_one[kWidth], gate[kWidth];
  float shift_sum[kWidth], scale_sum[kWidth], gate_sum[kWidth];
};

template <bool kWhole, int kWidth, typename T, typename M>
__device__ __forceinline__ void start_columns(const AdalnBackwardArgs<T, M>& args, int64_t sample, int64_t column,
                                              ColumnState<kWidth>& state) {
  state = {};
  load<kWhole>(args.scale.at(sample) + column, args.width - column, state.scale_plus_one);
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) state.scale_plus_one[i] += 1.0f;
  load<kWhole>(args.gate.at(sample) + column, args.has_branch ? args.width - column : 0, state.gate);
}

// The sums over D of g and g d of a token, with the deviations d = s - mean in place of h = d rstd.
struct GradSums {
  float g, gd;
};

template <typename T>
__device__ __forceinline__ void add_grad_sums(const GradInputs<T>& in, float mean,
                                              const float (&scale_plus_one)[kVectorWidth<T>], GradSums& sums) {
  float upstream[kVectorWidth<T>], s[kVectorWidth<T>];
  unpack(in.grad_y.values, upstream);
  unpack(in.s.values, s);
  SENDVAE_UNROLL
  for (int i = 0; i < kVectorWidth<T>; ++i) {
    const float g = upstream[i] * scale_plus_one[i];
    sums.g += g;
    sums.gd += g * (s[i] - mean);
  }
}

// The means of g and g h, the second times rstd: so `layer_norm_grad` takes d in place of h.
template <typename Args>
__device__ __forceinline__ LayerNormGradMeans grad_means(GradSums sums, float rstd, const Args& args) {
  return {sums.g * args.mean_factor, sums.gd * (rstd * rstd * args.inverse_width)};
}

// Writes the gradients of a token's vector and adds its part to the sums over tokens.
template <bool kWhole, typename T, typename M>
__device__ __forceinline__ void finish_vector(const AdalnBackwardArgs<T, M>& args, const GradInputs<T>& in,
                                              LayerNormStats stats, LayerNormGradMeans means, int64_t offset,
                                              int64_t count, ColumnState<kVectorWidth<T>>& state) {
  constexpr int kWidth = kVectorWidth<T>;
  float upstream[kWidth], s[kWidth], grad_s[kWidth], branch[kWidth], grad_branch[kWidth];
  unpack(in.grad_y.values, upstream);
  unpack(in.s.values, s);
  unpack(in.grad_s.values, grad_s);
  unpack(in.branch.values, branch);
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    const float deviation = s[i] - stats.mean;
    grad_s[i] += layer_norm_grad(upstream[i] * state.scale_plus_one[i], deviation, means, stats.rstd);
    grad_branch[i] = grad_s[i] * state.gate[i];
    state.shift_sum[i] += upstream[i];
    state.scale_sum[i] += upstream[i] * (deviation * stats.rstd);
    state.gate_sum[i] += grad_s[i] * branch[i];
  }
  store<kWhole>(args.grad_x + offset, count, grad_s);
  store<kWhole>(args.grad_branch + offset, args.has_branch ? count : 0, grad_branch);
}

template <bool kWhole, int kWidth, typename T, typename M>
__device__ __forceinline__ void store_partials(const AdalnBackwardArgs<T, M>& args, int64_t column,
                                               const ColumnState<kWidth>& state) {
  const int64_t count = args.width - column;
  float* partials = args.partials + static_cast<int64_t>(blockIdx.x) * kPartials * args.width + column;
  store<kWhole>(partials + kShiftPartial * args.width, count, state.shift_sum);
  store<kWhole>(partials + kScalePartial * args.width, count, state.scale_sum);
  store<kWhole>(partials + kGatePartial * args.width, args.has_branch ? count : 0, state.gate_sum);
}

// The sums over a block of every thread's `sums`, which become those of all.
template <int kTokens>
__device__ __forceinline__ void block_sums(GradSums (&sums)[kTokens], float (&shared)[kMaxWarps * 2 * kTokens]) {
  constexpr int kValues = 2 * kTokens;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  float values[kValues];
  memcpy(values, sums, sizeof values);
  const float of_warp = warp_sums(values);
  if (lane % (kWarp / kValues) == 0) shared[warp * kValues + lane / (kWarp / kValues)] = of_warp;
  __syncthreads();
  float sum = shared[lane % (kMaxWarps * kValues)];
  SENDVAE_UNROLL
  for (int offset = kMaxWarps * kValues / 2; offset >= kValues; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  }
  SENDVAE_UNROLL
  for (int i = 0; i < kValues; ++i) values[i] = __shfl_sync(0xffffffffu, sum, i);
  memcpy(sums, values, sizeof values);
}

// The block covers the width with kVectors vectors a thread, all of them whole, and takes kTokens tokens at a time: all
// their loads are under way at once. The usual widths have one vector, and at most 128 registers a thread.
template <typename T, typename M, int kVectors>
__global__ void __launch_bounds__(kMaxThreads, kVectors == 1 ? 2 : 1) backward_kernel(AdalnBackwardArgs<T, M> args) {
  constexpr int kWidth = kVectorWidth<T>;
  constexpr int kTokens = kVectors == 1 ? 2 : 1;
  // Two, so that a warp may write the next sums while another still reads these. Those of absent warps stay 0.
  __shared__ float shared_sums[2][kMaxWarps * 2 * kTokens];
  const Chunk chunk = block_chunk(args);
  const int column_step = blockDim.x * kWidth, first_column = threadIdx.x * kWidth;
  const int first_count = static_cast<int>(args.width) - first_column;
  if (threadIdx.x < kMaxWarps * 2 * kTokens) {
    shared_sums[0][threadIdx.x] = shared_sums[1][threadIdx.x] = 0.0f;
  }
  __syncthreads();

  ColumnState<kWidth> state[kVectors];
  SENDVAE_UNROLL
  for (int i = 0; i < kVectors; ++i) start_columns<true>(args, chunk.sample, first_column + i * column_step, state[i]);
  TokenPointers<T> from(args, chunk.sample, chunk.begin, first_column);
  int64_t row = chunk.sample * args.tokens + chunk.begin;
  int left = static_cast<int>(chunk.end - chunk.begin);
  for (int buffer = 0; left > 0; left -= kTokens, buffer ^= 1) {
    GradInputs<T> in[kTokens][kVectors];
    LayerNormStats stats[kTokens];
    SENDVAE_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      stats[t] = t < left ? args.stats[row + t] : LayerNormStats{};  // of an absent token everything is 0
      SENDVAE_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        in[t][i] = load_inputs<true>(args, from, i * column_step, t < left ? first_count - i * column_step : 0);
      }
      from.advance(args);
    }
    GradSums sums[kTokens] = {};
    SENDVAE_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      SENDVAE_UNROLL
      for (int i = 0; i < kVectors; ++i) add_grad_sums(in[t][i], stats[t].mean, state[i].scale_plus_one, sums[t]);
    }
    block_sums(sums, shared_sums[buffer]);
    SENDVAE_UNROLL
    for (int t = 0; t < kTokens; ++t, ++row) {
      if (t >= left) break;
      const LayerNormGradMeans means = grad_means(sums[t], stats[t].rstd, args);
      SENDVAE_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        keep_packed(in[t][i].grad_y);  // converted to fp32 anew: keeping the numbers takes twice the registers
        keep_packed(in[t][i].s);
        const int column = i * column_step;
        finish_vector<true>(args, in[t][i], stats[t], means, row * args.width + first_column + column,
                            first_count - column, state[i]);
      }
    }
  }
  SENDVAE_UNROLL
  for (int i = 0; i < kVectors; ++i) store_partials<true>(args, first_column + i * column_step, state[i]);
}

// The same for any width and alignment: first the sums over D of the chunk's tokens, a warp per token, then the columns
// of all its tokens. As many threads as can be.
template <typename T, typename M, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads, 1) wide_backward_kernel(AdalnBackwardArgs<T, M> args) {
  constexpr int kWidth = kVectorWidth<T>;
  __shared__ LayerNormGradMeans means[kMaxChunkTokens];
  const Chunk chunk = block_chunk(args);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const LayerNormStats* stats = args.stats + chunk.sample * args.tokens;
  for (int64_t token = chunk.begin + warp; token < chunk.end; token += kMaxWarps) {
    const TokenPointers<T> from(args, chunk.sample, token, 0);
    GradSums sums = {};
    for (int64_t column = lane * kWidth; column < args.width; column += kWarp * kWidth) {
      ColumnState<kWidth> state;
      start_columns<kWhole>(args, chunk.sample, column, state);
      add_grad_sums(load_inputs<kWhole>(args, from, column, args.width - column), stats[token].mean,
                    state.scale_plus_one, sums);
    }
    sums = {warp_sum(sums.g), warp_sum(sums.gd)};
    if (lane == 0) means[token - chunk.begin] = grad_means(sums, stats[token].rstd, args);
  }
  __syncthreads();
  for (int64_t column = threadIdx.x * kWidth; column < args.width; column += kMaxThreads * kWidth) {
    const int64_t count = args.width - column;
    ColumnState<kWidth> state;
    start_columns<kWhole>(args, chunk.sample, column, state);
    TokenPointers<T> from(args, chunk.sample, chunk.begin, column);
    for (int64_t token = chunk.begin; token < chunk.end; ++token, from.advance(args)) {
      const int64_t offset = (chunk.sample * args.tokens + token) * args.width + column;
      finish_vector<kWhole>(args, load_inputs<kWhole>(args, from, 0, count), stats[token], means[token - chunk.begin],
                            offset, count, state);
    }
    store_partials<kWhole>(args, column, state);
  }
}

// A thread adds up the chunks of one element of one of the modulation's gradients; a block stays within one row.
// Vectors would leave too few threads to wait for memory together.
template <typename T, typename M>
__global__ void __launch_bounds__(kMaxThreads)
    sum_chunks_kernel(AdalnBackwardArgs<T, M> args, uint32_t blocks_per_row) {
  const uint32_t row = blockIdx.x / blocks_per_row, gradients = args.has_branch ? 3 : 2;
  const int64_t column = static_cast<int64_t>(blockIdx.x % blocks_per_row) * kMaxThreads + threadIdx.x;
  if (column >= args.width) return;
  const int64_t sample = row / gradients;
  const int which = static_cast<int>(row % gradients);
  const float* partial = args.partials + (sample * args.chunks * kPartials + which) * args.width + column;
  const int64_t step = kPartials * args.width;
  float sum = 0.0f;
  for (int64_t chunk = 0; chunk < args.chunks; ++chunk, partial += step) sum += *partial;
  M* out = which == kShiftPartial ? args.grad_shift : which == kScalePartial ? args.grad_scale : args.grad_gate;
  out[sample * args.width + column] = from_float<M>(sum);
}

// How `backward_kernel` takes tokens of a width.
struct BlockShape {
  int64_t vectors;  // a thread
  int64_t threads;
};

BlockShape block_shape(int64_t width, int64_t vector_width) {
  const int64_t block_width = kMaxThreads * vector_width;  // columns of a full block with one vector a thread
  const int64_t vectors = width <= block_width ? 1 : width <= 2 * block_width ? 2 : kMaxRegisterWidth / block_width;
  const int64_t warp_width = kWarp * vector_width * vectors;
  return {vectors, std::min<int64_t>((width + warp_width - 1) / warp_width * kWarp, kMaxThreads)};
}

// Tokens of a chunk. A chunk takes the time of a few tokens besides, for its partial sums; at the end, while the last
// blocks run out, about half a chunk's time is lost. This depends on sizes alone, and so does the order of every sum.
int64_t chunk_tokens_for(int64_t batch, int64_t tokens, const BlockShape& shape) {
  constexpr int64_t kOverhead = 4;  // tokens
  const int64_t resident_threads = kMaxThreads * (shape.vectors == 1 ? 2 : 1);  // as the kernel's bounds have it
  const int64_t resident_blocks = kMultiprocessors * (resident_threads / shape.threads);
  int64_t best = kMaxChunkTokens, best_cost = INT64_MAX;
  for (int64_t chunk_tokens = kMinChunkTokens; chunk_tokens <= kMaxChunkTokens; chunk_tokens += 2) {
    const int64_t blocks = batch * ((tokens + chunk_tokens - 1) / chunk_tokens);
    const int64_t cost = (2 * blocks + resident_blocks) * (chunk_tokens + kOverhead);
    if (cost < best_cost) {
      best = chunk_tokens;
      best_cost = cost;
    }
  }
  return best;
}

template <typename T, typename M>
void launch_backward(const AdalnBackwardArgs<T, M>& args, cudaStream_t stream) {
  if (args.batch == 0) return;
  const int64_t width = args.width;
  const bool whole = is_whole(args.grad_y, width) && is_whole(args.grad_s, width) && is_whole(args.s, width) &&
                     is_whole(args.branch, width) && is_whole(args.gate, width) && is_whole(args.scale, width) &&
                     is_whole(args.grad_x, width, width) && is_whole(args.grad_branch, width, width);
  const bool in_registers = whole && width <= kMaxRegisterWidth;
  constexpr int kMostVectors = kMaxRegisterWidth / (kMaxThreads * kVectorWidth<T>);
  const BlockShape shape = block_shape(width, kVectorWidth<T>);
  const auto kernel = !whole               ? wide_backward_kernel<T, M, false>
                      : !in_registers      ? wide_backward_kernel<T, M, true>
                      : shape.vectors == 1 ? backward_kernel<T, M, 1>
                      : shape.vectors == 2 ? backward_kernel<T, M, 2>
                                           : backward_kernel<T, M, kMostVectors>;
  const uint32_t threads = static_cast<uint32_t>(in_registers ? shape.threads : kMaxThreads);
  const uint32_t blocks = blocks_for(AdalnBackward::kName, args.batch * args.chunks, 1);
  kernel<<<blocks, threads, 0, stream>>>(args);
  check_launch(AdalnBackward::kName);
  const int64_t blocks_per_row = (width + kMaxThreads - 1) / kMaxThreads;
  const uint32_t sum_blocks =
      blocks_for(AdalnBackward::kName, args.batch * (args.has_branch ? 3 : 2) * blocks_per_row, 1);
  sum_chunks_kernel<<<sum_blocks, kMaxThreads, 0, stream>>>(args, static_cast<uint32_t>(blocks_per_row));
  check_launch(AdalnBackward::kName);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adaln_backward_cuda(
    const Tensor& grad_y, const std::optional<Tensor>& grad_s, const Tensor& s, const std::optional<Tensor>& branch,
    const std::optional<Tensor>& gate, const Tensor& scale, const Tensor& stats, bool rms) {
  const torch::stable::accelerator::DeviceGuard guard(s.get_device_index());
  const int64_t vector_width = 16 / s.element_size();
  const int64_t chunk_tokens = s.dim() == 3 && s.size(2) > 0
                                   ? chunk_tokens_for(s.size(0), s.size(1), block_shape(s.size(2), vector_width))
                                   : kMaxChunkTokens;
  const AdalnBackward call(grad_y, grad_s, s, branch, gate, scale, stats, rms, chunk_tokens);
  dispatch_tokens_and_modulation(s.scalar_type(), scale.scalar_type(), [&](auto token_type, auto modulation_type) {
    launch_backward(call.args<decltype(token_type), decltype(modulation_type)>(), current_stream(s));
  });
  return call.outputs();
}

}  // namespace
}  // namespace sendvae

STABLE_TORCH_LIBRARY_IMPL(sendvae, CUDA, library) {
  library.impl("adaln_backward", TORCH_BOX(&sendvae::adaln_backward_cuda));
}
