#include "model/kv_cache.h"

#include <fmt/format.h>

namespace nibble {
namespace {

int64_t value_slices(int64_t head_dim) { return (head_dim + 63) / 64; }

/// Bytes of the keys or of the values of one (chunk, layer, head).
int64_t keys_bytes(int64_t head_dim, Dtype dtype) {
  return (head_dim * kChunkPositions * dtype_bytes(dtype) + 63) / 64 * 64;
}
int64_t values_bytes(int64_t head_dim, Dtype dtype) {
  return value_slices(head_dim) * 64 * kChunkPositions * dtype_bytes(dtype);
}
int64_t head_bytes(int64_t head_dim, Dtype dtype) {
  return keys_bytes(head_dim, dtype) + values_bytes(head_dim, dtype);
}

}  // namespace

KvCache::KvCache(const ModelConfig& config, Dtype dtype)
    : layers_(config.layers),
      kv_heads_(config.kv_heads),
      head_dim_(config.head_dim),
      dtype_(dtype) {}

Status KvCache::reserve(int64_t positions) {
  const int64_t chunks = (positions + kChunkPositions - 1) / kChunkPositions;
  const int64_t bytes = layers_ * kv_heads_ * head_bytes(head_dim_, dtype_);
  while (static_cast<int64_t>(chunks_.size()) < chunks) {
    Result<AlignedBuffer> chunk = AlignedBuffer::zeroed(static_cast<size_t>(bytes));
    if (!chunk.ok()) {
      return Status(Code::out_of_memory,
                    fmt::format("KV cache: {} for positions {}..{}", chunk.status().message(),
                                chunks_.size() * kChunkPositions, positions - 1));
    }
    chunks_.push_back(std::move(*chunk));
  }
  return {};
}

std::byte* KvCache::keys(int64_t chunk, int64_t layer, int64_t kv_head) {
  return chunks_[static_cast<size_t>(chunk)].data() +
         (layer * kv_heads_ + kv_head) * head_bytes(head_dim_, dtype_);
}

std::byte* KvCache::values(int64_t chunk, int64_t layer, int64_t kv_head) {
  return keys(chunk, layer, kv_head) + keys_bytes(head_dim_, dtype_);
}

uint64_t KvCache::bytes_for(const ModelConfig& config, Dtype dtype, int64_t positions) {
  // parse_model_config bounds the product of all but the positions well below 2^40
  const auto chunks = static_cast<uint64_t>((positions + kChunkPositions - 1) / kChunkPositions);
  uint64_t bytes = 0;
  const auto chunk =
      static_cast<uint64_t>(config.layers * config.kv_heads * head_bytes(config.head_dim, dtype));
  if (__builtin_mul_overflow(chunks, chunk, &bytes)) return UINT64_MAX / 4;
  return bytes;
}

}  // namespace nibble
