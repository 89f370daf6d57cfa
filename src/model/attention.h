// Attention of one layer over a batch: norms and rope of q and k, storing k and v, and softmax
// attention with causal and sliding masks. Keys are met in blocks of 64 at fixed positions, with a
// running softmax, so every query's result is the same bits in a batch, in a prompt cut in any way,
// and with any number of threads.
#pragma once

#include <span>
#include <vector>

#include "base/status.h"
#include "model/config.h"
#include "model/kv_cache.h"

namespace nibble {

/// Some consecutive tokens of one sequence: rows [row, row + count) of the batch are its positions
/// [cache->length(), cache->length() + count). The caller has reserved them and sets the length
/// after the last layer.
struct BatchSpan {
  KvCache* cache = nullptr;
  int64_t row = 0, count = 0;
};

struct AttentionInput {
  const ModelConfig* config = nullptr;
  int64_t layer = 0;
  std::span<const BatchSpan> batch;
  float* qkv = nullptr;  // (rows, q | k | v); q and k are changed in place
  int64_t qkv_stride = 0;
  const float* q_norm = nullptr;  // (head_dim) or null
  const float* k_norm = nullptr;
  const float* cosine = nullptr;  // (rows, head_dim / 2)
  const float* sine = nullptr;
  float* out = nullptr;  // (rows, heads * head_dim)
  int threads = 1;
};

/// non_finite if a key or value is NaN or beyond the range of the cache's type.
Status attend(const AttentionInput& input);

}  // namespace nibble
