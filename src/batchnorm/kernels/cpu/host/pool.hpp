// Memory for large outputs, kept when they are freed: the next output then lies in pages that are mapped already.
//
// The first touch of new memory costs several times what writing it costs, and a C library returns large blocks to the
// system as soon as they are freed: a training loop would pay for the same pages at every step.
#pragma once

#include <pthread.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <vector>

// torch 2.11 and newer can be told what to do when a tensor is freed. Weak, and so null in an older torch.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t rank, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* tensor, int32_t layout, const uint8_t* metadata,
    int64_t metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace batchnorm {
namespace {

constexpr size_t kSmallestBlock = 1 << 17;  // a C library keeps smaller ones itself
constexpr size_t kLargePage = 1 << 21;

class Pool {
 public:
  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
    bool used = false;  // before: its pages are there
  };

  std::atomic<bool> enabled = true;

  // The process's pool. Never destroyed: tensors may be freed after everything else.
  static Pool& instance() {
    static Pool* pool = new Pool;
    return *pool;
  }

  // A tensor of a dense one's sizes and strides in a block of the pool; null where the pool does not serve it. `used`
  // says whether its pages are there.
  AtenTensorHandle tensor(size_t bytes, int64_t rank, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                          bool& used) {
    if (torch_from_blob == nullptr || bytes < kSmallestBlock || bytes > limit_ || !enabled) return nullptr;
    const Block block = take(bytes);
    if (block.data == nullptr) return nullptr;
    used = block.used;
    AtenTensorHandle handle = nullptr;
    // The deleter's context is the block's size: a number, so that nothing has to be kept for it.
    const auto error = torch_from_blob(block.data, rank, sizes, strides, 0, dtype, aoti_torch_device_type_cpu(), -1,
                                       &handle, aoti_torch_layout_strided(), nullptr, 0, give_back,
                                       reinterpret_cast<void*>(block.bytes));
    if (error == AOTI_TORCH_SUCCESS) return handle;
    give_back(block.data, reinterpret_cast<void*>(block.bytes));
    return nullptr;
  }

 private:
  Pool() : limit_(limit()) {
    // A child process must not inherit a lock that another thread of its parent held.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
  }

  // The bytes that may lie idle: an eighth of the memory that this process may have, or BATCHNORM_POOL_MIB.
  static size_t limit() {
    if (const char* wanted = std::getenv("BATCHNORM_POOL_MIB")) return std::strtoull(wanted, nullptr, 10) << 20;
    size_t memory = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
    if (FILE* file = std::fopen("/sys/fs/cgroup/memory.max", "r")) {  // a container's
      unsigned long long most = 0;
      if (std::fscanf(file, "%llu", &most) == 1) memory = std::min<size_t>(memory, most);
      std::fclose(file);
    }
    return memory / 8;
  }

  // The smallest idle block that fits, of equal ones the last used, or a new one.
  Block take(size_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      auto best = idle_.end();
      for (auto it = idle_.begin(); it != idle_.end(); ++it)
        if (it->bytes >= bytes && it->bytes - bytes <= bytes / 8 && (best == idle_.end() || it->bytes <= best->bytes))
          best = it;
      if (best != idle_.end()) {
        const Block block = *best;
        idle_.erase(best);
        idle_bytes_ -= block.bytes;
        return block;
      }
    }
    Block block{nullptr, bytes, false};
    if (posix_memalign(&block.data, bytes < kLargePage ? 4096 : kLargePage, bytes) != 0) block.data = nullptr;
    return block;
  }

  // Keeps a block, and returns to the system those that lay idle longest, beyond the limit.
  static void give_back(void* data, void* bytes) {
    Pool& pool = instance();
    std::vector<Block> dropped;
    {
      const std::lock_guard lock(pool.mutex_);
      pool.idle_.push_back({data, reinterpret_cast<size_t>(bytes), true});
      pool.idle_bytes_ += pool.idle_.back().bytes;
      auto first_kept = pool.idle_.begin();
      for (; pool.idle_bytes_ > pool.limit_; ++first_kept) pool.idle_bytes_ -= first_kept->bytes;
      dropped.assign(pool.idle_.begin(), first_kept);
      pool.idle_.erase(pool.idle_.begin(), first_kept);
    }
    for (const Block& block : dropped) std::free(block.data);
  }

  size_t limit_;
  std::mutex mutex_;
  std::vector<Block> idle_;  // the longest idle first
  size_t idle_bytes_ = 0;
};

}  // namespace
}  // namespace batchnorm
