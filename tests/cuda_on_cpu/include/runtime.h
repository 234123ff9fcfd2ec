// What translated sources call: the runtime (../runtime), without CUDA's names and without torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <vector>

struct uint3 {
  uint32_t x, y, z;
};

struct dim3 {
  uint32_t x, y, z;
  constexpr dim3(uint32_t x_ = 1, uint32_t y_ = 1, uint32_t z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace cuda_on_cpu {

using Where = std::source_location;

// ---- Within a kernel ----

uint3 thread_index();
uint3 block_index();
dim3 block_size();
dim3 grid_size();
int lane();

// The first statement of every kernel: its arguments have been copied. max_threads: what __launch_bounds__ allows.
void enter_kernel(int64_t max_threads);

void sync_threads(Where where);

// What the warp exchanges: waits for the lanes of `mask`, then copies the `bytes` at `value` of lane `source` to `out`.
void shuffle(uint32_t mask, const void* value, void* out, size_t bytes, int source, Where where);

// __threadfence: what the thread did before is seen by others before what it does after.
void fence();

// atomicInc: counts up, after `last` from 0 again; returns what was there.
uint32_t count_up(uint32_t* counter, uint32_t last);

// The block's copy of a __shared__ variable; `variable` stands for its declaration.
void* shared_memory(const void* variable, size_t bytes, size_t alignment);

void note_ldg(const void* address, size_t bytes);

// ---- On the host ----

using Body = void (*)(void* closure);

// What a kernel is launched with.
struct Argument {
  const void* data;
  size_t bytes;
  bool is_floating;
};

// Runs body(closure) once for each thread of the grid. Throws std::runtime_error with what was found.
void run_kernel(dim3 grid, dim3 block, size_t dynamic_shared_bytes, Body body, void* closure,
                const std::vector<Argument>& arguments);

// While launches are recorded, none runs: tensors may be larger than this machine's memory, as long as none touches
// them.
bool is_recording();
void record_tensor(const void* data, size_t bytes);

// From begin_op to end_op the calling thread is alone here; the end forgets all memory.
void begin_op();
void end_op();

// Kernels may touch the elements of a tensor; strides in elements. Without a note its memory is out of bounds.
void note_tensor(const void* data, size_t element_bytes, size_t dims, const int64_t* sizes, const int64_t* strides,
                 bool writable);
// They may write `bytes` of new memory, and read what they have written.
void note_new(const void* data, size_t bytes);
// The host has written it.
void note_copied(const void* data, size_t bytes);

}  // namespace cuda_on_cpu
