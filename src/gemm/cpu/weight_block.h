// A packed weight as one block of memory that describes itself: a header, then what
// packed_weights.h draws. It holds no pointers, so it may be copied, mapped or lie in a tensor of
// another library.
//
//   0   magic "NIBWEIG1"     8  k        16  n        24  group size   (int64)
//   32  scale dtype (int32)  36 bias: 0 or 1 (int32)  40  bytes of all, this header included
//   48  bytes mapped, of a block that nibble_weight_create made; else 0
//   56  check: a hash of the first 48 bytes
//   64  blocks of 32 columns, then the bias
#pragma once

#include <cstddef>
#include <cstdint>

#include "gemm/cpu/packed_weights.h"

namespace nibble {

struct WeightHeader {
  uint64_t magic = 0;
  int64_t k = 0, n = 0, group_size = 0;
  int32_t scale_dtype = 0, has_bias = 0;
  uint64_t bytes = 0;
  uint64_t mapped = 0;
  uint64_t check = 0;
};
static_assert(sizeof(WeightHeader) == kLineBytes);

/// Size of the block of `matrix`.
Result<size_t> weight_block_bytes(const QuantMatrix& matrix, bool has_bias);

/// Writes the block of `source` to `memory`, 64-byte aligned, of `bytes` =
/// weight_block_bytes(). zeroed: the memory is known to be zero. threads <= 0: all.
Status write_weight_block(const PackSource& source, int threads, void* memory, size_t bytes,
                          bool zeroed);

/// A view of the block at `memory`, of which at least a header can be read. Null, unaligned memory
/// and what is no block are refused, by `name`. Allocates nothing if it succeeds.
Result<PackedWeights> open_weight_block(const void* memory, const char* name = "weight");

}  // namespace nibble
