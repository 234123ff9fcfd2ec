// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and what the ops build
// on it: key, counter, uniforms, normals. sendvae_fast/ops/philox.py is the definition; this file agrees with it word
// for word.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"
#include "math.h"

namespace sendvae {

// One independent sequence per use; the numbers of philox.Stream.
enum class Stream : uint32_t { kPosterior = 0, kInterpolant = 1, kTime = 2, kSamplerStep = 5 };

struct PhiloxKey {
  uint32_t low, high;
};

struct PhiloxWords {
  uint32_t x, y, z, w;
};

struct Normal4 {
  float x, y, z, w;
};

SENDVAE_HD PhiloxWords philox4x32(PhiloxWords counter, PhiloxKey key) {
  SENDVAE_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = 0xD2511F53ull * counter.x;
    const uint64_t product1 = 0xCD9E8D57ull * counter.z;
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter.y ^ key.low, static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter.w ^ key.high, static_cast<uint32_t>(product0)};
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
  return counter;
}

// Steele, Lea and Flood's SplitMix64 step from state x: what `next()` returns.
SENDVAE_HD uint64_t splitmix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// Key of (seed, step); low half first.
SENDVAE_HD PhiloxKey make_key(int64_t seed, int64_t step) {
  const uint64_t mixed = splitmix64(splitmix64(static_cast<uint64_t>(seed)) + static_cast<uint64_t>(step));
  return {static_cast<uint32_t>(mixed), static_cast<uint32_t>(mixed >> 32)};
}

// Words 4 * block ... 4 * block + 3 of one sample's sequence.
SENDVAE_HD PhiloxWords sample_words(PhiloxKey key, Stream stream, int64_t sample_id, uint32_t block) {
  const uint64_t id = static_cast<uint64_t>(sample_id);
  return philox4x32({block, static_cast<uint32_t>(stream), static_cast<uint32_t>(id), static_cast<uint32_t>(id >> 32)},
                    key);
}

// In (0, 1), both ends excluded; exact in fp32.
SENDVAE_HD float uniform_from_word(uint32_t word) {
  return (static_cast<float>(static_cast<int32_t>(word >> 9)) + 0.5f) * 0x1p-23f;
}

struct NormalPair {
  float first, second;
};

// Box-Muller: word0 gives the radius, word1 the angle.
SENDVAE_HD NormalPair normals_from_words(uint32_t word0, uint32_t word1) {
  const float radius = sqrtf(-2.0f * log_normal(uniform_from_word(word0)));
  const SinCos angle = sincos_turns(word1 >> 9);
  return {radius * angle.cos, radius * angle.sin};
}

// Normals of elements 4 * block ... 4 * block + 3.
SENDVAE_HD Normal4 sample_normals(PhiloxKey key, Stream stream, int64_t sample_id, uint32_t block) {
  const PhiloxWords words = sample_words(key, stream, sample_id, block);
  const NormalPair low = normals_from_words(words.x, words.y);
  const NormalPair high = normals_from_words(words.z, words.w);
  return {low.first, low.second, high.first, high.second};
}

// The noise level of a sample, in (0, 1).
SENDVAE_HD float sample_time(PhiloxKey key, int64_t sample_id) {
  return uniform_from_word(sample_words(key, Stream::kTime, sample_id, 0).x);
}

}  // namespace sendvae
