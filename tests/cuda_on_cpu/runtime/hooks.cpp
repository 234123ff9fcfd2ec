// What g++ calls before each access under -fsanitize=thread, and where -fsanitize=undefined sees an error. Neither
// libtsan nor libubsan is linked: the runtime's own checks know what a block and a barrier are.
#include <cstdlib>

#include "state.h"

namespace {

// The beginning of what every handler of undefined behaviour is given.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

[[noreturn]] void fail_undefined(const char* what, const void* data) {
  const auto* location = static_cast<const SourceLocation*>(data);
  if (cuda_on_cpu::current) {
    cuda_on_cpu::fail("thread %u of block %u: %s; %s:%u", cuda_on_cpu::current->id, cuda_on_cpu::block_number, what,
                      location->file, location->line);
  }
  abort();  // in the op's host code
}

}  // namespace

#define ACCESS(name, bytes, is_write, alignment)                                                 \
  extern "C" void name(void* address) {                                                          \
    cuda_on_cpu::check_access(address, bytes, is_write, alignment, __builtin_return_address(0)); \
  }
#define ACCESSES(bytes)                                 \
  ACCESS(__tsan_read##bytes, bytes, false, bytes)       \
  ACCESS(__tsan_write##bytes, bytes, true, bytes)       \
  ACCESS(__tsan_unaligned_read##bytes, bytes, false, 1) \
  ACCESS(__tsan_unaligned_write##bytes, bytes, true, 1)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

#define UNDEFINED(name, what) \
  extern "C" [[noreturn]] void name(void* data) { fail_undefined(what, data); }
UNDEFINED(__ubsan_handle_out_of_bounds_abort, "an index is out of the bounds of its array")
UNDEFINED(__ubsan_handle_shift_out_of_bounds_abort, "a shift by a negative number or by too many bits")
UNDEFINED(__ubsan_handle_divrem_overflow_abort, "a division by zero")

extern "C" {

void __tsan_read_range(void* address, size_t bytes) {
  cuda_on_cpu::check_access(address, bytes, false, 1, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  cuda_on_cpu::check_access(address, bytes, true, 1, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// Host code counts references.
int __tsan_atomic32_fetch_add(volatile int* p, int v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
int __tsan_atomic32_fetch_sub(volatile int* p, int v, int) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); }
int __tsan_atomic32_load(const volatile int* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
char __tsan_atomic8_load(const volatile char* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }

}  // extern "C"
