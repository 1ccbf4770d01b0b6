// Memory for large outputs, kept when they are freed: the next output then lies in pages that are mapped already.
//
// The first touch of new memory costs several times what writing it costs, and a C library returns large blocks to the
// system as soon as they are freed: a training loop would pay for the same pages at every step.
#pragma once

#include <pthread.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <list>
#include <map>
#include <mutex>
#include <set>
#include <vector>

#include "host/memory_limit.hpp"

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

  // The process's pool. Never destroyed: tensors may be freed after everything else.
  static Pool& instance() {
    static Pool* pool = new Pool;
    return *pool;
  }

  // A tensor of a dense one's sizes and strides in a block of the pool; null where the pool does not serve it. `used`
  // says whether its pages are there.
  AtenTensorHandle tensor(size_t bytes, int64_t rank, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                          bool& used) {
    if (torch_from_blob == nullptr || bytes < kSmallestBlock || bytes > limit_ || !enabled()) return nullptr;
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

  // Whether outputs lie in the pool: unless somebody wants them elsewhere.
  bool enabled() const { return enabled_; }

  // Somebody who wants outputs elsewhere comes or goes. Each has a number of its own, so that several at once, from any
  // threads and in any order, are told apart, and being told twice changes nothing.
  void set_elsewhere(int64_t who, bool wanted) {
    const std::lock_guard lock(mutex_);
    if (wanted)
      elsewhere_.insert(who);
    else
      elsewhere_.erase(who);
    enabled_ = elsewhere_.empty();
  }

  // The bytes that may lie idle.
  void set_limit(size_t bytes) {
    limit_ = bytes;
    drop(beyond(bytes));
  }

  // Returns to the system all that lies idle; false if nothing did.
  bool drop_idle() {
    const auto blocks = beyond(0);
    drop(blocks);
    return !blocks.empty();
  }

 private:
  // At first, an eighth of the memory that this process may have may lie idle.
  Pool() : limit_(memory_limit() / 8) {
    // A child process must not inherit a lock that another thread of its parent held.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
  }

  // The smallest idle block that fits, of equal ones the last used, or a new one.
  Block take(size_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      auto found = by_size_.lower_bound(bytes);
      if (found != by_size_.end() && found->first - bytes <= bytes / 8) {
        found = std::prev(by_size_.upper_bound(found->first));
        const Block block = *found->second;
        by_age_.erase(found->second);
        by_size_.erase(found);
        idle_bytes_ -= block.bytes;
        return block;
      }
    }
    Block block{nullptr, bytes, false};
    const size_t alignment = bytes < kLargePage ? 4096 : kLargePage;
    if (posix_memalign(&block.data, alignment, bytes) == 0) return block;
    if (drop_idle() && posix_memalign(&block.data, alignment, bytes) == 0) return block;
    block.data = nullptr;
    return block;
  }

  // Keeps a block, and returns to the system those that lay idle longest, beyond the limit.
  static void give_back(void* data, void* bytes) {
    Pool& pool = instance();
    {
      const std::lock_guard lock(pool.mutex_);
      pool.by_age_.push_back({data, reinterpret_cast<size_t>(bytes), true});
      pool.by_size_.emplace(pool.by_age_.back().bytes, std::prev(pool.by_age_.end()));
      pool.idle_bytes_ += pool.by_age_.back().bytes;
    }
    drop(pool.beyond(pool.limit_));
  }

  // Takes out the blocks that lay idle longest, until no more than `most` bytes lie idle.
  std::vector<Block> beyond(size_t most) {
    std::vector<Block> out;
    const std::lock_guard lock(mutex_);
    while (idle_bytes_ > most) {
      out.push_back(by_age_.front());
      by_size_.erase(by_size_.lower_bound(out.back().bytes));  // of equal ones the first is the longest idle
      by_age_.pop_front();
      idle_bytes_ -= out.back().bytes;
    }
    return out;
  }

  static void drop(const std::vector<Block>& blocks) {
    for (const Block& block : blocks) std::free(block.data);
  }

  std::atomic<size_t> limit_;
  std::atomic<bool> enabled_ = true;
  std::mutex mutex_;
  std::set<int64_t> elsewhere_;
  std::list<Block> by_age_;  // the idle blocks, the longest idle first
  std::multimap<size_t, std::list<Block>::iterator> by_size_;
  size_t idle_bytes_ = 0;
};

}  // namespace
}  // namespace batchnorm
