// sde_step: one Euler-Maruyama step of the reverse SDE from noise level t to t_next.
//
//   v = v_u + s (v_c - v_u) with guidance, else the velocity itself
//   x' = x + ((2 - t) v + x) dt + sqrt(2 t |dt|) e,   dt = t_next - t;   no noise in the last step
//
// All arithmetic has the precision of the state x, fp64 or fp32; e is fp32, Philox by (seed, step, sample id). The
// network's next input, x' rounded to its precision, comes from the same pass. Shapes: B batch, C channels, H W height
// and width.
#pragma once

#include <cmath>
#include <optional>
#include <tuple>

#include "../common/philox.h"
#include "../common/planes.h"
#include "../common/tensor.h"

namespace sendvae {

// ---- The arithmetic of one element ----

template <typename S>
struct SdeCoefficients {
  S velocity, dt, noise;
};

// In fp64 whatever the state, and rounded once.
template <typename S>
SENDVAE_HD SdeCoefficients<S> sde_coefficients(const double* times) {
  const double t = times[0], dt = times[1] - t;
  return {static_cast<S>(2.0 - t), static_cast<S>(dt), static_cast<S>(sqrt(2.0 * t * fabs(dt)))};
}

template <typename S>
SENDVAE_HD S guide(S conditional, S unconditional, S scale) {
  return unconditional + scale * (conditional - unconditional);
}

template <typename S>
SENDVAE_HD S sde_drift_step(S x, S velocity, const SdeCoefficients<S>& coefficients) {
  return x + (coefficients.velocity * velocity + x) * coefficients.dt;
}

// ---- What a kernel is given ----

template <typename S, typename T>
struct SdeStepArgs {
  const S* x;                // [B, C, H, W], packed samples
  int64_t x_stride;          // from sample to sample
  Planes<T> velocity;        // [B, C, H, W], the conditional ones where guided
  Planes<T> unconditional;   // [B, C, H, W], read only where guided
  const double* times;       // [2]: t, t_next
  const int64_t* key;        // [2]: seed, step
  const int64_t* sample_ids; // [B]
  S* x_next;                 // [B, C, H, W], packed
  T* network_input;          // [B, C, H, W], packed
  int64_t batch;
  uint32_t elements;         // C H W
  uint32_t plane;            // H W
  S scale;
  bool guided, last;
};

// ---- From tensors to kernel arguments ----

// Holds the checked inputs and fresh outputs of one call.
struct SdeStep {
  static constexpr const char* kName = "sde_step";
  Tensor x, velocity, times, key, sample_ids;
  std::optional<double> scale;
  bool last;
  Tensor x_next, network_input;

  SdeStep(const Tensor& x_, const Tensor& velocity_, const Tensor& times_, const Tensor& key_,
          const Tensor& sample_ids_, std::optional<double> scale_, bool last_)
      : scale(scale_), last(last_) {
    check_sample_shape(kName, x_);
    const ScalarType state = x_.scalar_type();
    STD_TORCH_CHECK(state == ScalarType::Double || state == ScalarType::Float, kName,
                    ": x must be Double or Float, got ", torch::headeronly::toString(state));
    const int64_t batch = x_.size(0);
    check_same_device(kName, "velocity", velocity_, x_);
    check_float_dtype(kName, "velocity", velocity_);
    check_shape(kName, "velocity", velocity_, {scale ? 2 * batch : batch, x_.size(1), x_.size(2), x_.size(3)});
    x = inner_contiguous(x_);
    velocity = plane_strided(velocity_);
    times = checked_vector(kName, "times", times_, x_, ScalarType::Double, 2);
    key = checked_vector(kName, "key", key_, x_, ScalarType::Long, 2);
    sample_ids = checked_vector(kName, "sample_ids", sample_ids_, x_, ScalarType::Long, batch);
    x_next = empty_packed(x_);
    network_input = empty_on(x_, x_.sizes(), velocity_.scalar_type());
  }

  template <typename S, typename T>
  SdeStepArgs<S, T> args() const {
    const Planes<T> conditional = planes<T>(velocity);
    Planes<T> unconditional = conditional;
    if (scale) unconditional.data += x.size(0) * unconditional.stride_b;
    return {data<S>(x),
            x.stride(0),
            conditional,
            unconditional,
            data<double>(times),
            data<int64_t>(key),
            data<int64_t>(sample_ids),
            mutable_data<S>(x_next),
            mutable_data<T>(network_input),
            x.size(0),
            static_cast<uint32_t>(x.size(1) * x.size(2) * x.size(3)),
            static_cast<uint32_t>(x.size(2) * x.size(3)),
            static_cast<S>(scale.value_or(1.0)),
            scale.has_value(),
            last};
  }

  // Calls function(args) with the arguments of this call's precisions.
  template <typename Function>
  void dispatch(const Function& function) const {
    dispatch_float(velocity.scalar_type(), [&](auto type) {
      using T = decltype(type);
      if (x.scalar_type() == ScalarType::Double) {
        function(args<double, T>());
      } else {
        function(args<float, T>());
      }
    });
  }

  std::tuple<Tensor, Tensor> outputs() const { return {x_next, network_input}; }
};

}  // namespace sendvae
