// Every schema of the namespace `sendvae`. The implementations are beside their ops: *_cpu.cpp in this library,
// *_cuda.cu in the CUDA library, which is loaded after this one. docs/design.md explains the arguments.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sendvae, library) {
  library.def(
      "adaln(Tensor x, Tensor? branch, Tensor? gate, Tensor shift, Tensor scale, float eps) "
      "-> (Tensor y, Tensor s, Tensor stats)");
  library.def(
      "adaln_backward(Tensor grad_y, Tensor? grad_s, Tensor s, Tensor? branch, Tensor? gate, Tensor scale, "
      "Tensor stats) -> (Tensor grad_x, Tensor grad_branch, Tensor grad_gate, Tensor grad_shift, Tensor grad_scale)");
  library.def(
      "noise_inject(Tensor mean, Tensor spread, Tensor latent_mean, Tensor latent_std, Tensor key, Tensor sample_ids, "
      "Tensor? t, bool spread_is_std, int? patch_size) -> (Tensor z, Tensor z_t, Tensor velocity, Tensor t)");
  library.def(
      "noise_inject_backward(Tensor grad_z, Tensor grad_z_t, Tensor grad_velocity, Tensor spread, Tensor latent_std, "
      "Tensor key, Tensor sample_ids, Tensor t, bool spread_is_std, int? patch_size) "
      "-> (Tensor grad_mean, Tensor grad_spread)");
  library.def(
      "cosine_align(Tensor features, Tensor target, float eps, float? margin) -> (Tensor distance, Tensor stats)");
  library.def(
      "cosine_align_backward(Tensor grad, Tensor features, Tensor target, Tensor stats, float eps, float? margin, "
      "bool need_target) -> (Tensor grad_features, Tensor grad_target)");
  library.def("lpips_distance(Tensor f0, Tensor f1, Tensor weight) -> (Tensor distance, Tensor stats)");
  library.def(
      "lpips_distance_backward(Tensor grad, Tensor f0, Tensor f1, Tensor weight, Tensor stats, bool need_grad0, "
      "bool need_grad1) -> (Tensor grad0, Tensor grad1)");
  library.def(
      "sde_step(Tensor x, Tensor velocity, Tensor times, Tensor key, Tensor sample_ids, float? guidance_scale, "
      "bool last) -> (Tensor x_next, Tensor network_input)");
  library.def(
      "center_crop(Tensor[] images, int size, bool[] flips, ScalarType dtype, Tensor? mean, Tensor? std) "
      "-> (Tensor pixels, Tensor normalised)");
  library.def(
      "group_norm_silu(Tensor x, Tensor? residual, Tensor weight, Tensor bias, int num_groups, float eps, bool silu) "
      "-> (Tensor y, Tensor s, Tensor mean, Tensor rstd)");
  library.def(
      "group_norm_silu_backward(Tensor grad_y, Tensor? grad_s, Tensor s, Tensor mean, Tensor rstd, Tensor weight, "
      "Tensor bias, int num_groups, bool silu) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  library.def("global_norm(Tensor[] tensors) -> Tensor");
  library.def(
      "adamw_ema(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor(d!)[] ema, "
      "Tensor(e!)[] steps, Tensor? grad_norm, float lr, float beta1, float beta2, float eps, float weight_decay, "
      "float ema_decay, float max_grad_norm) -> ()");
}
