// What is known of every byte that a kernel may touch, and whether an access is allowed. Only instrumented builds call
// check_access. Two accesses of a byte by different threads, one of them a write, are a race if they are of different
// blocks that no counter orders, or no barrier of the block lies between them; shuffles order nothing.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>

#include "state.h"

namespace cuda_on_cpu {
namespace {

constexpr size_t kSharedBytes = 48 << 10;
constexpr size_t kSharedGap = 16;  // between variables, so that running over one shows
constexpr uintptr_t kPageBytes = 4096;

struct Access {
  uint32_t launch = 0, block = 0;
  uint16_t thread = 0, epoch = 0, fences = 0;

  bool is_of_this_launch() const { return launch == launch_number; }
  bool is_of_this_block() const { return is_of_this_launch() && block == block_number; }
};

struct Cell {
  Access write, read;  // the last ones
  uint32_t ldg_launch = 0;
  bool is_readable = false, is_writable = false, is_defined = false;
  bool was_read_by_several = false;        // threads, in the epoch of `read`
  bool was_read_by_other_blocks = false;   // in the launch of `read`
};

struct Page {
  Cell cells[kPageBytes];
};

struct Variable {
  size_t offset, bytes;
};

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;  // of global memory
std::map<uintptr_t, size_t> tensors;                         // begin and bytes, for messages
alignas(64) char shared_bytes[kSharedBytes];
Cell shared_cells[kSharedBytes];
size_t shared_used = 0;
std::map<const void*, Variable> shared_variables;

// ---- Global memory ----

Page* page_of(uintptr_t address) {
  const auto found = pages.find(address / kPageBytes);
  return found == pages.end() ? nullptr : found->second.get();
}

Cell* known_cell(uintptr_t address) {
  Page* page = page_of(address);
  return page ? &page->cells[address % kPageBytes] : nullptr;
}

template <typename Function>
void for_cells(const void* data, size_t bytes, const Function& function) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  for (uintptr_t address = begin; address < begin + bytes; ++address) {
    if (!page_of(address)) pages[address / kPageBytes] = std::make_unique<Page>();
    function(*known_cell(address));
  }
}

template <typename Function>
void for_elements(const char* data, size_t bytes, size_t dims, const int64_t* sizes, const int64_t* strides,
                  const Function& function) {
  if (dims == 0) return for_cells(data, bytes, function);
  for (int64_t i = 0; i < sizes[0]; ++i) {
    const char* part = data + i * strides[0] * static_cast<int64_t>(bytes);
    for_elements(part, bytes, dims - 1, sizes + 1, strides + 1, function);
  }
}

std::string nearest_tensor(uintptr_t address) {
  auto after = tensors.upper_bound(address);
  if (after == tensors.begin()) return "before all tensors";
  const auto& [begin, bytes] = *--after;
  const size_t offset = address - begin;
  if (offset < bytes) return "between the elements of a tensor, at byte " + std::to_string(offset);
  return std::to_string(offset - bytes) + " bytes behind the end of a tensor of " + std::to_string(bytes);
}

// ---- Messages ----

// The source lines of a program counter, innermost first: functions are inlined into each other.
std::string source_of(const void* pc) {
  Dl_info library;
  if (!dladdr(pc, &library)) return "unknown line";
  char command[4096];
  const auto offset = reinterpret_cast<uintptr_t>(pc) - reinterpret_cast<uintptr_t>(library.dli_fbase) - 1;
  snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%lx", library.dli_fname, offset);
  std::string lines;
  FILE* pipe = popen(command, "r");
  if (!pipe) return "unknown line";
  char line[4096];
  while (fgets(line, sizeof line, pipe)) {
    const char* path = std::strstr(line, "/csrc/");
    if (!path) continue;
    if (!lines.empty()) lines += " < ";
    lines.append(path + 1, std::strcspn(path + 1, " \n"));
  }
  pclose(pipe);
  return lines.empty() ? "unknown line" : lines;
}

std::string this_thread() {
  return "thread " + std::to_string(current->id) + " of block " + std::to_string(block_number);
}

void fail_at(const std::string& what, const void* pc) {
  fail("%s %s; %s", this_thread().c_str(), what.c_str(), source_of(pc).c_str());
}

// ---- One byte ----

bool is_unordered(const Access& access, bool by_several) {
  if (!access.is_of_this_block()) {
    return !is_before_by_counter(access.block, access.thread, access.epoch, access.fences);
  }
  return access.epoch == current->epoch && (by_several || access.thread != current->id);
}

void remember(Access& access) {
  access = {launch_number, block_number, static_cast<uint16_t>(current->id), current->epoch, current->fences};
}

bool has_raced(const Cell& cell, bool is_write, bool is_shared, const void* pc) {
  const auto race = [&](const char* what, const Access& access) {
    const std::string memory = is_shared ? "shared" : "global", verb = is_write ? "writes" : "reads";
    fail_at("races in " + memory + " memory: it " + verb + " what thread " + std::to_string(access.thread) +
                " of block " + std::to_string(access.block) + " " + what,
            pc);
    return true;
  };
  // Shared memory of another block is another memory.
  const auto counts = [&](const Access& access) {
    return is_shared ? access.is_of_this_block() : access.is_of_this_launch();
  };
  if (counts(cell.write) && is_unordered(cell.write, false)) return race("wrote", cell.write);
  if (!is_write || !counts(cell.read)) return false;
  const bool by_others = !is_shared && cell.was_read_by_other_blocks;
  return (by_others || is_unordered(cell.read, cell.was_read_by_several)) && race("read", cell.read);
}

void note_read(Cell& cell) {
  const Access& last = cell.read;
  const bool same_epoch = last.is_of_this_block() && last.epoch == current->epoch;
  cell.was_read_by_several = same_epoch && (cell.was_read_by_several || last.thread != current->id);
  cell.was_read_by_other_blocks =
      last.is_of_this_launch() && (cell.was_read_by_other_blocks || last.block != block_number);
  remember(cell.read);
}

bool check_cell(Cell& cell, bool is_write, bool is_shared, const void* pc) {
  if (has_raced(cell, is_write, is_shared, pc)) return false;
  const bool is_defined = is_shared ? cell.write.is_of_this_block() : cell.is_defined;
  if (is_write && cell.ldg_launch == launch_number) {
    fail_at("writes what this kernel reads by __ldg", pc);
  } else if (!is_write && !is_defined) {
    fail_at(std::string("reads undefined ") + (is_shared ? "shared" : "global") + " memory", pc);
  } else if (is_write) {
    remember(cell.write);
    cell.is_defined = true;
  } else {
    note_read(cell);
  }
  return !has_failed();
}

void check_shared(const char* address, size_t bytes, bool is_write, const void* pc) {
  const size_t offset = address - shared_bytes;
  bool is_inside = false;
  for (const auto& [key, variable] : shared_variables) {
    is_inside |= offset >= variable.offset && offset + bytes <= variable.offset + variable.bytes;
  }
  if (!is_inside) return fail_at("is out of the bounds of shared memory", pc);
  for (size_t i = 0; i < bytes; ++i) {
    if (!check_cell(shared_cells[offset + i], is_write, true, pc)) return;
  }
}

void check_global(uintptr_t address, size_t bytes, bool is_write, const void* pc) {
  for (size_t i = 0; i < bytes; ++i) {
    Cell* cell = known_cell(address + i);
    if (!cell || !cell->is_readable) {
      Dl_info library;
      if (!is_write && dladdr(reinterpret_cast<void*>(address), &library)) return;  // a constant of the kernel's
      return fail_at((is_write ? "writes " : "reads ") + std::to_string(bytes) + " bytes out of bounds, " +
                         nearest_tensor(address + i),
                     pc);
    }
    if (is_write && !cell->is_writable) return fail_at("writes an input", pc);
    if (!check_cell(*cell, is_write, false, pc)) return;
  }
}

}  // namespace

void check_access(const void* pointer, size_t bytes, bool is_write, size_t alignment, const void* pc) {
  if (!current || !current->inside || has_failed()) return;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const StackOf stack = stack_of(address);
  if (stack == StackOf::kCurrentThread) return;
  if (stack == StackOf::kOtherThread) return fail_at("touches a local variable of another thread", pc);
  if (address % alignment) return fail_at("makes a misaligned access of " + std::to_string(bytes) + " bytes", pc);
  const auto* byte = static_cast<const char*>(pointer);
  const bool is_shared = byte >= shared_bytes && byte < shared_bytes + kSharedBytes;
  if (is_shared) {
    check_shared(byte, bytes, is_write, pc);
  } else {
    check_global(address, bytes, is_write, pc);
  }
  if (is_counting) count_access(address, bytes, is_write, is_shared, pc);
}

size_t tensor_bytes_at(uintptr_t address) {
  const auto after = tensors.upper_bound(address);
  return after == tensors.begin() ? 0 : std::prev(after)->second;
}

// ---- Shared memory ----

void start_shared_memory() {
  std::memset(shared_bytes, 0xff, shared_used);  // NaN in every format
  shared_used = 0;
  shared_variables.clear();
}

void* shared_memory(const void* variable, size_t bytes, size_t alignment) {
  const auto [found, is_new] = shared_variables.try_emplace(variable);
  if (is_new) {
    const size_t offset = (shared_used + kSharedGap + alignment - 1) / alignment * alignment;
    if (offset + bytes > kSharedBytes) fail("more than %zu bytes of shared memory", kSharedBytes);
    found->second = {offset, bytes};
    shared_used = offset + bytes;
  }
  return shared_bytes + found->second.offset;
}

// ---- Notes ----

void note_ldg(const void* address, size_t bytes) {
  if (!current || has_failed()) return;
  for (size_t i = 0; i < bytes; ++i) {
    Cell* cell = known_cell(reinterpret_cast<uintptr_t>(address) + i);
    if (!cell) return;  // the access itself will say so
    if (cell->write.is_of_this_launch()) fail("%s reads by __ldg what this kernel writes", this_thread().c_str());
    cell->ldg_launch = launch_number;
  }
}

void note_tensor(const void* data, size_t element_bytes, size_t dims, const int64_t* sizes, const int64_t* strides,
                 bool writable) {
  size_t span = element_bytes;
  for (size_t i = 0; i < dims; ++i) {
    if (sizes[i] == 0) return;
    span += (sizes[i] - 1) * strides[i] * element_bytes;
  }
  size_t& known_span = tensors[reinterpret_cast<uintptr_t>(data)];
  known_span = known_span > span ? known_span : span;
  for_elements(static_cast<const char*>(data), element_bytes, dims, sizes, strides, [&](Cell& cell) {
    if (!cell.is_readable) cell.is_defined = true;  // not of this op's making
    cell.is_readable = true;
    cell.is_writable |= writable;
  });
}

void note_new(const void* data, size_t bytes) {
  tensors[reinterpret_cast<uintptr_t>(data)] = bytes;
  for_cells(data, bytes, [](Cell& cell) {
    cell = {};
    cell.is_readable = cell.is_writable = true;
  });
}

void note_copied(const void* data, size_t bytes) {
  for_cells(data, bytes, [](Cell& cell) { cell.is_defined = true; });
}

void forget_memory() {
  pages.clear();
  tensors.clear();
}

}  // namespace cuda_on_cpu
