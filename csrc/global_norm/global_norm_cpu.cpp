// global_norm on the CPU: chunks spread over threads, a sum per chunk, then their sum in the list's order, so that the
// result does not depend on the number of threads.
#include "global_norm.h"

#include <torch/csrc/stable/library.h>

#include "../common/cpu.h"

namespace sendvae {
namespace {

constexpr int kTableCapacity = 128;

// Independent sums, so that an addition need not wait for the one before: four of the widest vectors.
constexpr int64_t kSums = 32;

template <typename T>
SENDVAE_CPU_CLONES double sum_of_squares(const T* data, int64_t begin, int64_t end) {
  double sums[kSums] = {};
  int64_t i = begin;
  for (; i + kSums <= end; i += kSums) {
#pragma omp simd
    for (int64_t j = 0; j < kSums; ++j) sums[j] += square(to_float(data[i + j]));
  }
  double sum = 0.0;
  for (; i < end; ++i) sum += square(to_float(data[i]));
  for (const double part : sums) sum += part;
  return sum;
}

Tensor global_norm_cpu(const std::vector<Tensor>& tensors) {
  const GlobalNorm call(tensors);
  std::vector<double> sums;
  sums.reserve(call.num_chunks);
  dispatch_float(tensors[0].scalar_type(), [&](auto type) {
    using T = decltype(type);
    for_each_table<kTableCapacity>(call.entries<T>(), kNormChunk, [&](const auto& table, int64_t) {
      double* table_sums = sums.data() + sums.size();
      sums.resize(sums.size() + table.num_chunks);
      torch::stable::parallel_for(0, table.num_chunks, 1, [&](int64_t first, int64_t last) {
        for (int64_t chunk = first; chunk < last; ++chunk) {
          const ChunkRange range = table.range(static_cast<int32_t>(chunk), kNormChunk);
          table_sums[chunk] = sum_of_squares(table.entries[range.entry].data, range.begin, range.end);
        }
      });
    });
  });
  double total = 0.0;
  for (const double sum : sums) total += sum;
  *mutable_data<float>(call.norm) = norm_from_sum(total);
  return call.norm;
}

}  // namespace
}  // namespace sendvae

STABLE_TORCH_LIBRARY_IMPL(sendvae, CPU, library) { library.impl("global_norm", TORCH_BOX(&sendvae::global_norm_cpu)); }
