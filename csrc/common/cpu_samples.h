// Shared code of the CPU kernels that draw noise for [B, C, H, W] samples: a sample is cut into tiles of consecutive
// elements in [C, H, W] order. Tiles and results depend on the sample alone, not on the number of threads or the place
// in the batch.
#pragma once

#include <algorithm>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

#include "cpu.h"
#include "philox.h"

namespace sendvae {

constexpr uint32_t kTile = 1024;   // elements; a multiple of 4, and small enough for a few buffers of it in L1
constexpr int64_t kGrain = 4;      // tiles a thread takes at least

// The normals of elements [begin, begin + count) of a sample; `begin` is a multiple of 4, and `out` has room for
// `count` rounded up to one.
SENDVAE_HD void fill_normals(PhiloxKey key, Stream stream, int64_t sample_id, uint32_t begin, uint32_t count,
                             float* __restrict__ out) {
  const uint32_t first = begin / 4;
  const uint32_t blocks = (count + 3) / 4;
  for (uint32_t i = 0; i < blocks; ++i) {
    const Normal4 normals = sample_normals(key, stream, sample_id, first + i);
    out[4 * i] = normals.x;
    out[4 * i + 1] = normals.y;
    out[4 * i + 2] = normals.z;
    out[4 * i + 3] = normals.w;
  }
}

// Elements [begin, end) of a tile that lie in one channel; `channel` is its index.
struct Run {
  int64_t begin, end, channel;
};

// Splits a sample's elements [begin, end) by channel and calls body(run) for each part, counted from `begin`.
template <typename Body>
SENDVAE_HD void for_each_channel(uint32_t begin, uint32_t end, uint32_t plane, const Body& body) {
  for (int64_t from = begin; from < end;) {
    const int64_t channel = from / plane;
    const int64_t to = std::min<int64_t>(end, (channel + 1) * plane);
    body(Run{from - begin, to - begin, channel});
    from = to;
  }
}

// Runs tile(args, sample, begin, end) over all tiles of all samples; `args` has `batch` and `elements` (of a sample).
template <typename Args>
void for_each_tile(const Args& args, void (*tile)(const Args&, int64_t, uint32_t, uint32_t)) {
  const int64_t tiles = (static_cast<int64_t>(args.elements) + kTile - 1) / kTile;  // of one sample
  torch::stable::parallel_for(0, args.batch * tiles, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const uint32_t begin = static_cast<uint32_t>(i % tiles) * kTile;
      tile(args, i / tiles, begin, std::min(args.elements, begin + kTile));
    }
  });
}

}  // namespace sendvae
