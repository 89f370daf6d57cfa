// Weights expanded for the ss kernels: the very bytes that they want in shared memory, so that one
// bulk copy brings what a stage takes. Scratch of a launch, or kept (DeviceWeights::expand); made
// from slabs by expand_sm90.cu.
//
// Block (tile, b): columns C tile .., k 128 b .., at (tile * blocks + b) * block_bytes():
//   one part, of 16-bit weights two (64 k each): C rows of 128 bytes, a column each, k in order;
//     16-byte chunk c of row r at c ^ (r & 7), the 128-byte swizzle. int8, f16, bf16:
//     q - z as such a number; e4m3: 2^-9 (q - z) (byte_columns.h). All exact.
//   C scales as float; of e4m3, 2^9 times the weights'
#pragma once

#include <cstddef>

#include "gemm/cuda/packed.h"

namespace nibble::cuda {

struct SsImage {
  int columns = 192;     // C, those of a thread block: 128 or 192
  int weight_bytes = 1;  // 2: f16 or bf16

  constexpr int part_bytes() const { return columns * 128; }
  constexpr int scale_bytes() const { return columns * 4; }
  constexpr int block_bytes() const { return weight_bytes * part_bytes() + scale_bytes(); }
  /// Whole pairs, since two blocks of a cluster work side by side.
  constexpr int64_t tiles(const PackedLayout& layout) const {
    return (layout.n + 2 * columns - 1) / (2 * columns) * 2;
  }
  /// Blocks of 128 k that hold any.
  static constexpr int64_t blocks(const PackedLayout& layout) {
    return (layout.k + kBlockDepth - 1) / kBlockDepth;
  }
  constexpr size_t bytes(const PackedLayout& layout) const {
    return static_cast<size_t>(tiles(layout) * blocks(layout)) * static_cast<size_t>(block_bytes());
  }
};

/// What DeviceWeights::expand() makes: of 8-bit kernels, whatever the number of rows.
inline constexpr SsImage kKeptImage = {.columns = 128, .weight_bytes = 1};

}  // namespace nibble::cuda
