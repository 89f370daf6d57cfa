// Layout of one weight on a CUDA device: the only one, read by every kernel from M = 1 on. Pure
// arithmetic, shared by host and device code.
//
// The unit is the slab: 16 columns x 512 k. Slab (tile, slice), columns 16 tile .., k 512 slice ..,
// lies at (tile * slices + slice) * slab_bytes:
//
//     0                                                    4096           + 32 P       + 8 P
//     | block 0 | block 1 | block 2 | block 3 (128 k each) | scales       | zero points |
//
//   block   two halves h of 32 lanes x 16 bytes, the A operands of mma.m16n8k32 and, in registers,
//           of wgmma m64k32. Lane 4 r + c owns columns r and r + 8. Product step j (0..3) takes the
//           k from 32 j to 32 j + 31 of the block, so that groups of 32 and 64 end between steps.
//           Byte b of word w of half h, with k0 = 64 h + 8 c:
//               w = 0: q[k0 + b][r]      (low nibble: step 2 h)  q[k0 + 32 + b][r]  (high: 2 h + 1)
//               w = 1: the same for column r + 8
//               w = 2: q[k0 + 4 + b][r]  (low nibble)            q[k0 + 36 + b][r]  (high nibble)
//               w = 3: the same for column r + 8
//           In step j a lane meets the 8 neighbouring activations from 32 j + 8 c on: operand B.
//   P       groups of a slab: 512 / promoted, promoted = 32, 64 or 128
//   scales  [r 0..7][P][2] as in the checkpoint (fp16 or bf16): columns r and r + 8
//   zeros   [r 0..7][P] bytes: column r in the low nibble, column r + 8 in the high one
//
// Rows past K, and columns past N, have codes, zero points and scales 0. A group longer than 128 is
// stored as blocks of 128 with the same scale and zero point: 4.156 bits a weight at g >= 128.
#pragma once

#include <cstdint>

namespace nibble::cuda {

inline constexpr int kSlabColumns = 16;
inline constexpr int kSlabDepth = 512;
inline constexpr int kBlockDepth = 128;
inline constexpr int kSlabCodeBytes = kSlabColumns * kSlabDepth / 2;

/// Longest run of k whose integer sum is promoted to float at once. 128 also where all of a short K
/// is one group.
constexpr int64_t promoted_depth(int64_t group_size) {
  return group_size == 32 || group_size == 64 ? group_size : kBlockDepth;
}

struct PackedLayout {
  int64_t n = 0, k = 0, group_size = 0;
  int64_t tiles = 0, slices = 0;  // of 16 columns; of 512 k
  int promoted = 0;               // 32, 64 or 128
  int slab_groups = 0;            // 512 / promoted
  int slab_bytes = 0;             // a multiple of 16

  constexpr int64_t bytes() const { return tiles * slices * slab_bytes; }
  constexpr int64_t padded_k() const { return slices * kSlabDepth; }
  constexpr int zeros_offset() const { return kSlabCodeBytes + slab_groups * 32; }
};

/// group_size: 32, 64, a multiple of 128, or k itself.
constexpr PackedLayout packed_layout(int64_t n, int64_t k, int64_t group_size) {
  PackedLayout p;
  p.n = n;
  p.k = k;
  p.group_size = group_size;
  p.tiles = (n + kSlabColumns - 1) / kSlabColumns;
  p.slices = (k + kSlabDepth - 1) / kSlabDepth;
  p.promoted = static_cast<int>(promoted_depth(group_size));
  p.slab_groups = kSlabDepth / p.promoted;
  p.slab_bytes = kSlabCodeBytes + p.slab_groups * 40;
  return p;
}

}  // namespace nibble::cuda
