// What kernels cost a GPU, counted in place of timed: the 32-byte sectors that each access of a warp touches, the bytes
// of them that it uses, bank conflicts of shared memory, barriers and shuffles. An access of a warp is what its lanes
// do at one program counter, for the same time in each lane.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <map>
#include <sstream>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "state.h"

namespace cuda_on_cpu {

bool is_counting = false;

namespace {

constexpr uintptr_t kSectorBytes = 32, kWordBytes = 4;
constexpr uint32_t kBanks = 32;

struct Part {
  uint32_t lane;
  uintptr_t address;
  size_t bytes;
  bool is_write, is_shared;
};

using Issue = std::tuple<const void*, uint32_t, uint32_t>;  // program counter, warp, how many times before

// Of all accesses of a kernel to tensors of one size, in one direction.
struct Stream {
  uint64_t accesses = 0, sectors = 0, bytes = 0;  // bytes: used of the sectors
};

struct Counts {
  uint64_t launches = 0, barriers = 0, shuffles = 0, shared_accesses = 0, bank_conflicts = 0;
  std::map<std::pair<size_t, bool>, Stream> streams;  // bytes of the tensors, whether they are written
};

std::map<Issue, std::vector<Part>> issues;  // of the block that is running
std::map<std::pair<const void*, uint32_t>, uint32_t> times;  // by program counter and thread
std::map<uintptr_t, Counts> kernels;
std::string report;

Counts& counts() { return kernels[running.kernel]; }

void add_sectors(const std::vector<Part>& parts) {
  std::unordered_map<uintptr_t, uint32_t> sectors;  // which of their bytes are used, as bits
  for (const Part& part : parts) {
    for (uintptr_t byte = part.address; byte < part.address + part.bytes; ++byte) {
      sectors[byte / kSectorBytes] |= 1u << byte % kSectorBytes;
    }
  }
  Stream& stream = counts().streams[{tensor_bytes_at(parts.front().address), parts.front().is_write}];
  ++stream.accesses;
  stream.sectors += sectors.size();
  for (const auto& [sector, used] : sectors) stream.bytes += std::popcount(used);
}

// Wide accesses are served in turns of so many lanes that each turn is of at most 32 words; lanes of a turn that want
// different words of one bank wait for each other.
void add_bank_conflicts(const std::vector<Part>& parts) {
  const uint32_t words = std::max<uint32_t>(1, parts.front().bytes / kWordBytes), lanes_per_turn = kBanks / words;
  std::map<std::pair<uint32_t, uint32_t>, std::map<uintptr_t, bool>> wanted;  // by turn and bank
  for (const Part& part : parts) {
    for (uint32_t i = 0; i < words; ++i) {
      const uintptr_t word = part.address / kWordBytes + i;
      wanted[{part.lane / lanes_per_turn, word % kBanks}][word] = true;
    }
  }
  std::map<uint32_t, size_t> most;  // by turn
  for (const auto& [place, distinct] : wanted) most[place.first] = std::max(most[place.first], distinct.size());
  ++counts().shared_accesses;
  for (const auto& [turn, degree] : most) counts().bank_conflicts += degree - 1;
}

}  // namespace

void count_access(uintptr_t address, size_t bytes, bool is_write, bool is_shared, const void* pc) {
  const uint32_t time = times[{pc, current->id}]++;
  issues[{pc, current->id / kWarp, time}].push_back({current->id % kWarp, address, bytes, is_write, is_shared});
}

void count_barrier() { ++counts().barriers; }
void count_shuffle() { ++counts().shuffles; }

void count_block() {
  for (const auto& [issue, parts] : issues) parts.front().is_shared ? add_bank_conflicts(parts) : add_sectors(parts);
  issues.clear();
  times.clear();
}

void count_launch() { ++counts().launches; }

}  // namespace cuda_on_cpu

extern "C" __attribute__((visibility("default"))) void cuda_on_cpu_start_counting() { cuda_on_cpu::is_counting = true; }

// For the tests, as JSON: of each kernel, by an address in it, what was counted.
extern "C" __attribute__((visibility("default"))) const char* cuda_on_cpu_counts() {
  using namespace cuda_on_cpu;
  std::ostringstream out;
  const char* between = "";
  out << "[";
  for (const auto& [kernel, counts] : kernels) {
    out << between << R"({"kernel": )" << kernel << R"(, "launches": )" << counts.launches << R"(, "barriers": )"
        << counts.barriers << R"(, "shuffles": )" << counts.shuffles << R"(, "shared_accesses": )"
        << counts.shared_accesses << R"(, "bank_conflicts": )" << counts.bank_conflicts << R"(, "streams": [)";
    const char* between_streams = "";
    for (const auto& [key, stream] : counts.streams) {
      out << between_streams << "[" << key.first << ", " << key.second << ", " << stream.accesses << ", "
          << stream.sectors << ", " << stream.bytes << "]";
      between_streams = ", ";
    }
    out << "]}";
    between = ", ";
  }
  out << "]";
  report = out.str();
  return report.c_str();
}
