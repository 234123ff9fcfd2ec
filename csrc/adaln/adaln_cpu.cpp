// adaln on the CPU: a token at a time, in fp32 scratch that stays in the cache between the passes over it. Forward,
// tokens are spread over threads; backward, chunks of tokens, whose sums are then added up sample by sample.
#include "adaln.h"

#include <vector>

#include <torch/csrc/stable/library.h>

#include "../common/cpu.h"

namespace sendvae {
namespace {

constexpr int64_t kGrainElements = 8192;  // elements a thread takes at least
constexpr int64_t kChunkTokens = 32;      // partial sums are then under a tenth of the memory traffic

template <typename M>
SENDVAE_CPU_CLONES void convert(const M* __restrict__ from, int64_t count, float offset, float* __restrict__ to) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]) + offset;
}

// ---- Forward ----

// The modulation of one sample in fp32, and a token's s.
struct ForwardScratch {
  std::vector<float> gate, shift, scale_plus_one, s;
  explicit ForwardScratch(int64_t width) : gate(width), shift(width), scale_plus_one(width), s(width) {}
};

template <typename T, typename M>
SENDVAE_CPU_CLONES void forward_token(const AdalnArgs<T, M>& args, ForwardScratch& scratch, int64_t sample,
                                      int64_t token) {
  const int64_t width = args.width, row = sample * args.tokens + token;
  const T* __restrict__ x = args.x.at(sample, token);
  float* __restrict__ s = scratch.s.data();
  float sum = 0.0f;
  if (args.has_branch) {
    const T* __restrict__ branch = args.branch.at(sample, token);
    const float* __restrict__ gate = scratch.gate.data();
    T* __restrict__ s_out = args.s + row * width;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) {
      s[i] = gated_sum<T>(to_float(x[i]), gate[i], to_float(branch[i]));
      s_out[i] = from_float<T>(s[i]);
      sum += s[i];
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) {
      s[i] = to_float(x[i]);
      sum += s[i];
    }
  }
  const float center = sum * args.mean_factor;
  float deviation = 0.0f, square = 0.0f;
#pragma omp simd reduction(+ : deviation, square)
  for (int64_t i = 0; i < width; ++i) {
    const float d = s[i] - center;
    deviation += d;
    square += d * d;
  }
  const LayerNormStats stats = stats_from_deviations(center, deviation, square, args);
  args.stats[row] = stats;
  const float* __restrict__ shift = scratch.shift.data();
  const float* __restrict__ scale_plus_one = scratch.scale_plus_one.data();
  T* __restrict__ y = args.y + row * width;
  for (int64_t i = 0; i < width; ++i) y[i] = from_float<T>(normalised(s[i], stats) * scale_plus_one[i] + shift[i]);
}

template <typename T, typename M>
void forward(const AdalnArgs<T, M>& args) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / args.width);
  torch::stable::parallel_for(0, args.batch * args.tokens, grain, [&](int64_t first, int64_t last) {
    ForwardScratch scratch(args.width);
    for (int64_t row = first; row < last; ++row) {
      const int64_t sample = row / args.tokens, token = row % args.tokens;
      if (row == first || token == 0) {
        convert(args.shift.at(sample), args.width, 0.0f, scratch.shift.data());
        convert(args.scale.at(sample), args.width, 1.0f, scratch.scale_plus_one.data());
        if (args.has_branch) convert(args.gate.at(sample), args.width, 0.0f, scratch.gate.data());
      }
      forward_token(args, scratch, sample, token);
    }
  });
}

// ---- Backward ----

// The modulation of one sample in fp32, a token's g and h, and what stands for the gradient of s where there is none.
template <typename T>
struct BackwardScratch {
  std::vector<float> gate, scale_plus_one, g, h;
  std::vector<T> zeros;
  explicit BackwardScratch(int64_t width) : gate(width), scale_plus_one(width), g(width), h(width), zeros(width) {}
};

// Writes the gradients of one token and adds its part to `sums`, [3, D].
template <typename T, typename M>
SENDVAE_CPU_CLONES void backward_token(const AdalnBackwardArgs<T, M>& args, BackwardScratch<T>& scratch, int64_t sample,
                                       int64_t token, float* sums) {
  const int64_t width = args.width, row = sample * args.tokens + token;
  const LayerNormStats stats = args.stats[row];
  const T* __restrict__ grad_y = args.grad_y.at(sample, token);
  const T* __restrict__ s = args.s.at(sample, token);
  const float* __restrict__ scale_plus_one = scratch.scale_plus_one.data();
  float* __restrict__ g = scratch.g.data();
  float* __restrict__ h = scratch.h.data();
  float* __restrict__ grad_shift = sums + kShiftPartial * width;
  float* __restrict__ grad_scale = sums + kScalePartial * width;
  float g_sum = 0.0f, gh_sum = 0.0f;
#pragma omp simd reduction(+ : g_sum, gh_sum)
  for (int64_t i = 0; i < width; ++i) {
    const float upstream = to_float(grad_y[i]);
    h[i] = normalised(to_float(s[i]), stats);
    g[i] = upstream * scale_plus_one[i];
    g_sum += g[i];
    gh_sum += g[i] * h[i];
    grad_shift[i] += upstream;
    grad_scale[i] += upstream * h[i];
  }
  const LayerNormGradMeans means = {g_sum * args.mean_factor, gh_sum * args.inverse_width};
  const T* __restrict__ grad_s = args.has_grad_s ? args.grad_s.at(sample, token) : scratch.zeros.data();
  T* __restrict__ grad_x = args.grad_x + row * width;
  if (args.has_branch) {
    const T* __restrict__ branch = args.branch.at(sample, token);
    const float* __restrict__ gate = scratch.gate.data();
    T* __restrict__ grad_branch = args.grad_branch + row * width;
    float* __restrict__ grad_gate = sums + kGatePartial * width;
    for (int64_t i = 0; i < width; ++i) {
      const float grad = to_float(grad_s[i]) + layer_norm_grad(g[i], h[i], means, stats.rstd);
      grad_x[i] = from_float<T>(grad);
      grad_branch[i] = from_float<T>(grad * gate[i]);
      grad_gate[i] += grad * to_float(branch[i]);
    }
  } else {
    for (int64_t i = 0; i < width; ++i) {
      grad_x[i] = from_float<T>(to_float(grad_s[i]) + layer_norm_grad(g[i], h[i], means, stats.rstd));
    }
  }
}

// Adds up the partial sums `which` of a sample, chunk by chunk, into the first chunk's, and writes them.
template <typename T, typename M>
SENDVAE_CPU_CLONES void finish(const AdalnBackwardArgs<T, M>& args, int64_t sample, int which, M* __restrict__ out) {
  const int64_t width = args.width;
  float* __restrict__ total = args.partials + (sample * args.chunks * kPartials + which) * width;
  for (int64_t chunk = 1; chunk < args.chunks; ++chunk) {
    const float* __restrict__ partial = total + chunk * kPartials * width;
    for (int64_t i = 0; i < width; ++i) total[i] += partial[i];
  }
  for (int64_t i = 0; i < width; ++i) out[sample * width + i] = from_float<M>(total[i]);
}

template <typename T, typename M>
void backward(const AdalnBackwardArgs<T, M>& args) {
  const int64_t sums_size = kPartials * args.width;
  torch::stable::parallel_for(0, args.batch * args.chunks, 1, [&](int64_t first, int64_t last) {
    BackwardScratch<T> scratch(args.width);
    for (int64_t task = first; task < last; ++task) {
      const int64_t sample = task / args.chunks, begin = task % args.chunks * args.chunk_tokens;
      convert(args.scale.at(sample), args.width, 1.0f, scratch.scale_plus_one.data());
      if (args.has_branch) convert(args.gate.at(sample), args.width, 0.0f, scratch.gate.data());
      float* sums = args.partials + task * sums_size;
      std::fill(sums, sums + sums_size, 0.0f);
      const int64_t end = std::min(args.tokens, begin + args.chunk_tokens);
      for (int64_t token = begin; token < end; ++token) backward_token(args, scratch, sample, token, sums);
    }
  });
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (args.chunks * sums_size));
  torch::stable::parallel_for(0, args.batch, grain, [&](int64_t first, int64_t last) {
    for (int64_t sample = first; sample < last; ++sample) {
      finish(args, sample, kShiftPartial, args.grad_shift);
      finish(args, sample, kScalePartial, args.grad_scale);
      if (args.has_branch) finish(args, sample, kGatePartial, args.grad_gate);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> adaln_cpu(const Tensor& x, const std::optional<Tensor>& branch,
                                             const std::optional<Tensor>& gate, const Tensor& shift,
                                             const Tensor& scale, double eps, bool rms) {
  const Adaln call(x, branch, gate, shift, scale, eps, rms);
  dispatch_tokens_and_modulation(x.scalar_type(), scale.scalar_type(), [&](auto token_type, auto modulation_type) {
    forward(call.args<decltype(token_type), decltype(modulation_type)>());
  });
  return call.outputs();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adaln_backward_cpu(
    const Tensor& grad_y, const std::optional<Tensor>& grad_s, const Tensor& s, const std::optional<Tensor>& branch,
    const std::optional<Tensor>& gate, const Tensor& scale, const Tensor& stats, bool rms) {
  const AdalnBackward call(grad_y, grad_s, s, branch, gate, scale, stats, rms, kChunkTokens);
  dispatch_tokens_and_modulation(s.scalar_type(), scale.scalar_type(), [&](auto token_type, auto modulation_type) {
    backward(call.args<decltype(token_type), decltype(modulation_type)>());
  });
  return call.outputs();
}

}  // namespace
}  // namespace sendvae

STABLE_TORCH_LIBRARY_IMPL(sendvae, CPU, library) {
  library.impl("adaln", TORCH_BOX(&sendvae::adaln_cpu));
  library.impl("adaln_backward", TORCH_BOX(&sendvae::adaln_backward_cpu));
}
