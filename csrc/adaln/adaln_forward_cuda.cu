// adaln forward on CUDA: a warp takes one token and keeps it in registers, for one read and one write of everything.
// Tokens that are too wide for that, or whose vectors are not whole, are read three times.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "adaln_cuda.cuh"

namespace sendvae {
namespace {

constexpr int kTokensPerBlock = 4;  // one warp each, of one sample
constexpr int kThreads = kWarp * kTokensPerBlock;

// The token of this warp, which may lie past the last of its sample.
struct Place {
  int64_t sample, token;
};

__device__ __forceinline__ Place find_place(uint32_t blocks_per_sample) {
  const uint32_t block = blockIdx.x % blocks_per_sample;
  return {blockIdx.x / blocks_per_sample, static_cast<int64_t>(block) * kTokensPerBlock + threadIdx.x / kWarp};
}

// x + gate branch of one vector, rounded to what is stored, as y is the norm of that.
template <bool kWhole, typename T, typename M>
__device__ __forceinline__ Vector<T> gated_sum(const Vector<T>& x, const Vector<T>& branch, const M* gate_row,
                                               int64_t count) {
  constexpr int kWidth = kVectorWidth<T>;
  float sums[kWidth], addends[kWidth], gate[kWidth];
  unpack(x.values, sums);
  unpack(branch.values, addends);
  load<kWhole>(gate_row, count, gate);
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) sums[i] += gate[i] * addends[i];
  Vector<T> s;
  pack(sums, s.values);
  return s;
}

template <typename T>
__device__ __forceinline__ void add(const Vector<T>& s, float& sum) {
  float values[kVectorWidth<T>];
  unpack(s.values, values);
  SENDVAE_UNROLL
  for (int i = 0; i < kVectorWidth<T>; ++i) sum += values[i];
}

// Adds the deviations from `center` of a vector that ends after `count` elements.
template <bool kWhole, typename T>
__device__ __forceinline__ void add_deviations(const Vector<T>& s, int64_t count, float center, float& sum,
                                               float& square_sum) {
  if (count <= 0) return;
  float values[kVectorWidth<T>];
  unpack(s.values, values);
  SENDVAE_UNROLL
  for (int i = 0; i < kVectorWidth<T>; ++i) {
    const float deviation = kWhole || i < count ? values[i] - center : 0.0f;
    sum += deviation;
    square_sum += deviation * deviation;
  }
}

// Writes y of one vector.
template <bool kWhole, typename T, typename M>
__device__ __forceinline__ void modulate(const Vector<T>& s, LayerNormStats stats, const M* shift_row,
                                         const M* scale_row, int64_t count, T* out) {
  constexpr int kWidth = kVectorWidth<T>;
  float y[kWidth], shift[kWidth], scale[kWidth];
  unpack(s.values, y);
  load<kWhole>(shift_row, count, shift);
  load<kWhole>(scale_row, count, scale);
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) y[i] = (y[i] - stats.mean) * (stats.rstd + stats.rstd * scale[i]) + shift[i];
  store<kWhole>(out, count, y);
}

// Hides the value from the compiler: who knows that its low bits are 0 makes every step's address of its own by `or`,
// in place of a constant in the instruction.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// kSteps: vectors of a lane, the last of which may lie past the end of the token. Every vector is whole.
template <typename T, typename M, int kSteps>
__global__ void __launch_bounds__(kThreads) forward_kernel(AdalnArgs<T, M> args, uint32_t blocks_per_sample) {
  constexpr int kStride = kWarp * kVectorWidth<T>;
  const auto [sample, token] = find_place(blocks_per_sample);
  if (token >= args.tokens) return;
  const int64_t row = sample * args.tokens + token;
  const int first_column = opaque(threadIdx.x % kWarp * kVectorWidth<T>);
  const int width = static_cast<int>(args.width), first_count = width - first_column;
  const int branch_count = args.has_branch ? first_count : 0;  // an absent branch is 0

  const T* x = args.x.at(sample, token) + first_column;
  const T* branch = args.branch.at(sample, token) + first_column;
  const M* gate = args.gate.at(sample) + first_column;
  T* s_out = args.s + row * width + first_column;
  Vector<T> s[kSteps], addends[kSteps];
  SENDVAE_UNROLL
  for (int step = 0; step < kSteps; ++step) {  // all of the token is on its way before the first is used
    s[step] = read<true>(x + step * kStride, first_count - step * kStride);
    addends[step] = read<true>(branch + step * kStride, branch_count - step * kStride);
  }
  SENDVAE_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    const int column = step * kStride;
    s[step] = gated_sum<true>(s[step], addends[step], gate + column, branch_count - column);
    write<true>(s_out + column, branch_count - column, s[step]);
  }

  float sum = 0.0f;
  SENDVAE_UNROLL
  for (int step = 0; step < kSteps; ++step) add(s[step], sum);
  const float center = warp_sum(sum) * args.mean_factor;
  float deviation_sum = 0.0f, square_sum = 0.0f;
  SENDVAE_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    add_deviations<true>(s[step], first_count - step * kStride, center, deviation_sum, square_sum);
  }
  const LayerNormStats stats = stats_from_deviations(center, warp_sum(deviation_sum), warp_sum(square_sum), args);
  if (threadIdx.x % kWarp == 0) args.stats[row] = stats;

  const M* shift = args.shift.at(sample) + first_column;
  const M* scale = args.scale.at(sample) + first_column;
  T* y = args.y + row * width + first_column;
  SENDVAE_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    const int column = step * kStride;
    modulate<true>(s[step], stats, shift + column, scale + column, first_count - column, y + column);
  }
}

// The same for any width and alignment: s is made anew in each of the three passes.
template <typename T, typename M, bool kWhole>
__global__ void __launch_bounds__(kThreads) wide_forward_kernel(AdalnArgs<T, M> args, uint32_t blocks_per_sample) {
  constexpr int kWidth = kVectorWidth<T>, kStride = kWarp * kWidth;
  const auto [sample, token] = find_place(blocks_per_sample);
  if (token >= args.tokens) return;
  const int64_t row = sample * args.tokens + token, first_column = threadIdx.x % kWarp * kWidth;
  const T* x = args.x.at(sample, token);
  const T* branch = args.branch.at(sample, token);
  const M* gate = args.gate.at(sample);
  const auto s_at = [&](int64_t column) {
    const int64_t count = args.width - column;
    const Vector<T> s = read<kWhole>(x + column, count);
    if (!args.has_branch) return s;
    return gated_sum<kWhole>(s, read<kWhole>(branch + column, count), gate + column, count);
  };

  float sum = 0.0f;
  for (int64_t column = first_column; column < args.width; column += kStride) add(s_at(column), sum);
  const float center = warp_sum(sum) * args.mean_factor;
  float deviation_sum = 0.0f, square_sum = 0.0f;
  for (int64_t column = first_column; column < args.width; column += kStride) {
    add_deviations<kWhole>(s_at(column), args.width - column, center, deviation_sum, square_sum);
  }
  const LayerNormStats stats = stats_from_deviations(center, warp_sum(deviation_sum), warp_sum(square_sum), args);
  if (threadIdx.x % kWarp == 0) args.stats[row] = stats;
  for (int64_t column = first_column; column < args.width; column += kStride) {
    const int64_t count = args.width - column;
    const Vector<T> s = s_at(column);
    if (args.has_branch) write<kWhole>(args.s + row * args.width + column, count, s);
    modulate<kWhole>(s, stats, args.shift.at(sample) + column, args.scale.at(sample) + column, count,
                     args.y + row * args.width + column);
  }
}

template <typename T, typename M>
void launch_forward(const AdalnArgs<T, M>& args, cudaStream_t stream) {
  if (args.batch == 0 || args.tokens == 0) return;
  const int64_t width = args.width;
  const bool whole = is_whole(args.x, width) && is_whole(args.branch, width) && is_whole(args.gate, width) &&
                     is_whole(args.shift, width) && is_whole(args.scale, width) && is_whole(args.y, width, width) &&
                     is_whole(args.s, width, width);
  constexpr int kStride = kWarp * kVectorWidth<T>;
  const auto kernel = !whole                       ? wide_forward_kernel<T, M, false>
                      : width <= 768               ? forward_kernel<T, M, 768 / kStride>
                      : width <= 1024              ? forward_kernel<T, M, 1024 / kStride>
                      : width <= 1280              ? forward_kernel<T, M, 1280 / kStride>
                      : width <= 2048              ? forward_kernel<T, M, 2048 / kStride>
                      : width <= kMaxRegisterWidth ? forward_kernel<T, M, kMaxRegisterWidth / kStride>
                                                   : wide_forward_kernel<T, M, true>;
  const int64_t blocks_per_sample = (args.tokens + kTokensPerBlock - 1) / kTokensPerBlock;
  const uint32_t blocks = blocks_for(Adaln::kName, args.batch * blocks_per_sample, 1);
  kernel<<<blocks, kThreads, 0, stream>>>(args, static_cast<uint32_t>(blocks_per_sample));
  check_launch(Adaln::kName);
}

std::tuple<Tensor, Tensor, Tensor> adaln_cuda(const Tensor& x, const std::optional<Tensor>& branch,
                                              const std::optional<Tensor>& gate, const Tensor& shift,
                                              const Tensor& scale, double eps, bool rms) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Adaln call(x, branch, gate, shift, scale, eps, rms);
  dispatch_tokens_and_modulation(x.scalar_type(), scale.scalar_type(), [&](auto token_type, auto modulation_type) {
    launch_forward(call.args<decltype(token_type), decltype(modulation_type)>(), current_stream(x));
  });
  return call.outputs();
}

}  // namespace
}  // namespace sendvae

STABLE_TORCH_LIBRARY_IMPL(sendvae, CUDA, library) { library.impl("adaln", TORCH_BOX(&sendvae::adaln_cuda)); }
