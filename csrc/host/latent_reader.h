// Reads rows of many files ahead of their use: the latents of a schedule, from the shards of a latent cache. No Python
// in here.
//
// A sample has a row in each of the fields (mean, std, ...) of one shard, in one of several variants (plain, flipped).
// A batch of samples is submitted with one buffer per field; threads fill the buffers, earlier batches first.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace sendvae {

struct ReadError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct LatentShard {
  std::string path;
  int64_t bytes;  // size of the whole file
  int64_t count;  // samples in it
  // Byte offset of the first row of field f in variant v: offsets[v * num_fields + f].
  std::vector<int64_t> offsets;
};

class LatentReader {
 public:
  // row_bytes: of each field. Shards hold samples 0 ... in order. Files are opened when first needed.
  LatentReader(std::vector<LatentShard> shards, std::vector<int64_t> row_bytes, int num_threads)
      : shards_(std::move(shards)), row_bytes_(std::move(row_bytes)), files_(shards_.size()) {
    first_.push_back(0);
    for (const LatentShard& shard : shards_) {
      if (shard.offsets.empty() || shard.offsets.size() % row_bytes_.size() ||
          shard.offsets.size() != shards_.front().offsets.size()) {
        throw std::invalid_argument(shard.path + ": needs an offset for every field of every variant");
      }
      for (size_t i = 0; i < shard.offsets.size(); ++i) {
        if (shard.offsets[i] < 0 || shard.count < 0 ||
            shard.offsets[i] + shard.count * row_bytes_[i % row_bytes_.size()] > shard.bytes) {
          throw std::invalid_argument(shard.path + ": rows reach past the end of the file");
        }
      }
      first_.push_back(first_.back() + shard.count);
    }
    for (int i = 0; i < std::max(1, num_threads); ++i) threads_.emplace_back([this] { work(); });
  }

  ~LatentReader() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    for (const File& file : files_) {
      if (file.descriptor >= 0) close(file.descriptor);
    }
  }

  LatentReader(const LatentReader&) = delete;
  LatentReader& operator=(const LatentReader&) = delete;

  int64_t num_samples() const { return first_.back(); }
  int64_t num_fields() const { return static_cast<int64_t>(row_bytes_.size()); }
  int64_t num_variants() const {
    return shards_.empty() ? 1 : static_cast<int64_t>(shards_.front().offsets.size() / row_bytes_.size());
  }
  int64_t row_bytes(int64_t field) const { return row_bytes_[field]; }

  struct Batch {
    std::vector<int64_t> ids, variants;
    std::vector<char*>
        buffers;  // one per field, of ids.size() rows; the caller keeps them until the batch is waited for
    size_t next = 0, unfinished = 0;
    std::string error;
  };

  // ids and variants must be in range (the binding checks).
  std::shared_ptr<Batch> submit(std::vector<int64_t> ids, std::vector<int64_t> variants, std::vector<char*> buffers) {
    auto batch = std::make_shared<Batch>();
    batch->unfinished = ids.size();
    batch->ids = std::move(ids);
    batch->variants = std::move(variants);
    batch->buffers = std::move(buffers);
    if (batch->unfinished > 0) {
      const std::lock_guard lock(mutex_);
      queue_.push_back(batch);
      wake_.notify_all();
    }
    return batch;
  }

  // Returns when every row is there. Throws ReadError, naming the file, if one could not be read.
  void wait(const std::shared_ptr<Batch>& batch) {
    std::unique_lock lock(mutex_);
    finished_.wait(lock, [&] { return batch->unfinished == 0; });
    if (!batch->error.empty()) throw ReadError(batch->error);
  }

 private:
  static constexpr size_t kRowsAtOnce = 8;  // taken by a thread in one go

  struct File {
    std::once_flag once;
    int descriptor = -1;
    std::string error;
  };

  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stopping_ || !queue_.empty(); });
      if (stopping_) return;
      const std::shared_ptr<Batch> batch = queue_.front();
      const size_t start = batch->next, stop = std::min(start + kRowsAtOnce, batch->ids.size());
      batch->next = stop;
      if (stop == batch->ids.size()) queue_.pop_front();
      const bool failed = !batch->error.empty();
      lock.unlock();
      std::string error;
      for (size_t row = start; row < stop && !failed && error.empty(); ++row) error = read_sample(*batch, row);
      lock.lock();
      if (batch->error.empty()) batch->error = error;
      batch->unfinished -= stop - start;
      if (batch->unfinished == 0) finished_.notify_all();
    }
  }

  // What went wrong, or nothing.
  std::string read_sample(const Batch& batch, size_t row) {
    const int64_t id = batch.ids[row];
    const size_t k = std::upper_bound(first_.begin(), first_.end(), id) - first_.begin() - 1;
    const LatentShard& shard = shards_[k];
    File& file = files_[k];
    std::call_once(file.once, [&] { open_shard(shard, file); });
    if (!file.error.empty()) return file.error;
    const size_t fields = row_bytes_.size();
    for (size_t field = 0; field < fields; ++field) {
      const int64_t bytes = row_bytes_[field];
      const int64_t offset = shard.offsets[batch.variants[row] * fields + field] + (id - first_[k]) * bytes;
      std::string error = read_bytes(shard.path, file.descriptor, offset, bytes, batch.buffers[field] + row * bytes);
      if (!error.empty()) return error;
    }
    return {};
  }

  static void open_shard(const LatentShard& shard, File& file) {
    file.descriptor = open(shard.path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat status = {};
    if (file.descriptor < 0 || fstat(file.descriptor, &status) != 0) {
      file.error = shard.path + ": " + std::strerror(errno);
    } else if (status.st_size != shard.bytes) {
      file.error = shard.path + " has " + std::to_string(status.st_size) + " bytes instead of " +
                   std::to_string(shard.bytes) + ": it was cut short or changed";
    }
  }

  // pread may return less than asked for; 0 means the end of the file.
  static std::string read_bytes(const std::string& path, int descriptor, int64_t offset, int64_t count, char* out) {
    for (int64_t done = 0; done < count;) {
      const ssize_t got = pread(descriptor, out + done, count - done, offset + done);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) return path + ": " + std::strerror(errno);
      if (got == 0)
        return path + " ends before byte " + std::to_string(offset + count) + ": it was cut short while in use";
      done += got;
    }
    return {};
  }

  const std::vector<LatentShard> shards_;
  const std::vector<int64_t> row_bytes_;
  std::vector<int64_t> first_;  // first sample id of each shard, and the number of all
  std::vector<File> files_;

  std::mutex mutex_;  // guards what follows and the state of every batch
  std::condition_variable wake_, finished_;
  std::deque<std::shared_ptr<Batch>> queue_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace sendvae
