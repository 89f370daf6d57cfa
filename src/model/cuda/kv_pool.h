// Keys and values of all sequences on a GPU: one pool of pages of 64 positions
// (model/cuda/kernels.h draws one), handed out as sequences grow. All memory is taken at the start;
// nothing is allocated while models run.
#pragma once

#include <vector>

#include "gemm/cuda/device_buffer.h"
#include "model/cuda/kernels.h"
#include "model/sequence_cache.h"

namespace nibble::cuda {

class KvPool;

/// A sequence of the pool; its pages go back when it is destroyed. Not thread-safe, like the pool.
class PagedSequence : public SequenceCache {
 public:
  ~PagedSequence() override;
  int64_t length() const override { return length_; }
  void set_length(int64_t length) override { length_ = length; }
  int32_t slot() const { return slot_; }  // row of the page table; -1 before the first reserve()

 private:
  friend class KvPool;
  explicit PagedSequence(KvPool& pool) : pool_(&pool) {}
  KvPool* pool_;
  int32_t slot_ = -1;
  int64_t length_ = 0;
  std::vector<int32_t> pages_;
};

/// What a pool is for.
struct KvShape {
  int64_t layers = 0, kv_heads = 0, head_dim = 0;
  Element type = Element::bf16;  // 16 bits
  int64_t sequences = 0;         // at once
  int64_t context = 0;           // positions of each, at most

  int64_t max_pages() const { return (context + kPagePositions - 1) / kPagePositions; }
  int64_t pages() const { return sequences * max_pages(); }
  /// Of keys and values together.
  int64_t bytes() const { return 2 * layers * pages() * page_elements(kv_heads, head_dim) * 2; }
};

class KvPool {
 public:
  static Result<KvPool> create(const DeviceInfo& device, const KvShape& shape);

  std::unique_ptr<PagedSequence> open() {
    return std::unique_ptr<PagedSequence>(new PagedSequence(*this));
  }
  /// Pages for positions [0, positions). out_of_memory says what the pool was made for.
  Status reserve(PagedSequence& sequence, int64_t positions);
  /// Brings the table on the device up to date, on `stream`. The host copy is not changed before
  /// the stream has been waited for.
  Status sync_table(cudaStream_t stream);

  KvPages layer(int64_t index) const;
  const KvShape& shape() const { return shape_; }

 private:
  friend class PagedSequence;
  void close(PagedSequence& sequence);

  KvShape shape_;
  DeviceBuffer keys_, values_, table_;
  std::vector<int32_t> host_table_;  // (sequences, max_pages)
  bool table_changed_ = true;
  std::vector<int32_t> free_pages_, free_slots_;  // the next one is the last
};

}  // namespace nibble::cuda
