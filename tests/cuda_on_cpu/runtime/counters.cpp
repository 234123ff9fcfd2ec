// What orders blocks of a launch: counters in global memory, and fences. A thread that counts itself makes known what
// it did before its last fence, and what other threads of its block did before the barrier ahead of that. A thread that
// has counted itself later, and made a fence since, knows of it, and so do the others of its block after a barrier.
#include <unordered_map>

#include "state.h"

namespace cuda_on_cpu {
namespace {

// A thread and a time of it.
struct Moment {
  uint32_t launch = 0, block = 0;
  uint16_t thread = 0, epoch = 0, fences = 0;

  bool is_of_this_block() const { return launch == launch_number && block == block_number; }
};

using Blocks = std::unordered_map<uint32_t, Moment>;

std::unordered_map<const uint32_t*, Blocks> known;  // by counter: each block's last fence before it counted itself
const uint32_t* counter_of_block = nullptr;  // where the running block has counted itself
Moment counted, acquired;  // when it did, and the fence after that

}  // namespace

void fence() {
  ++current->fences;
  current->fence_epoch = current->epoch;
  if (counted.is_of_this_block() && counted.thread == current->id) {
    acquired = {launch_number, block_number, counted.thread, current->epoch, current->fences};
  }
}

uint32_t count_up(uint32_t* counter, uint32_t last) {
  const auto thread = static_cast<uint16_t>(current->id);
  Blocks& blocks = known[counter];
  if (!blocks.empty() && blocks.begin()->second.launch != launch_number) blocks.clear();
  blocks[block_number] = {launch_number, block_number, thread, current->fence_epoch, current->fences};
  counter_of_block = counter;
  counted = {launch_number, block_number, thread, current->epoch, current->fences};
  const uint32_t before = *counter;
  *counter = before >= last ? 0 : before + 1;
  return before;
}

bool is_before_by_counter(uint32_t block, uint16_t thread, uint16_t epoch, uint16_t fences) {
  if (!acquired.is_of_this_block()) return false;
  if (current->id != acquired.thread && current->epoch <= acquired.epoch) return false;
  const Blocks& blocks = known[counter_of_block];
  const auto found = blocks.find(block);
  if (found == blocks.end() || found->second.launch != launch_number) return false;
  const Moment& told = found->second;
  return told.fences > 0 && (epoch < told.epoch || (thread == told.thread && fences < told.fences));
}

}  // namespace cuda_on_cpu
