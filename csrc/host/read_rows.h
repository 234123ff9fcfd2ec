// Threaded pread of fixed-size rows. No Python in here.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace sendvae {

struct ReadError {
  int error_number;  // errno; 0: the file ends before the row does, or the offset is negative
  std::string message;
};

// Reads one row. pread may return less than asked for; 0 means the end of the file.
inline std::optional<ReadError> read_row(int file, const std::string& path, int64_t offset, int64_t row_bytes,
                                         char* out) {
  if (offset < 0) return ReadError{0, path + ": negative offset " + std::to_string(offset)};
  for (int64_t done = 0; done < row_bytes;) {
    const ssize_t got = pread(file, out + done, row_bytes - done, offset + done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return ReadError{errno, path + ": " + std::strerror(errno)};
    if (got == 0) {
      return ReadError{0, path + ": ends at byte " + std::to_string(offset + done) + ", inside the row of " +
                              std::to_string(row_bytes) + " bytes at " + std::to_string(offset) +
                              "; the file is cut short"};
    }
    done += got;
  }
  return std::nullopt;
}

// Reads row i of `row_bytes` bytes at offsets[i] to out + i * row_bytes. Stops at the first error and returns it.
inline std::optional<ReadError> read_rows(const std::string& path, const std::vector<int64_t>& offsets,
                                          int64_t row_bytes, char* out, int num_threads) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return ReadError{errno, path + ": " + std::strerror(errno)};
  const int64_t count = static_cast<int64_t>(offsets.size());
  const int64_t workers = std::clamp<int64_t>(num_threads, 1, std::max<int64_t>(1, count));
  std::atomic<int64_t> next{0};
  std::vector<std::optional<ReadError>> errors(workers);
  const auto work = [&](int64_t worker) {
    for (int64_t row; (row = next.fetch_add(1)) < count;) {
      errors[worker] = read_row(file, path, offsets[row], row_bytes, out + row * row_bytes);
      if (errors[worker]) next = count;  // stops the others too
    }
  };
  {
    std::vector<std::jthread> threads;  // joined at the end of the block
    for (int64_t i = 1; i < workers; ++i) threads.emplace_back(work, i);
    work(0);
  }
  close(file);
  for (std::optional<ReadError>& error : errors) {
    if (error) return error;
  }
  return std::nullopt;
}

}  // namespace sendvae
