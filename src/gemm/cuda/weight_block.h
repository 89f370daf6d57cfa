// A weight in one block of device memory that the caller owns: the slabs of packed.h, then the
// bias. Device memory cannot be read without a wait, so nothing in it describes it: K, N and the
// group size are those of the plan, and the size of the block tells the rest, because it is
//
//     256 * lines + 8 * (1 + (1 if scales are bf16) + (2 if there is a bias))
//
// where lines hold the slabs, and the bias from the next line on. Weights of the CPU have a
// multiple of 64 bytes: the one is never taken for the other. Pure arithmetic.
#pragma once

#include <cstddef>

#include "gemm/cuda/packed.h"

namespace nibble::cuda {

inline constexpr size_t kBlockLine = 256;

struct WeightBlock {
  bool bf16_scales = false, has_bias = false;
  size_t bias_offset = 0;
  size_t bytes = 0;
};

constexpr size_t whole_lines(size_t bytes) {
  return (bytes + kBlockLine - 1) / kBlockLine * kBlockLine;
}

constexpr WeightBlock weight_block(const PackedLayout& layout, bool bf16_scales, bool has_bias) {
  WeightBlock b;
  b.bf16_scales = bf16_scales;
  b.has_bias = has_bias;
  b.bias_offset = whole_lines(static_cast<size_t>(layout.bytes()));
  const size_t bias = has_bias ? whole_lines(static_cast<size_t>(layout.n) * sizeof(float)) : 0;
  b.bytes = b.bias_offset + bias + 8 * (1u + (bf16_scales ? 1u : 0u) + (has_bias ? 2u : 0u));
  return b;
}

}  // namespace nibble::cuda
