// adaln forward on CUDA: a warp takes one token and keeps it in registers, for one read and one write of everything.
// Tokens that are too wide for that, or whose vectors are not whole, are read three times.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "adaln_cuda.cuh"

namespace sendvae {
namespace {

constexpr int kTokensPerBlock = 4;  // one warp each

// The token of this warp; past the last one in the last block.
__device__ __forceinline__ int64_t warp_row() {
  return static_cast<int64_t>(blockIdx.x) * kTokensPerBlock + threadIdx.x / kWarp;
}

// s of the vector at `column`.
template <bool kWhole, typename T, typename M>
__device__ __forceinline__ void load_s(const AdalnArgs<T, M>& args, int64_t sample, int64_t token, int64_t column,
                                       float (&s)[kVectorWidth<T>]) {
  constexpr int kWidth = kVectorWidth<T>;
  const int64_t count = args.width - column;
  load<kWhole>(args.x.at(sample, token) + column, count, s);
  if (!args.has_branch) return;
  float branch[kWidth], gate[kWidth];
  load<kWhole>(args.branch.at(sample, token) + column, count, branch);
  load<kWhole>(args.gate.at(sample) + column, count, gate);
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) s[i] = gated_sum<T>(s[i], gate[i], branch[i]);
}

template <bool kWhole, typename T, typename M>
__device__ __forceinline__ void store_outputs(const AdalnArgs<T, M>& args, int64_t sample, int64_t row, int64_t column,
                                              const float (&s)[kVectorWidth<T>], LayerNormStats stats) {
  constexpr int kWidth = kVectorWidth<T>;
  const int64_t count = args.width - column;
  float shift[kWidth], scale[kWidth], y[kWidth];
  load<kWhole>(args.shift.at(sample) + column, count, shift);
  load<kWhole>(args.scale.at(sample) + column, count, scale);
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) y[i] = normalised(s[i], stats) * (1.0f + scale[i]) + shift[i];
  store<kWhole>(args.y + row * args.width + column, count, y);
  if (args.has_branch) store<kWhole>(args.s + row * args.width + column, count, s);
}

// Adds the deviations from `center` of a vector that ends after `count` elements.
template <int kWidth>
__device__ __forceinline__ void add_deviations(const float (&s)[kWidth], int64_t count, float center, float& sum,
                                               float& square_sum) {
  SENDVAE_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    const float deviation = i < count ? s[i] - center : 0.0f;
    sum += deviation;
    square_sum += deviation * deviation;
  }
}

// Blocks of a multiprocessor with 2.5 times as many registers as the `values` that a thread keeps.
constexpr int min_blocks(int values) { return 65536 * 2 / 5 / (kWarp * kTokensPerBlock * values); }

// kSteps: vectors of a lane, the last of which may lie past the end of the token. Every vector is whole.
template <typename T, typename M, int kSteps>
__global__ void __launch_bounds__(kWarp* kTokensPerBlock, min_blocks(kSteps* kVectorWidth<T>))
    forward_kernel(AdalnArgs<T, M> args) {
  constexpr int kWidth = kVectorWidth<T>;
  const int64_t row = warp_row();
  if (row >= args.batch * args.tokens) return;
  const int64_t sample = row / args.tokens, token = row % args.tokens;
  const int first_column = threadIdx.x % kWarp * kWidth;
  const float width = static_cast<float>(args.width);

  float s[kSteps][kWidth], sum = 0.0f;
  SENDVAE_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    load_s<true>(args, sample, token, first_column + step * kWarp * kWidth, s[step]);
  }
  SENDVAE_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    SENDVAE_UNROLL
    for (int i = 0; i < kWidth; ++i) sum += s[step][i];
  }
  const float center = warp_sum(sum) / width;
  float deviation_sum = 0.0f, square_sum = 0.0f;
  SENDVAE_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    const int64_t count = args.width - first_column - step * kWarp * kWidth;
    add_deviations(s[step], count, center, deviation_sum, square_sum);
  }
  const LayerNormStats stats =
      stats_from_deviations(center, warp_sum(deviation_sum), warp_sum(square_sum), width, args.eps);
  if (threadIdx.x % kWarp == 0) args.stats[row] = stats;
  SENDVAE_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    store_outputs<true>(args, sample, row, first_column + step * kWarp * kWidth, s[step], stats);
  }
}

// The same for any width and alignment: s is made anew in each of the three passes.
template <typename T, typename M, bool kWhole>
__global__ void __launch_bounds__(kWarp* kTokensPerBlock, 1) wide_forward_kernel(AdalnArgs<T, M> args) {
  constexpr int kWidth = kVectorWidth<T>;
  const int64_t row = warp_row();
  if (row >= args.batch * args.tokens) return;
  const int64_t sample = row / args.tokens, token = row % args.tokens;
  const int first_column = threadIdx.x % kWarp * kWidth;
  const float width = static_cast<float>(args.width);

  float s[kWidth], sum = 0.0f;
  for (int64_t column = first_column; column < args.width; column += kWarp * kWidth) {
    load_s<kWhole>(args, sample, token, column, s);
    SENDVAE_UNROLL
    for (int i = 0; i < kWidth; ++i) sum += s[i];
  }
  const float center = warp_sum(sum) / width;
  float deviation_sum = 0.0f, square_sum = 0.0f;
  for (int64_t column = first_column; column < args.width; column += kWarp * kWidth) {
    load_s<kWhole>(args, sample, token, column, s);
    add_deviations(s, args.width - column, center, deviation_sum, square_sum);
  }
  const LayerNormStats stats =
      stats_from_deviations(center, warp_sum(deviation_sum), warp_sum(square_sum), width, args.eps);
  if (threadIdx.x % kWarp == 0) args.stats[row] = stats;
  for (int64_t column = first_column; column < args.width; column += kWarp * kWidth) {
    load_s<kWhole>(args, sample, token, column, s);
    store_outputs<kWhole>(args, sample, row, column, s, stats);
  }
}

template <typename T, typename M>
void launch_forward(const AdalnArgs<T, M>& args, cudaStream_t stream) {
  const int64_t rows = args.batch * args.tokens;
  if (rows == 0) return;
  const int64_t width = args.width;
  const bool whole = is_whole(args.x, width) && is_whole(args.branch, width) && is_whole(args.gate, width) &&
                     is_whole(args.shift, width) && is_whole(args.scale, width) && is_whole(args.y, width, width) &&
                     is_whole(args.s, width, width);
  constexpr int kStepWidth = kWarp * kVectorWidth<T>;
  const auto kernel = !whole                       ? wide_forward_kernel<T, M, false>
                      : width <= 1024              ? forward_kernel<T, M, 1024 / kStepWidth>
                      : width <= 1536              ? forward_kernel<T, M, 1536 / kStepWidth>
                      : width <= 2048              ? forward_kernel<T, M, 2048 / kStepWidth>
                      : width <= kMaxRegisterWidth ? forward_kernel<T, M, kMaxRegisterWidth / kStepWidth>
                                                   : wide_forward_kernel<T, M, true>;
  const uint32_t blocks = blocks_for(Adaln::kName, rows, kTokensPerBlock);
  kernel<<<blocks, kWarp * kTokensPerBlock, 0, stream>>>(args);
  check_launch(Adaln::kName);
}

std::tuple<Tensor, Tensor, Tensor> adaln_cuda(const Tensor& x, const std::optional<Tensor>& branch,
                                              const std::optional<Tensor>& gate, const Tensor& shift,
                                              const Tensor& scale, double eps) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Adaln call(x, branch, gate, shift, scale, eps);
  dispatch_tokens_and_modulation(x.scalar_type(), scale.scalar_type(), [&](auto token_type, auto modulation_type) {
    launch_forward(call.args<decltype(token_type), decltype(modulation_type)>(), current_stream(x));
  });
  return call.outputs();
}

}  // namespace
}  // namespace sendvae

STABLE_TORCH_LIBRARY_IMPL(sendvae, CUDA, library) { library.impl("adaln", TORCH_BOX(&sendvae::adaln_cuda)); }
