// Keys and values of one sequence, for all layers. Grows by chunks of 64 positions, so a short
// sequence takes little memory and a long one never moves.
//
// A chunk holds, per layer and KV head, two panels (gemm/dense.h): keys transposed, so that one
// vector is 64 positions of one channel; values as they are, one vector is channels of a position.
//   keys   (head_dim, 64 positions)
//   values (head_dim / 64 slices, 64 positions, 64 channels)   head_dim padded to 64
#pragma once

#include <cstdint>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/dtype.h"
#include "base/status.h"
#include "model/config.h"
#include "model/sequence_cache.h"

namespace nibble {

inline constexpr int64_t kChunkPositions = 64;

class KvCache : public SequenceCache {
 public:
  /// dtype: f16, bf16 or f32 of what is stored. Allocates nothing yet.
  KvCache(const ModelConfig& config, Dtype dtype);

  /// Makes room for `positions` in all; what is there stays. out_of_memory if there is none.
  Status reserve(int64_t positions);
  int64_t length() const override { return length_; }
  /// Lengthened by the model, after the last layer has written new positions.
  void set_length(int64_t length) override { length_ = length; }

  Dtype dtype() const { return dtype_; }
  /// Panels of the chunk that starts at position chunk * 64.
  std::byte* keys(int64_t chunk, int64_t layer, int64_t kv_head);
  std::byte* values(int64_t chunk, int64_t layer, int64_t kv_head);

  /// Bytes that `positions` of one sequence take.
  static uint64_t bytes_for(const ModelConfig& config, Dtype dtype, int64_t positions);

 private:
  int64_t layers_, kv_heads_, head_dim_;
  Dtype dtype_;
  int64_t length_ = 0;
  std::vector<AlignedBuffer> chunks_;
};

}  // namespace nibble
