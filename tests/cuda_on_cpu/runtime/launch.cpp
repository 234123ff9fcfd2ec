// Launches: a grid's blocks run one after the other. CUDA_ON_CPU_ORDER says in which order: `forward`, or
// `random:<seed>`, in which the order of blocks is drawn once, that of a block's threads anew after every barrier and
// shuffle.
#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include <dlfcn.h>

#include "state.h"

namespace cuda_on_cpu {

Launch running;
uint32_t block_number = 0, launch_number = 0;

namespace {

std::recursive_mutex op_mutex;  // host threads may call ops at the same time
std::set<uintptr_t> entered;    // addresses in the kernels that have run, relative to the library

bool is_within_limits(dim3 grid, dim3 block) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  return threads > 0 && threads <= kMaxThreads && block.z <= 64 && grid.x > 0 && grid.x < 1u << 31 && grid.y > 0 &&
         grid.y < 1u << 16 && grid.z > 0 && grid.z < 1u << 16;
}

void run_blocks() {
  const dim3 grid = running.grid;
  const std::string name = getenv("CUDA_ON_CPU_ORDER") ? getenv("CUDA_ON_CPU_ORDER") : "forward";
  const std::string random = "random:";
  std::mt19937 source;
  std::vector<uint32_t> sequence(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(sequence.begin(), sequence.end(), 0);
  const bool is_random = name.starts_with(random);
  if (is_random) {
    source.seed(static_cast<uint32_t>(std::stoul(name.substr(random.size()))) + launch_number);
    std::shuffle(sequence.begin(), sequence.end(), source);
  } else if (name != "forward") {
    return fail("CUDA_ON_CPU_ORDER must be forward or random:<seed>, got %s", name.c_str());
  }
  for (uint32_t number : sequence) {
    block_number = number;
    running.block_index = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
    run_block(is_random ? &source : nullptr);
    if (has_failed()) return;
    if (is_counting) count_block();
  }
  if (is_counting) count_launch();
}

}  // namespace

uint3 block_index() { return running.block_index; }
dim3 block_size() { return running.block; }
dim3 grid_size() { return running.grid; }

void enter_kernel(int64_t max_threads) {
  current->inside = true;
  if (running.kernel) return;
  const auto address = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  Dl_info library;
  if (dladdr(reinterpret_cast<void*>(address), &library)) {
    running.kernel = address - reinterpret_cast<uintptr_t>(library.dli_fbase);
    entered.insert(running.kernel);
  }
  const int64_t have = int64_t{running.block.x} * running.block.y * running.block.z;
  if (have > max_threads) fail("launched with %ld threads, __launch_bounds__ allows %ld", have, max_threads);
  if (is_recording()) fail("recorded");  // the way out of a thread
}

void begin_op() { op_mutex.lock(); }

void end_op() {
  forget_memory();
  op_mutex.unlock();
}

void run_kernel(dim3 grid, dim3 block, size_t dynamic_shared_bytes, Body body, void* closure,
                const std::vector<Argument>& arguments) {
  const std::lock_guard lock(op_mutex);
  running = {grid, block, {}, 0, body, closure};
  ++launch_number;
  forget_failure();
  if (is_recording()) {
    run_block(nullptr);
    forget_failure();
    return record_launch(dynamic_shared_bytes, arguments);
  }
  if (!is_within_limits(grid, block)) {
    fail("invalid launch of (%u, %u, %u) blocks of (%u, %u, %u) threads", grid.x, grid.y, grid.z, block.x, block.y,
         block.z);
  } else if (dynamic_shared_bytes > 0) {
    fail("dynamic shared memory is not known here");
  } else {
    run_blocks();
  }
  if (has_failed()) throw std::runtime_error("CUDA on CPU: " + failure());
}

}  // namespace cuda_on_cpu

// torch's own needs a GPU.
extern "C" int aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

// For the tests, which look the addresses up among the library's symbols: one in each kernel that has run, relative to
// the library. Returns how many there are and writes the first `capacity`.
extern "C" __attribute__((visibility("default"))) size_t cuda_on_cpu_entered(uint64_t* addresses, size_t capacity) {
  size_t count = 0;
  for (uintptr_t address : cuda_on_cpu::entered) {
    if (count < capacity) addresses[count] = address;
    ++count;
  }
  return count;
}
