// The plan of one centre crop, made on the host: which pixels of the picture are read, and the one-axis resampling
// passes that lead from them to the crop.
//
// The protocol is ADM's: halve (box filter) while the short side is at least twice the size, bring the short side to
// the size (antialiased bicubic), cut the middle out. The arithmetic is Pillow's, so that results are bit-exact: a
// resize goes over the rows, then over the columns, each pass skipped where its axis keeps its length, with 8-bit
// pixels in between and weights in fixed point. Only what the crop needs of each pass is planned.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace sendvae {

constexpr int kFractionBits = 22;  // of a weight: 32, less 8 of a pixel, less 2 for sign and overshoot

enum class Filter { kBox, kBicubic };

// Half the filter's width, in pixels of the coarser of the two grids.
inline double filter_support(Filter filter) { return filter == Filter::kBox ? 0.5 : 2.0; }

inline double filter_weight(Filter filter, double x) {
  if (filter == Filter::kBox) return x > -0.5 && x <= 0.5 ? 1.0 : 0.0;
  // Keys' cubic convolution kernel with a = -1/2.
  const double a = -0.5, distance = std::fabs(x);
  if (distance < 1.0) return ((a + 2.0) * distance - (a + 3.0)) * distance * distance + 1.0;
  if (distance < 2.0) return (((distance - 5.0) * distance + 8.0) * distance - 4.0) * a;
  return 0.0;
}

constexpr int kMaxTaps = 9;  // that one output has, see Taps

// A run of pixels along one axis.
struct Window {
  int64_t first, count;
};

// How an axis is resampled: output i is the sum over k < count[i] of weights[i * width + k] times input first[i] + k.
//
// Under the protocol no bicubic resize shrinks an axis to less than a half, and no box one to less than a third (as 3
// to 1), so count is at most kMaxTaps.
struct Taps {
  int64_t width = 0;
  std::vector<int32_t> first, count, weights;

  bool empty() const { return first.empty(); }
};

// One pass over the picture, and the number of pixels it puts out.
struct Pass {
  bool vertical;
  int64_t rows, columns;
  Taps taps;
};

struct CropPlan {
  Window rows, columns;  // what is read of the picture
  std::vector<Pass> passes;
};

// The weights of one output, normalised, in fixed point; `exact` is scratch.
inline void append_weights(Taps& taps, Filter filter, double center, double scale, int32_t first, int32_t count,
                           std::vector<double>& exact) {
  double total = 0.0;
  for (int32_t k = 0; k < count; ++k) {
    exact[k] = filter_weight(filter, (first + k - center + 0.5) * (1.0 / scale));
    total += exact[k];
  }
  taps.first.push_back(first);
  taps.count.push_back(count);
  for (int64_t k = 0; k < taps.width; ++k) {
    const double weight = k < count ? exact[k] / total * (1 << kFractionBits) : 0.0;
    taps.weights.push_back(static_cast<int32_t>(weight < 0.0 ? weight - 0.5 : weight + 0.5));
  }
}

// The taps of the outputs in `window` when `in_size` pixels become `out_size`.
inline Taps make_taps(Filter filter, int64_t in_size, int64_t out_size, Window window) {
  const double step = static_cast<double>(in_size) / static_cast<double>(out_size);
  const double scale = std::max(step, 1.0);  // enlarging, the filter keeps its width
  const double support = filter_support(filter) * scale;
  Taps taps;
  taps.width = 2 * static_cast<int64_t>(std::ceil(support)) + 1;
  taps.first.reserve(window.count);
  taps.count.reserve(window.count);
  taps.weights.reserve(window.count * taps.width);
  std::vector<double> exact(taps.width);
  for (int64_t i = window.first; i < window.first + window.count; ++i) {
    const double center = (i + 0.5) * step;
    const auto first = static_cast<int32_t>(std::max(center - support + 0.5, 0.0));
    const auto end = static_cast<int32_t>(std::min(center + support + 0.5, static_cast<double>(in_size)));
    append_weights(taps, filter, center, scale, first, end - first, exact);
  }
  return taps;
}

// Taps that copy every pixel of `window`.
inline Taps copying_taps(Window window) {
  Taps taps;
  taps.width = 1;
  taps.count.assign(window.count, 1);
  taps.weights.assign(window.count, 1 << kFractionBits);
  for (int64_t i = 0; i < window.count; ++i) taps.first.push_back(static_cast<int32_t>(window.first + i));
  return taps;
}

inline void mirror(Taps& taps) {
  std::reverse(taps.first.begin(), taps.first.end());
  std::reverse(taps.count.begin(), taps.count.end());
  const int64_t outputs = taps.first.size();
  for (int64_t i = 0; i < outputs / 2; ++i) {
    auto one = taps.weights.begin() + i * taps.width, other = taps.weights.begin() + (outputs - 1 - i) * taps.width;
    std::swap_ranges(one, one + taps.width, other);
  }
}

// Counts the inputs of `taps` from the first one that is read; the window that is read.
inline Window rebase(Taps& taps) {
  int32_t first = taps.first[0], end = 0;
  for (size_t i = 0; i < taps.first.size(); ++i) {
    first = std::min(first, taps.first[i]);
    end = std::max(end, taps.first[i] + taps.count[i]);
  }
  for (int32_t& input : taps.first) input -= first;
  return {first, end - first};
}

// One axis through all resizes: sizes[0] is the picture's, sizes[s + 1] the one after resize s.
struct AxisPlan {
  std::vector<Taps> taps;       // of resize s, empty: the length stays
  std::vector<Window> windows;  // what is needed before resize s, and last the crop
};

inline AxisPlan plan_axis(const std::vector<int64_t>& sizes, int64_t crop, bool flip) {
  const int64_t resizes = static_cast<int64_t>(sizes.size()) - 1;
  AxisPlan plan{std::vector<Taps>(resizes), std::vector<Window>(sizes.size())};
  plan.windows[resizes] = {(sizes[resizes] - crop) / 2, crop};
  for (int64_t s = resizes - 1; s >= 0; --s) {
    const bool is_last = s == resizes - 1;
    Taps& taps = plan.taps[s];
    if (sizes[s] != sizes[s + 1]) {
      taps = make_taps(is_last ? Filter::kBicubic : Filter::kBox, sizes[s], sizes[s + 1], plan.windows[s + 1]);
    } else if (is_last && flip) {
      taps = copying_taps(plan.windows[s + 1]);
    }
    if (is_last && flip) mirror(taps);
    plan.windows[s] = taps.empty() ? plan.windows[s + 1] : rebase(taps);
  }
  return plan;
}

// The order of the two passes of a resize, in Pillow from 13 on: the columns first where that saves much. Before, and
// whenever a picture is at most twice as tall as wide, the rows come first.
inline bool is_vertical_first(int64_t in_height, int64_t out_height, int64_t in_width, int64_t out_width) {
  return out_height < in_height && in_height - out_height > 2 * (in_width - out_width);
}

// The crop of `size` pixels a side from a picture of `height` x `width`, mirrored left to right with `flip`.
inline CropPlan plan_crop(int64_t height, int64_t width, int64_t size, bool flip) {
  std::vector<int64_t> heights{height}, widths{width};
  while (std::min(heights.back(), widths.back()) / 2 >= size) {
    heights.push_back(heights.back() / 2);
    widths.push_back(widths.back() / 2);
  }
  const double scale = static_cast<double>(size) / static_cast<double>(std::min(heights.back(), widths.back()));
  // Rounds halves to even, as Python does.
  heights.push_back(static_cast<int64_t>(std::nearbyint(heights.back() * scale)));
  widths.push_back(static_cast<int64_t>(std::nearbyint(widths.back() * scale)));
  AxisPlan vertical = plan_axis(heights, size, false), horizontal = plan_axis(widths, size, flip);
  CropPlan plan{vertical.windows[0], horizontal.windows[0], {}};
  for (size_t s = 0; s + 1 < heights.size(); ++s) {
    const Window rows_in = vertical.windows[s], rows_out = vertical.windows[s + 1];
    const Window columns_in = horizontal.windows[s], columns_out = horizontal.windows[s + 1];
    Pass over_rows{false, rows_in.count, columns_out.count, std::move(horizontal.taps[s])};
    Pass over_columns{true, rows_out.count, columns_out.count, std::move(vertical.taps[s])};
    if (is_vertical_first(heights[s], heights[s + 1], widths[s], widths[s + 1])) {
      over_columns.columns = columns_in.count;
      over_rows.rows = rows_out.count;
      std::swap(over_rows, over_columns);
    }
    for (Pass* pass : {&over_rows, &over_columns}) {
      if (!pass->taps.empty()) plan.passes.push_back(std::move(*pass));
    }
  }
  return plan;
}

}  // namespace sendvae
