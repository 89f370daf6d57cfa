// See kv_pool.h.
#include "model/cuda/kv_pool.h"

#include <fmt/format.h>

#include "gemm/cuda/runtime.h"

namespace nibble::cuda {

PagedSequence::~PagedSequence() { pool_->close(*this); }

Result<KvPool> KvPool::create(const DeviceInfo& device, const KvShape& shape) {
  KvPool pool;
  pool.shape_ = shape;
  const auto bytes = static_cast<size_t>(shape.bytes() / 2);
  NIBBLE_TRY(pool.keys_.allocate_zeroed(bytes, device));
  NIBBLE_TRY(pool.values_.allocate_zeroed(bytes, device));
  pool.host_table_.resize(static_cast<size_t>(shape.pages()));
  NIBBLE_TRY(pool.table_.allocate_zeroed(pool.host_table_.size() * sizeof(int32_t), device));
  for (int64_t page = shape.pages(); page-- > 0;) {
    pool.free_pages_.push_back(static_cast<int32_t>(page));
  }
  for (int64_t slot = shape.sequences; slot-- > 0;) {
    pool.free_slots_.push_back(static_cast<int32_t>(slot));
  }
  return pool;
}

Status KvPool::reserve(PagedSequence& sequence, int64_t positions) {
  if (positions > shape_.context) {
    return Status(Code::out_of_memory,
                  fmt::format("{} tokens of one sequence: memory was taken for {}", positions,
                              shape_.context));
  }
  if (sequence.slot_ < 0) {
    if (free_slots_.empty()) {
      return Status(Code::out_of_memory,
                    fmt::format("memory was taken for {} sequences at once", shape_.sequences));
    }
    sequence.slot_ = free_slots_.back();
    free_slots_.pop_back();
  }
  // Every slot has its share of pages, so there is always one.
  while (static_cast<int64_t>(sequence.pages_.size()) * kPagePositions < positions) {
    const auto at =
        static_cast<size_t>(sequence.slot_ * shape_.max_pages()) + sequence.pages_.size();
    sequence.pages_.push_back(free_pages_.back());
    free_pages_.pop_back();
    host_table_[at] = sequence.pages_.back();
    table_changed_ = true;
  }
  return {};
}

Status KvPool::sync_table(cudaStream_t stream) {
  if (!table_changed_) return {};
  table_changed_ = false;
  return to_status(
      cudaMemcpyAsync(table_.as<>(), host_table_.data(), host_table_.size() * sizeof(int32_t),
                      cudaMemcpyHostToDevice, stream),
      "cudaMemcpyAsync");
}

void KvPool::close(PagedSequence& sequence) {
  free_pages_.insert(free_pages_.end(), sequence.pages_.rbegin(), sequence.pages_.rend());
  if (sequence.slot_ >= 0) free_slots_.push_back(sequence.slot_);
}

KvPages KvPool::layer(int64_t index) const {
  const int64_t page = page_elements(shape_.kv_heads, shape_.head_dim);
  const int64_t offset = index * shape_.pages() * page * 2;
  KvPages pages;
  pages.type = shape_.type;
  pages.keys = keys_.as<std::byte>() + offset;
  pages.values = values_.as<std::byte>() + offset;
  pages.page_stride = page;
  pages.page_table = table_.as<int32_t>();
  pages.max_pages = shape_.max_pages();
  pages.kv_heads = shape_.kv_heads;
  pages.head_dim = shape_.head_dim;
  return pages;
}

}  // namespace nibble::cuda
