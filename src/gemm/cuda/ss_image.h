// Weights expanded to 8 bits for w4a8_ss_sm90: the very bytes that the kernel wants in shared
// memory, so that one bulk copy brings a block. Scratch of a launch, made from slabs by
// expand_sm90.cu.
//
// Block (tile, b): columns 192 tile .., k 128 b .., at (tile * blocks + b) * kImageBytes:
//   192 rows of 128 bytes, a column each, k in order; 16-byte chunk c of row r at c ^ (r & 7), the
//   128-byte swizzle. int8: q - z; e4m3: q - z as an e4m3 number, exact.
//   192 scales as float
#pragma once

#include <cstddef>

#include "gemm/cuda/packed.h"

namespace nibble::cuda {

inline constexpr int kImageColumns = 192;
inline constexpr int kImageScales = kImageColumns * kBlockDepth;  // where they begin
inline constexpr int kImageBytes = kImageScales + kImageColumns * 4;

/// Tiles of an image: whole pairs, since two blocks of a cluster work side by side.
constexpr int64_t image_tiles(const PackedLayout& layout) {
  return (layout.n + 2 * kImageColumns - 1) / (2 * kImageColumns) * 2;
}
/// Blocks of 128 k that hold any.
constexpr int64_t image_blocks(const PackedLayout& layout) {
  return (layout.k + kBlockDepth - 1) / kBlockDepth;
}
constexpr size_t image_bytes(const PackedLayout& layout) {
  return static_cast<size_t>(image_tiles(layout) * image_blocks(layout)) * kImageBytes;
}

}  // namespace nibble::cuda
