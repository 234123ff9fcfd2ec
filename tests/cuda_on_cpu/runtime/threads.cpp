// The threads of a block are fibers of one host thread, which change places at barriers and shuffles.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "state.h"

// Saves what a call must keep, stores the stack pointer to *from, and goes on where `to` left.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
asm(R"(
.text
.globl cuda_on_cpu_switch
.hidden cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace cuda_on_cpu {

Thread* current = nullptr;

namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr int kSavedRegisters = 6;

char* stacks = nullptr;
void* scheduler = nullptr;  // its stack pointer
std::vector<Thread> threads;
std::string problem;

// ---- Changing places ----

void leave() { cuda_on_cpu_switch(&current->stack_pointer, scheduler); }

void wait(State state, Where where) {
  current->state = state;
  current->where = where;
  leave();
}

void thread_main() {
  running.body(running.closure);
  current->state = State::kDone;
  leave();
  abort();
}

void start(Thread& thread, uint32_t id) {
  const dim3 block = running.block;
  thread = {};
  thread.id = id;
  thread.index = {id % block.x, id / block.x % block.y, id / block.x / block.y};
  auto* top = reinterpret_cast<void**>(stacks + (id + 1) * kStackBytes) - 2;
  *--top = nullptr;  // thread_main's return address: the stack is aligned as if it had been called
  *--top = reinterpret_cast<void*>(&thread_main);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  thread.stack_pointer = top;
}

void resume(Thread& thread) {
  current = &thread;
  cuda_on_cpu_switch(&scheduler, thread.stack_pointer);
  current = nullptr;
}

// ---- Barriers and shuffles ----

bool is_same(const Where& one, const Where& other) {
  return one.line() == other.line() && std::strcmp(one.file_name(), other.file_name()) == 0;
}

// Lets the block go on if all threads that have not ended are at the same barrier.
void release_barrier() {
  const Thread* first = nullptr;
  for (const Thread& thread : threads) {
    if (thread.state == State::kDone) continue;
    if (thread.state != State::kAtBarrier) return;
    if (!first) first = &thread;
    if (!is_same(thread.where, first->where)) {
      return fail("threads %u and %u wait at different barriers: %s, %s", first->id, thread.id,
                  shown(first->where).c_str(), shown(thread.where).c_str());
    }
  }
  if (first && is_counting) count_barrier();
  for (Thread& thread : threads) {
    if (thread.state != State::kAtBarrier) continue;
    thread.state = State::kReady;
    ++thread.epoch;
  }
}

// Whether all lanes of the thread's mask are in the same shuffle.
bool is_complete(const Thread& thread) {
  const uint32_t first = thread.id / kWarp * kWarp;
  for (uint32_t lane = 0; lane < kWarp; ++lane) {
    if (!(thread.shuffle.mask >> lane & 1)) continue;
    const bool exists = first + lane < threads.size();
    if (!exists || threads[first + lane].state == State::kDone) {
      fail("lane %u of warp %u is in the mask %08x of the shuffle but %s; %s", lane, first / kWarp, thread.shuffle.mask,
           exists ? "has ended" : "does not exist", shown(thread.where).c_str());
      return false;
    }
    const Thread& other = threads[first + lane];
    if (other.state != State::kInShuffle || other.shuffle.mask != thread.shuffle.mask) return false;
    if (!is_same(other.where, thread.where)) return false;
  }
  return true;
}

void release_shuffles() {
  for (const Thread& thread : threads) {
    if (thread.state != State::kInShuffle || !is_complete(thread)) continue;
    if (is_counting) count_shuffle();
    const uint32_t first = thread.id / kWarp * kWarp, mask = thread.shuffle.mask;
    for (uint32_t lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1)) continue;
      Thread& taker = threads[first + lane];
      std::memcpy(taker.shuffle.out, threads[first + taker.shuffle.source].shuffle.value, taker.shuffle.bytes);
      taker.state = State::kReady;
    }
  }
}

void make_stacks() {
  void* memory = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  stacks = static_cast<char*>(memory);
}

}  // namespace

// ---- Blocks ----

void run_block(std::mt19937* order) {
  if (!stacks) make_stacks();
  start_shared_memory();
  const dim3 block = running.block;
  threads.resize(block.x * block.y * block.z);
  for (uint32_t id = 0; id < threads.size(); ++id) start(threads[id], id);
  std::vector<uint32_t> sequence(threads.size());
  std::iota(sequence.begin(), sequence.end(), 0);
  while (true) {
    if (order) std::shuffle(sequence.begin(), sequence.end(), *order);
    for (uint32_t id : sequence) {
      if (threads[id].state == State::kReady) resume(threads[id]);
      if (has_failed()) return;
    }
    release_shuffles();
    release_barrier();
    if (has_failed()) return;
    const auto is = [](State state) { return [state](const Thread& thread) { return thread.state == state; }; };
    if (std::all_of(threads.begin(), threads.end(), is(State::kDone))) return;
    if (std::any_of(threads.begin(), threads.end(), is(State::kReady))) continue;
    const auto stuck = std::find_if_not(threads.begin(), threads.end(), is(State::kDone));
    return fail("deadlock: thread %u waits at %s for others that never come", stuck->id, shown(stuck->where).c_str());
  }
}

// ---- Failures ----

void fail(const char* format, ...) {
  if (problem.empty()) {
    char text[2048];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    problem = text;
  }
  if (current) leave();  // for good
}

bool has_failed() { return !problem.empty(); }
std::string failure() { return problem; }
void forget_failure() { problem.clear(); }

std::string shown(Where where) {
  const std::string file = where.file_name();
  const size_t begin = file.rfind("/csrc/");
  return (begin == std::string::npos ? file : file.substr(begin + 1)) + ":" + std::to_string(where.line());
}

StackOf stack_of(uintptr_t address) {
  const size_t offset = address - reinterpret_cast<uintptr_t>(stacks);
  if (offset >= kMaxThreads * kStackBytes) return StackOf::kNone;
  return offset / kStackBytes == current->id ? StackOf::kCurrentThread : StackOf::kOtherThread;
}

// ---- What kernels call ----

uint3 thread_index() { return current->index; }
int lane() { return static_cast<int>(current->id % kWarp); }

void sync_threads(Where where) { wait(State::kAtBarrier, where); }

void shuffle(uint32_t mask, const void* value, void* out, size_t bytes, int source, Where where) {
  if (!(mask >> lane() & 1)) fail("thread %u is not in its own mask %08x; %s", current->id, mask, shown(where).c_str());
  if (source < 0 || source >= static_cast<int>(kWarp) || !(mask >> source & 1)) {
    fail("a shuffle reads lane %d, which is not in the mask %08x; %s", source, mask, shown(where).c_str());
  }
  current->shuffle = {mask, value, out, bytes, source};
  wait(State::kInShuffle, where);
}

}  // namespace cuda_on_cpu
