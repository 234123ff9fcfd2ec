// Every schema of the namespace `sendvae`. The implementations are beside their ops: *_cpu.cpp in this library,
// *_cuda.cu in the CUDA library, which is loaded after this one. The arguments are those of the Python functions in
// sendvae_fast/ops/<op>.py; what is said here is what these add or leave out.
//
// Shape letters: B batch, C channels, H W height and width, N tokens, D width, M rows, G groups, S side of a crop.
// Inputs may have any strides: halves of `moments.chunk(2, dim=1)`, rows of a wider matrix and gradients expanded from
// one number are read in place, other layouts are copied first. Outputs are contiguous unless it says otherwise. [0] is
// an empty tensor in place of one that was not asked for.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sendvae, library) {
  // s is [0] without branch; stats fp32 [B, N, 2] = (mean, rstd).
  library.def(
      "adaln(Tensor x, Tensor? branch, Tensor? gate, Tensor shift, Tensor scale, float eps, bool rms) "
      "-> (Tensor y, Tensor s, Tensor stats)");
  // s is x without branch, and grad_branch and grad_gate are [0] then; no grad_s counts as 0.
  library.def(
      "adaln_backward(Tensor grad_y, Tensor? grad_s, Tensor s, Tensor? branch, Tensor? gate, Tensor scale, "
      "Tensor stats, bool rms) "
      "-> (Tensor grad_x, Tensor grad_branch, Tensor grad_gate, Tensor grad_shift, Tensor grad_scale)");
  // z and velocity are [0] where they are not needed.
  library.def(
      "noise_inject(Tensor mean, Tensor spread, Tensor latent_mean, Tensor latent_std, Tensor key, Tensor sample_ids, "
      "Tensor? t, bool spread_is_std, int? patch_size, bool need_z, bool need_velocity) "
      "-> (Tensor z, Tensor z_t, Tensor velocity, Tensor t)");
  library.def(
      "noise_inject_backward(Tensor grad_z, Tensor grad_z_t, Tensor grad_velocity, Tensor spread, Tensor latent_std, "
      "Tensor key, Tensor sample_ids, Tensor t, bool spread_is_std, int? patch_size) "
      "-> (Tensor grad_mean, Tensor grad_spread)");
  // features and target [M, D], of one dtype; distance fp32 [M], with mean [], that of all rows (NaN of none); stats
  // fp32 [M, 3] = (dot, |features|, |target|).
  library.def(
      "cosine_align(Tensor features, Tensor target, float eps, float? margin, bool mean) "
      "-> (Tensor distance, Tensor stats)");
  // grad [M], or [] of the mean; grad_target is [0] unless need_target.
  library.def(
      "cosine_align_backward(Tensor grad, Tensor features, Tensor target, Tensor stats, float eps, float? margin, "
      "bool need_target) -> (Tensor grad_features, Tensor grad_target)");
  // f0 and f1 [B, C, H, W], of one dtype; distance fp32 [B]; stats fp32 [B, 4, H W] = (|f0|, |f1|,
  // <w (u0 - u1), u0>, <w (u1 - u0), u1>).
  library.def("lpips_distance(Tensor f0, Tensor f1, Tensor weight) -> (Tensor distance, Tensor stats)");
  // A gradient is [0] where it is not needed; channels-last if f0 and f1 are.
  library.def(
      "lpips_distance_backward(Tensor grad, Tensor f0, Tensor f1, Tensor weight, Tensor stats, bool need_grad0, "
      "bool need_grad1) -> (Tensor grad0, Tensor grad1)");
  library.def(
      "sde_step(Tensor x, Tensor velocity, Tensor times, Tensor key, Tensor sample_ids, float? guidance_scale, "
      "bool last) -> (Tensor x_next, Tensor network_input)");
  // pixels of dtype uint8 are [B, 3, S, S] contiguous, others channels-last; normalised is [0] without mean and std.
  library.def(
      "center_crop(Tensor[] images, int size, bool[] flips, ScalarType dtype, Tensor? mean, Tensor? std) "
      "-> (Tensor pixels, Tensor normalised)");
  // y and s are channels-last, s is [0] without a residual; weight and bias fp32 [C]; stats fp32 [2, B, G]: means,
  // then rstds.
  library.def(
      "group_norm_silu(Tensor x, Tensor? residual, Tensor weight, Tensor bias, int num_groups, float eps, bool silu) "
      "-> (Tensor y, Tensor s, Tensor stats)");
  // s is what was normalised. grad_x, channels-last, is the residual's gradient too; the others are fp32 [C].
  library.def(
      "group_norm_silu_backward(Tensor grad_y, Tensor? grad_s, Tensor s, Tensor stats, Tensor weight, Tensor bias, "
      "int num_groups, bool silu) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  library.def("global_norm(Tensor[] tensors) -> Tensor");
  // Lists of contiguous tensors; ema is empty for none.
  library.def(
      "adamw_ema(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor(d!)[] ema, "
      "Tensor(e!)[] steps, Tensor? grad_norm, float lr, float beta1, float beta2, float eps, float weight_decay, "
      "float ema_decay, float max_grad_norm) -> ()");
}
