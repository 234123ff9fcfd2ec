// What the parts of the runtime know of one another. One kernel runs at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <string>

#include "runtime.h"

namespace cuda_on_cpu {

constexpr uint32_t kMaxThreads = 1024;
constexpr uint32_t kWarp = 32;

enum class State { kReady, kAtBarrier, kInShuffle, kDone };

// A thread of the block that is running.
struct Thread {
  void* stack_pointer;
  uint32_t id;
  uint3 index;
  State state;
  bool inside;     // of the kernel: before, its arguments are being copied
  uint16_t epoch;  // how many barriers it has passed
  uint16_t fences, fence_epoch;  // how many it has made, and the epoch of the last
  Where where;     // it waits

  struct {
    uint32_t mask;
    const void* value;
    void* out;
    size_t bytes;
    int source;
  } shuffle;
};

struct Launch {
  dim3 grid, block;
  uint3 block_index;  // of the block that is running
  uintptr_t kernel;   // an address in it, relative to the library; 0 before its first thread has entered
  Body body;
  void* closure;
};

// ---- launch.cpp ----

extern Launch running;
extern uint32_t block_number;   // of the block that is running
extern uint32_t launch_number;  // from 1 on

// ---- threads.cpp ----

extern Thread* current;  // the one that is running, or null

// Runs all threads of a block to their end, or to the first failure; `order` draws theirs.
void run_block(std::mt19937* order);

// Keeps the first thing that went wrong in a launch. Does not return to a kernel's thread.
[[gnu::format(printf, 1, 2)]] void fail(const char* format, ...);
bool has_failed();
std::string failure();
void forget_failure();

std::string shown(Where where);  // "csrc/common/cuda.cuh:66"

enum class StackOf { kNone, kCurrentThread, kOtherThread };
StackOf stack_of(uintptr_t address);

// ---- counters.cpp ----

// Whether what a thread of another block of this launch did, in an epoch and after so many fences, is before what the
// current thread does, because both have counted themselves at one counter.
bool is_before_by_counter(uint32_t block, uint16_t thread, uint16_t epoch, uint16_t fences);

// ---- memory.cpp ----

void start_shared_memory();  // of a block
void forget_memory();

// A kernel's access, at the program counter `pc`.
void check_access(const void* address, size_t bytes, bool is_write, size_t alignment, const void* pc);

size_t tensor_bytes_at(uintptr_t address);

// ---- traffic.cpp ----

extern bool is_counting;

void count_access(uintptr_t address, size_t bytes, bool is_write, bool is_shared, const void* pc);
void count_barrier();
void count_shuffle();
void count_block();   // at its end
void count_launch();  // likewise

// ---- record.cpp ----

void record_launch(size_t dynamic_shared_bytes, const std::vector<Argument>& arguments);

}  // namespace cuda_on_cpu
