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
constexpr int64_t kMaxChunkTokens = 32, kMinChunkTokens = 4;
constexpr int64_t kEnoughBlocks = 1024;  // several for each multiprocessor of an H200

// The tokens that a block takes.
struct Chunk {
  int64_t sample, begin, end;
};

template <typename Args>
__device__ __forceinline__ Chunk block_chunk(const Args& args) {
  const int64_t sample = blockIdx.x / args.chunks, begin = blockIdx.x % args.chunks * args.chunk_tokens;
  const int64_t end = begin + args.chunk_tokens;
  return {sample, begin, end < args.tokens ? end : args.tokens};
}

// One vector of everything that the gradient of a token is made of.
template <typename T>
struct GradInputs {
  Vector<T> grad_y, s, grad_s, branch;
};

// Has the compiler convert the vector to fp32 anew where it is used next, in place of keeping twice the registers.
template <typename T>
__device__ __forceinline__ void keep_packed(Vector<T>& vector) {
  uint4 bits;
  memcpy(&bits, &vector, sizeof bits);
  asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w));
  memcpy(&vector, &bits, sizeof bits);
}

// 0 from `count` elements on, so that nothing there adds to a sum.
template <bool kWhole, typename T, typename M>
__device__ __forceinline__ GradInputs<T> load_inputs(const AdalnBackwardArgs<T, M>& args, int64_t sample, int64_t token,
                                                     int64_t column, int64_t count) {
  GradInputs<T> in = {};
  in.grad_y = read<kWhole>(args.grad_y.at(sample, token) + column, count);
  in.s = read<kWhole>(args.s.at(sample, token) + column, count);
  if (args.has_grad_s) in.grad_s = read<kWhole>(args.grad_s.at(sample, token) + column, count);
  if (args.has_branch) in.branch = read<kWhole>(args.branch.at(sample, token) + column, count);
  return in;
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
  if (args.has_branch) load<kWhole>(args.gate.at(sample) + column, args.width - column, state.gate);
}

// Adds a token's part to its two sums over D.
template <typename T>
__device__ __forceinline__ void add_grad_sums(const GradInputs<T>& in, LayerNormStats stats,
                                              const float (&scale_plus_one)[kVectorWidth<T>],
                                              LayerNormGradMeans& sums) {
  SENDVAE_UNROLL
  for (int i = 0; i < kVectorWidth<T>; ++i) {
    const float g = to_float(in.grad_y.values[i]) * scale_plus_one[i];
    sums.g += g;
    sums.gh += g * normalised(to_float(in.s.values[i]), stats);
  }
}

// Writes the gradients of a token's vector and adds its part to the sums over tokens.
template <bool kWhole, typename T, typename M>
__device__ __forceinline__ void finish_vector(const AdalnBackwardArgs<T, M>& args, const GradInputs<T>& in,
                                              LayerNormStats stats, LayerNormGradMeans means, int64_t row,
                                              int64_t column, ColumnState<kVectorWidth<T>>& state) {
  constexpr int kWidth = kVectorWidth<T>;
  float grad_x[kWidth], grad_branch[kWidth];
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    const float upstream = to_float(in.grad_y.values[i]);
    const float h = normalised(to_float(in.s.values[i]), stats);
    grad_x[i] =
        to_float(in.grad_s.values[i]) + layer_norm_grad(upstream * state.scale_plus_one[i], h, means, stats.rstd);
    grad_branch[i] = grad_x[i] * state.gate[i];
    state.shift_sum[i] += upstream;
    state.scale_sum[i] += upstream * h;
    state.gate_sum[i] += grad_x[i] * to_float(in.branch.values[i]);
  }
  const int64_t offset = row * args.width + column, count = args.width - column;
  store<kWhole>(args.grad_x + offset, count, grad_x);
  if (args.has_branch) store<kWhole>(args.grad_branch + offset, count, grad_branch);
}

template <bool kWhole, int kWidth, typename T, typename M>
__device__ __forceinline__ void store_partials(const AdalnBackwardArgs<T, M>& args, int64_t column,
                                               const ColumnState<kWidth>& state) {
  const int64_t count = args.width - column;
  float* partials = args.partials + static_cast<int64_t>(blockIdx.x) * kPartials * args.width + column;
  store<kWhole>(partials + kShiftPartial * args.width, count, state.shift_sum);
  store<kWhole>(partials + kScalePartial * args.width, count, state.scale_sum);
  if (args.has_branch) store<kWhole>(partials + kGatePartial * args.width, count, state.gate_sum);
}

// The block covers the width with kVectors vectors a thread, all of them whole, and takes kTokens tokens at a time: all
// their loads are under way at once. The usual widths have one vector, and at most 128 registers a thread.
template <typename T, typename M, int kVectors>
__global__ void __launch_bounds__(kMaxThreads, kVectors == 1 ? 2 : 1) backward_kernel(AdalnBackwardArgs<T, M> args) {
  constexpr int kWidth = kVectorWidth<T>;
  constexpr int kTokens = kVectors == 1 ? 2 : 1;
  // Two, so that a warp may write the next sums while another still reads these.
  __shared__ LayerNormGradMeans warp_sums[2][kTokens][kMaxWarps];
  const Chunk chunk = block_chunk(args);
  const int warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp;
  const float width = static_cast<float>(args.width);
  const int first_column = threadIdx.x * kWidth, column_step = blockDim.x * kWidth;

  ColumnState<kWidth> state[kVectors];
  SENDVAE_UNROLL
  for (int i = 0; i < kVectors; ++i) start_columns<true>(args, chunk.sample, first_column + i * column_step, state[i]);
  int buffer = 0;
  for (int64_t first = chunk.begin; first < chunk.end; first += kTokens, buffer ^= 1) {
    GradInputs<T> in[kTokens][kVectors];
    LayerNormStats stats[kTokens];
    SENDVAE_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const bool inside = first + t < chunk.end;  // else everything of it is 0
      stats[t] = inside ? args.stats[chunk.sample * args.tokens + first + t] : LayerNormStats{};
      SENDVAE_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        const int64_t column = first_column + i * column_step, count = inside ? args.width - column : 0;
        in[t][i] = load_inputs<true>(args, chunk.sample, first + t, column, count);
      }
    }
    SENDVAE_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      LayerNormGradMeans sums = {};
      SENDVAE_UNROLL
      for (int i = 0; i < kVectors; ++i) add_grad_sums(in[t][i], stats[t], state[i].scale_plus_one, sums);
      sums = {warp_sum(sums.g), warp_sum(sums.gh)};
      if (threadIdx.x % kWarp == 0) warp_sums[buffer][t][warp] = sums;
    }
    __syncthreads();
    SENDVAE_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      if (first + t >= chunk.end) break;
      LayerNormGradMeans means = {};
      for (int i = 0; i < num_warps; ++i) {
        means.g += warp_sums[buffer][t][i].g;
        means.gh += warp_sums[buffer][t][i].gh;
      }
      means = {means.g / width, means.gh / width};
      const int64_t row = chunk.sample * args.tokens + first + t;
      SENDVAE_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        keep_packed(in[t][i].grad_y);
        keep_packed(in[t][i].s);
        finish_vector<true>(args, in[t][i], stats[t], means, row, first_column + i * column_step, state[i]);
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
  const float width = static_cast<float>(args.width);
  const LayerNormStats* stats = args.stats + chunk.sample * args.tokens;
  for (int64_t token = chunk.begin + warp; token < chunk.end; token += kMaxWarps) {
    LayerNormGradMeans sums = {};
    for (int64_t column = lane * kWidth; column < args.width; column += kWarp * kWidth) {
      ColumnState<kWidth> state;
      start_columns<kWhole>(args, chunk.sample, column, state);
      const GradInputs<T> in = load_inputs<kWhole>(args, chunk.sample, token, column, args.width - column);
      add_grad_sums(in, stats[token], state.scale_plus_one, sums);
    }
    sums = {warp_sum(sums.g), warp_sum(sums.gh)};
    if (lane == 0) means[token - chunk.begin] = {sums.g / width, sums.gh / width};
  }
  __syncthreads();
  for (int64_t column = threadIdx.x * kWidth; column < args.width; column += kMaxThreads * kWidth) {
    ColumnState<kWidth> state;
    start_columns<kWhole>(args, chunk.sample, column, state);
    for (int64_t token = chunk.begin; token < chunk.end; ++token) {
      const GradInputs<T> in = load_inputs<kWhole>(args, chunk.sample, token, column, args.width - column);
      const int64_t row = chunk.sample * args.tokens + token;
      finish_vector<kWhole>(args, in, stats[token], means[token - chunk.begin], row, column, state);
    }
    store_partials<kWhole>(args, column, state);
  }
}

// A thread adds up the chunks of one element of one of the modulation's gradients.
template <typename T, typename M>
__global__ void __launch_bounds__(kMaxThreads) sum_chunks_kernel(AdalnBackwardArgs<T, M> args) {
  const int64_t elements = args.batch * args.width;  // of one gradient
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kMaxThreads + threadIdx.x;
  if (index >= elements * (args.has_branch ? 3 : 2)) return;
  const int which = static_cast<int>(index / elements);
  const int64_t element = index % elements;
  const int64_t sample = element / args.width, column = element % args.width;
  const float* partial = args.partials + (sample * args.chunks * kPartials + which) * args.width + column;
  float sum = 0.0f;
  for (int64_t chunk = 0; chunk < args.chunks; ++chunk) sum += partial[chunk * kPartials * args.width];
  M* out = which == kShiftPartial ? args.grad_shift : which == kScalePartial ? args.grad_scale : args.grad_gate;
  out[element] = from_float<M>(sum);
}

// Long chunks make few partial sums, short ones many blocks.
int64_t chunk_tokens_for(int64_t batch, int64_t tokens) {
  int64_t chunk_tokens = kMaxChunkTokens;
  while (chunk_tokens > kMinChunkTokens && batch * ((tokens + chunk_tokens - 1) / chunk_tokens) < kEnoughBlocks) {
    chunk_tokens /= 2;
  }
  return chunk_tokens;
}

template <typename T, typename M>
void launch_backward(const AdalnBackwardArgs<T, M>& args, cudaStream_t stream) {
  if (args.batch == 0) return;
  const int64_t width = args.width;
  const bool whole = is_whole(args.grad_y, width) && is_whole(args.grad_s, width) && is_whole(args.s, width) &&
                     is_whole(args.branch, width) && is_whole(args.gate, width) && is_whole(args.scale, width) &&
                     is_whole(args.grad_x, width, width) && is_whole(args.grad_branch, width, width);
  const bool in_registers = whole && width <= kMaxRegisterWidth;
  constexpr int kBlockWidth = kMaxThreads * kVectorWidth<T>;  // columns of a full block with one vector a thread
  constexpr int kMostVectors = kMaxRegisterWidth / kBlockWidth;
  const int vectors = width <= kBlockWidth ? 1 : width <= 2 * kBlockWidth ? 2 : kMostVectors;
  const auto kernel = !whole          ? wide_backward_kernel<T, M, false>
                      : !in_registers ? wide_backward_kernel<T, M, true>
                      : vectors == 1  ? backward_kernel<T, M, 1>
                      : vectors == 2  ? backward_kernel<T, M, 2>
                                      : backward_kernel<T, M, kMostVectors>;
  const int64_t warp_width = int64_t{kWarp} * kVectorWidth<T> * vectors;
  const int64_t threads = in_registers ? (width + warp_width - 1) / warp_width * kWarp : kMaxThreads;
  const uint32_t blocks = blocks_for(AdalnBackward::kName, args.batch * args.chunks, 1);
  kernel<<<blocks, static_cast<uint32_t>(threads), 0, stream>>>(args);
  check_launch(AdalnBackward::kName);
  const int64_t sums = args.batch * width * (args.has_branch ? 3 : 2);
  sum_chunks_kernel<<<blocks_for(AdalnBackward::kName, sums, kMaxThreads), kMaxThreads, 0, stream>>>(args);
  check_launch(AdalnBackward::kName);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adaln_backward_cuda(
    const Tensor& grad_y, const std::optional<Tensor>& grad_s, const Tensor& s, const std::optional<Tensor>& branch,
    const std::optional<Tensor>& gate, const Tensor& scale, const Tensor& stats) {
  const torch::stable::accelerator::DeviceGuard guard(s.get_device_index());
  const int64_t chunk_tokens = s.dim() == 3 ? chunk_tokens_for(s.size(0), s.size(1)) : kMaxChunkTokens;
  const AdalnBackward call(grad_y, grad_s, s, branch, gate, scale, stats, chunk_tokens);
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
