// cosine_align: 1 - cos(features, target) per row, without normalised copies of the rows.
//
//   a = max(|f|, eps);  b = max(|y|, eps);  distance = 1 - f.y / (a b), or max(0, 1 - margin - f.y / (a b))
//   d distance / d f = -y / (a b) + [|f| > eps] f.y / (a b) f / |f|^2      and the same for y
//
// The sums are fp32. A norm under eps counts as the constant eps, in the gradient too. Where the margin makes the
// distance 0, so is the gradient. Where the mean over all rows is asked for, it comes in place of the distances, and
// its gradient is one number. Shapes: M rows, D width.
#pragma once

#include <cmath>
#include <optional>
#include <tuple>

#include "../common/tensor.h"

namespace sendvae {

// ---- The arithmetic of one row ----

struct RowSums {
  float dot, features, target;  // f.y, |f|^2, |y|^2
};

// The numbers that the backward needs: f.y, |f|, |y|; stored in this order.
struct RowStats {
  float dot, features_norm, target_norm;
};

SENDVAE_HD float max_norm(float norm, float eps) {
  return norm < eps ? eps : norm;  // NaN stays
}

SENDVAE_HD RowStats stats_from_sums(const RowSums& sums) {
  return {sums.dot, sqrtf(sums.features), sqrtf(sums.target)};
}

SENDVAE_HD float cosine(const RowStats& stats, float eps) {
  return stats.dot / max_norm(stats.features_norm, eps) / max_norm(stats.target_norm, eps);
}

// 1 - margin, and whether there is a margin. Without one the distance has no lower bound.
struct Margin {
  float offset;
  bool is_given;
};

inline Margin make_margin(const std::optional<double>& margin) {
  return {static_cast<float>(1.0 - margin.value_or(0.0)), margin.has_value()};
}

// Whether the margin makes a row's distance 0, from the distance before the lower bound; false for NaN.
SENDVAE_HD bool is_within_margin(float distance, const Margin& margin) { return margin.is_given && distance <= 0.0f; }

SENDVAE_HD float distance_of(const RowStats& stats, float eps, const Margin& margin) {
  const float distance = margin.offset - cosine(stats, eps);
  return is_within_margin(distance, margin) ? 0.0f : distance;
}

// The gradient of a row is scale (projection f - y) for the features and scale (projection y - f) for the target. The
// common factor stays outside the brackets: the closer the two rows, the more the terms inside cancel, and the less
// their factors may be rounded.
struct RowGradFactors {
  float scale, features_projection, target_projection;
};

SENDVAE_HD RowGradFactors grad_factors(float grad, const RowStats& stats, float eps, const Margin& margin) {
  const float f = stats.features_norm, y = stats.target_norm;
  grad = is_within_margin(margin.offset - cosine(stats, eps), margin) ? 0.0f : grad;
  return {grad / max_norm(f, eps) / max_norm(y, eps), f <= eps ? 0.0f : stats.dot / f / f,
          y <= eps ? 0.0f : stats.dot / y / y};
}

// ---- What a kernel is given ----

// A [M, D] tensor whose rows are packed and `stride` elements apart.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
};

template <typename T>
struct CosineAlignArgs {
  Rows<const T> features, target;
  float* distance;     // [M], or one number: the mean
  bool is_mean;
  RowStats* stats;     // [M]
  int64_t rows, width;
  float eps;
  Margin margin;
};

template <typename T>
struct CosineAlignBackwardArgs {
  const float* grad;            // [M], or one number: the mean's
  bool is_of_mean;
  Rows<const T> features, target;
  const RowStats* stats;        // [M]
  T* grad_features;             // [M, D], packed
  T* grad_target;               // [M, D], packed, or null: not needed
  int64_t rows, width;
  float eps;
  Margin margin;

  SENDVAE_HD RowGradFactors row_factors(int64_t row) const {
    const float row_grad = is_of_mean ? *grad / static_cast<float>(rows) : grad[row];
    return grad_factors(row_grad, stats[row], eps, margin);
  }
};

// ---- From tensors to kernel arguments ----

template <typename T>
Rows<const T> rows(const Tensor& tensor) {
  return {data<T>(tensor), tensor.stride(0)};
}

inline void check_pair(const char* op, const Tensor& features, const Tensor& target) {
  check_float_dtype(op, "features", features);
  STD_TORCH_CHECK(features.dim() == 2, op, ": features must be [M, D], got ", shape_string(features));
  check_same_device(op, "target", target, features);
  check_dtype(op, "target", target, features.scalar_type());
  check_shape(op, "target", target, {features.size(0), features.size(1)});
}

// Holds the checked inputs and fresh outputs of one forward call.
struct CosineAlign {
  static constexpr const char* kName = "cosine_align";
  Tensor features, target;
  float eps;
  Margin margin;
  bool is_mean;
  Tensor distance, stats;

  CosineAlign(const Tensor& features_, const Tensor& target_, double eps_, const std::optional<double>& margin_,
              bool mean)
      : eps(static_cast<float>(eps_)), margin(make_margin(margin_)), is_mean(mean) {
    check_pair(kName, features_, target_);
    features = inner_contiguous(features_);
    target = inner_contiguous(target_);
    const int64_t count = features_.size(0);
    distance = is_mean ? empty_on(features_, {}, ScalarType::Float) : empty_on(features_, {count}, ScalarType::Float);
    stats = empty_on(features_, {count, 3}, ScalarType::Float);
  }

  template <typename T>
  CosineAlignArgs<T> args() const {
    return {rows<T>(features),
            rows<T>(target),
            mutable_data<float>(distance),
            is_mean,
            mutable_data<RowStats>(stats),
            features.size(0),
            features.size(1),
            eps,
            margin};
  }

  std::tuple<Tensor, Tensor> outputs() const { return {distance, stats}; }
};

// Holds the checked inputs and fresh outputs of one backward call.
struct CosineAlignBackward {
  static constexpr const char* kName = "cosine_align_backward";
  Tensor grad, features, target, stats;
  float eps;
  Margin margin;
  bool is_of_mean, need_target;
  Tensor grad_features, grad_target;

  CosineAlignBackward(const Tensor& grad_, const Tensor& features_, const Tensor& target_, const Tensor& stats_,
                      double eps_, const std::optional<double>& margin_, bool need_target_)
      : eps(static_cast<float>(eps_)), margin(make_margin(margin_)), is_of_mean(grad_.dim() == 0),
        need_target(need_target_) {
    check_pair(kName, features_, target_);
    const int64_t count = features_.size(0), width = features_.size(1);
    check_same_device(kName, "grad", grad_, features_);
    check_dtype(kName, "grad", grad_, ScalarType::Float);
    if (!is_of_mean) check_shape(kName, "grad", grad_, {count});
    check_same_device(kName, "stats", stats_, features_);
    check_dtype(kName, "stats", stats_, ScalarType::Float);
    check_shape(kName, "stats", stats_, {count, 3});
    grad = packed(grad_);
    features = inner_contiguous(features_);
    target = inner_contiguous(target_);
    stats = packed(stats_);
    grad_features = empty_on(features_, {count, width}, features_.scalar_type());
    grad_target = need_target ? empty_on(target_, {count, width}, target_.scalar_type())
                              : empty_on(target_, {0}, target_.scalar_type());
  }

  template <typename T>
  CosineAlignBackwardArgs<T> args() const {
    return {data<float>(grad),
            is_of_mean,
            rows<T>(features),
            rows<T>(target),
            data<RowStats>(stats),
            mutable_data<T>(grad_features),
            need_target ? mutable_data<T>(grad_target) : nullptr,
            features.size(0),
            features.size(1),
            eps,
            margin};
  }

  std::tuple<Tensor, Tensor> outputs() const { return {grad_features, grad_target}; }
};

}  // namespace sendvae
