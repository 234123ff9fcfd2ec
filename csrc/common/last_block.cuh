// A kernel's last block: it finds what all others have left, and joins that without a second launch.
//
// Blocks count themselves. The counter is 0 before and after each launch (the last block sets it back), so nothing has
// to clear it; no two launches that may run at the same time may share it.
#pragma once

#include <cstdint>
#include <mutex>
#include <optional>
#include <unordered_map>

#include "cuda.cuh"

namespace sendvae {
namespace {

constexpr uint32_t kNumCounters = 65536;
__device__ uint32_t counters[kNumCounters];

// Where a launch counts its blocks: one of `counters`, or memory of its own.
struct BlockCounter {
  uint32_t number;
  uint32_t* own;
};

// Whether this is the last block of the launch that comes here; in all its threads, of a one-dimensional grid. What the
// other blocks' first threads had written before they came can be read then. All threads must call it, once.
__device__ __forceinline__ bool is_last_block(const BlockCounter& counter) {
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    __threadfence();
    uint32_t* count = counter.own ? counter.own : counters + counter.number;
    is_last = atomicInc(count, gridDim.x - 1) == gridDim.x - 1;
    if (is_last) __threadfence();
  }
  __syncthreads();
  return is_last;
}

// The number of a counter for a launch on the stream, on the current device; none if all are taken. Launches of one
// stream follow each other and share one. A launch in a CUDA graph runs on any stream, whenever that is replayed: it
// has its own for good.
std::optional<uint32_t> take_counter(const char* op, cudaStream_t stream) {
  static std::mutex mutex;
  static std::unordered_map<unsigned long long, uint32_t> of_streams;
  static uint32_t num_taken = 0;
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check_cuda(op, cudaStreamIsCapturing(stream, &capture));
  const bool is_captured = capture != cudaStreamCaptureStatusNone;
  unsigned long long id = 0;  // unlike the stream's address never given to another
  if (!is_captured) check_cuda(op, cudaStreamGetId(stream, &id));
  const std::lock_guard lock(mutex);
  if (!is_captured) {
    if (const auto found = of_streams.find(id); found != of_streams.end()) return found->second;
  }
  if (num_taken == kNumCounters) return std::nullopt;
  if (!is_captured) of_streams[id] = num_taken;
  return num_taken++;
}

// For a launch on the stream. `spare`: device memory that it may take, if no counter is left, at the price of clearing
// it.
BlockCounter counter_for(const char* op, cudaStream_t stream, uint32_t* spare) {
  if (const std::optional<uint32_t> number = take_counter(op, stream)) return {*number, nullptr};
  check_cuda(op, cudaMemsetAsync(spare, 0, sizeof *spare, stream));
  return {0, spare};
}

}  // namespace
}  // namespace sendvae
