// A paged KV cache of random numbers, on host and device, for the tests of rope and attention.
#pragma once

#include <algorithm>
#include <numeric>

#include "cuda_testing.h"
#include "model/cuda/kernels.h"

namespace nibble::cuda::testing {

inline std::vector<uint16_t> random_bits(int64_t count, Element type, float deviation,
                                         std::mt19937& random) {
  std::vector<uint16_t> bits(static_cast<size_t>(count));
  std::normal_distribution<float> normal(0.0f, deviation);
  for (int64_t i = 0; i < count; ++i) {
    store_from_float(bits.data(), i, static_cast<Dtype>(type), normal(random));
  }
  return bits;
}

/// `sequences` of up to `positions` positions each, their pages shuffled.
struct PagedCache {
  Element type;
  int64_t kv_heads, head_dim, sequences, max_pages;
  std::vector<uint16_t> keys, values;
  std::vector<int32_t> table;
  Buffer device_keys, device_values, device_table;

  PagedCache(Element t, int64_t heads, int64_t dim, int64_t count, int64_t positions,
             std::mt19937& random, bool filled = true)
      : type(t),
        kv_heads(heads),
        head_dim(dim),
        sequences(count),
        max_pages((positions + kPagePositions - 1) / kPagePositions),
        keys(static_cast<size_t>(count * max_pages * page_elements(heads, dim))),
        values(keys.size()),
        table(static_cast<size_t>(count * max_pages)),
        device_keys(keys),
        device_values(values),
        device_table(table) {
    std::iota(table.begin(), table.end(), 0);
    std::shuffle(table.begin(), table.end(), random);
    device_table.upload(table.data());
    if (!filled) return;
    for (int64_t s = 0; s < sequences; ++s) {
      for (int64_t p = 0; p < max_pages * kPagePositions; ++p) {
        for (int64_t h = 0; h < kv_heads; ++h) fill(s, p, h, random);
      }
    }
    device_keys.upload(keys.data());
    device_values.upload(values.data());
  }

  void fill(int64_t sequence, int64_t position, int64_t kv_head, std::mt19937& random) {
    const std::vector<uint16_t> k = random_bits(head_dim, type, 1.0f, random);
    const std::vector<uint16_t> v = random_bits(head_dim, type, 1.0f, random);
    for (int64_t c = 0; c < head_dim; ++c) {
      keys[index(sequence, position, kv_head, c)] = k[c];
      values[index(sequence, position, kv_head, c)] = v[c];
    }
  }

  /// Where a channel lies, as kernels.h draws it.
  size_t index(int64_t sequence, int64_t position, int64_t kv_head, int64_t channel) const {
    const int64_t page = table[sequence * max_pages + position / kPagePositions];
    const int64_t t = position % kPagePositions, slice = channel / kKvSlice;
    const int64_t piece = channel % kKvSlice / 8, place = piece ^ (t % 8);
    const int64_t slices = padded_head_dim(head_dim) / kKvSlice;
    return static_cast<size_t>(
        (((page * kv_heads + kv_head) * slices + slice) * kPagePositions + t) * kKvSlice +
        place * 8 + channel % 8);
  }
  double at(const std::vector<uint16_t>& which, int64_t sequence, int64_t position, int64_t kv_head,
            int64_t channel) const {
    return load_as_float(which.data(),
                         static_cast<int64_t>(index(sequence, position, kv_head, channel)),
                         static_cast<Dtype>(type));
  }

  KvPages pages() const {
    KvPages kv;
    kv.type = type;
    kv.keys = device_keys.as<>();
    kv.values = device_values.as<>();
    kv.page_stride = page_elements(kv_heads, head_dim);
    kv.page_table = device_table.as<int32_t>();
    kv.max_pages = max_pages;
    kv.kv_heads = kv_heads;
    kv.head_dim = head_dim;
    return kv;
  }
};

}  // namespace nibble::cuda::testing
