// How each kernel that has choices is launched: what plans fill in and launch functions read. Plain
// C++, so that plans need no CUDA header.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gemm/cuda/packed.h"

namespace nibble::cuda {

/// Of w4a8_slab_sm90.
struct SlabConfig {
  int k_warps = 0;     // warps along K
  int tile_warps = 0;  // column tiles worked on at once by a block
  int slices = 0;      // slices per warp; 0: one slice, its activations stay in registers
  int stages = 0;      // ring depth, 1..3
  int blocks = 0;      // asked for; the tiles are dealt out evenly
  bool programmatic = false;
};

/// Of w4a8_rs_sm90.
struct RsConfig {
  int token_tile = 128;
  bool split_tail = false;
  int multiprocessors = 132;
  bool programmatic = false;
};
/// Of its scratch, which is zeroed once before its first use and left so. Pure: rs_plan.cc.
size_t rs_scratch_bytes(const PackedLayout& layout, int64_t m, const RsConfig& config);

}  // namespace nibble::cuda
