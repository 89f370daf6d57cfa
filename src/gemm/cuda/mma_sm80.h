// What the mma.sync kernels for sm_80 share: weights of a slab as the A operand of m16n8k32, sums
// that need no conversion, rounding to y. Device code only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "gemm/cuda/kernels.h"
#include "gemm/cuda/ptx.h"
#include "gemm/cuda/slab_scales.h"

namespace nibble::cuda::mma {

constexpr int kTileBytes = kSlabColumns * kBlockDepth / 2;  // 128 k of a slab
constexpr int kSteps = kBlockDepth / 32;                    // products of 32 k in them
constexpr int kSliceBlocks = kSlabDepth / kBlockDepth;

/// 1.5 * 2^23 as bits: a sum that starts from it is, read as a float, that much too large, exactly
/// as long as |sum| < 2^22 (15 * 128 * 128 < 2^18). It saves the conversion, slow on sm_80.
constexpr int kMagicBits = 0x4b400000;
constexpr float kMagic = 12582912.0f;

/// What follows from the promoted depth.
template <int promoted>
struct Depth {
  static constexpr int kGroups = kBlockDepth / promoted, kSlabGroups = kSlabDepth / promoted;
  static constexpr int kGroupSteps = kSteps / kGroups;
  static constexpr int kScaleBytes = kSlabGroups * 40;  // of a slab, zero points included
};

/// Groups of K, and blocks of 128 k in one if it is that long.
struct Groups {
  int count = 1, blocks = 1;
};
inline Groups groups_of(const PackedLayout& layout) {
  const int64_t blocks = (layout.group_size + kBlockDepth - 1) / kBlockDepth;
  return {static_cast<int>(layout.k / layout.group_size), static_cast<int>(blocks)};
}

/// Four codes minus a zero point, as int8. guard is 128 - zero point in each byte: no byte borrows.
__device__ __forceinline__ uint32_t minus_zero(uint32_t codes, uint32_t guard) {
  return ((codes & 0x0f0f0f0fu) + guard) ^ 0x80808080u;
}

/// A lane's part of one tile of a stage.
template <int promoted>
struct TileOperand {
  uint32_t a[kSteps][4];
  float2 scale[Depth<promoted>::kGroups];  // columns r and r + 8
};

/// codes, scales: shared memory addresses of the 128 k, and of the slab's scales; block: which 128
/// k of the slab.
template <int promoted>
__device__ __forceinline__ TileOperand<promoted> load_tile(uint32_t codes, uint32_t scales,
                                                           int block, int lane, bool bf16) {
  using D = Depth<promoted>;
  TileOperand<promoted> t;
  const int first_group = lane / 4 * D::kSlabGroups + block * D::kGroups;
  uint32_t guard[D::kGroups][2];
#pragma unroll
  for (int g = 0; g < D::kGroups; ++g) {
    t.scale[g] = scales_of(ptx::load4_shared(scales + (first_group + g) * 4), bf16);
    const uint32_t both = ptx::load1_shared(scales + D::kSlabGroups * 32 + first_group + g);
    guard[g][0] = ptx::opaque(0x80808080u - (both & 15) * 0x01010101u);
    guard[g][1] = ptx::opaque(0x80808080u - (both >> 4) * 0x01010101u);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 v = ptx::load16_shared(codes + half * (kTileBytes / 2) + lane * 16);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int low = 2 * half, high = low + 1;
      t.a[low][w] = minus_zero(words[w], guard[low / D::kGroupSteps][w % 2]);
      t.a[high][w] = minus_zero(words[w] >> 4, guard[high / D::kGroupSteps][w % 2]);
    }
  }
  return t;
}

/// A lane's eight activations of each step. row: shared memory address of the row of x that is the
/// lane's, whose 32 bytes of step j lie at step j ^ (row % 4): the 8 bytes of all lanes of half a
/// warp are then in different banks.
__device__ __forceinline__ void load_row(uint32_t row, int lane, uint2 (&b)[kSteps]) {
#pragma unroll
  for (int j = 0; j < kSteps; ++j) {
    b[j] = ptx::load8_shared(row + (j ^ (lane / 4 % 4)) * 32 + lane % 4 * 8);
  }
}

/// Where load_row() wants the 16-byte piece `piece` of row `row`.
__device__ __forceinline__ int row_piece(int row, int piece) {
  return row * kBlockDepth + (piece ^ (row % 4 * 2)) * 16;
}

/// The sums of group g, 16 columns x 8 rows of x, as floats.
template <int promoted>
__device__ __forceinline__ void group_sums(const TileOperand<promoted>& tile,
                                           const uint2 (&b)[kSteps], int g, float (&s)[4]) {
  constexpr int kGroupSteps = Depth<promoted>::kGroupSteps;
  int sum[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
#pragma unroll
  for (int j = 0; j < kGroupSteps; ++j) {
    ptx::mma_s8s8(sum, tile.a[g * kGroupSteps + j], b[g * kGroupSteps + j], sum);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) s[i] = __int_as_float(sum[i]) - kMagic;
}

/// v as an element of 16 bits.
__device__ __forceinline__ uint32_t bits16(float v, Element type) {
  return type == Element::f16 ? __half_as_ushort(__float2half_rn(v))
                              : __bfloat16_as_ushort(__float2bfloat16_rn(v));
}

/// acc * t + bias. With scales per group t is 1, which changes nothing.
__device__ __forceinline__ float finish(float acc, float t, const float* bias, int column) {
  return bias != nullptr ? __fmaf_rn(acc, t, bias[column]) : acc * t;
}

}  // namespace nibble::cuda::mma
