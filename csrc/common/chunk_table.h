// Lists of tensors cut into chunks of equal size, so that one parallel loop or one launch goes over many tensors. A
// table has a fixed capacity and no pointer of its own: it travels to the GPU as a kernel argument, which a CUDA graph
// keeps. Longer lists take several tables.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "host_device.h"

namespace sendvae {

// Half-open range of elements of the table's entry `entry`.
struct ChunkRange {
  int32_t entry;
  int64_t begin, end;
};

// Entry: the facts about one tensor, with its number of elements as `size`.
template <typename Entry, int kCapacity>
struct ChunkTable {
  Entry entries[kCapacity];
  int32_t first_chunk[kCapacity];  // ascending from 0; an entry without elements has no chunk
  int32_t num_entries, num_chunks;

  // `chunk` is in [0, num_chunks).
  SENDVAE_HD ChunkRange range(int32_t chunk, int64_t chunk_size) const {
    // The last entry whose first chunk is not behind `chunk`.
    int32_t low = 0, high = num_entries;
    while (high - low > 1) {
      const int32_t middle = (low + high) / 2;
      if (first_chunk[middle] <= chunk) {
        low = middle;
      } else {
        high = middle;
      }
    }
    const int64_t begin = (chunk - first_chunk[low]) * chunk_size;
    const int64_t end = begin + chunk_size, size = entries[low].size;
    return {low, begin, end < size ? end : size};
  }
};

// Calls visit(table, index of the table's first entry in the list) for one table after the other. Fewer than 2^31
// chunks fit any memory there is.
template <int kCapacity, typename Entry, typename Visit>
void for_each_table(const std::vector<Entry>& list, int64_t chunk_size, const Visit& visit) {
  for (size_t first = 0; first < list.size(); first += kCapacity) {
    ChunkTable<Entry, kCapacity> table{};
    table.num_entries = static_cast<int32_t>(std::min<size_t>(kCapacity, list.size() - first));
    for (int32_t i = 0; i < table.num_entries; ++i) {
      table.entries[i] = list[first + i];
      table.first_chunk[i] = table.num_chunks;
      table.num_chunks += static_cast<int32_t>((table.entries[i].size + chunk_size - 1) / chunk_size);
    }
    visit(table, static_cast<int64_t>(first));
  }
}

}  // namespace sendvae
