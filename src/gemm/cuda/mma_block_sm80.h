// A block of the mma.sync kernels for many rows: eight warps, 4 x 2, make 128 columns x kTokens
// rows of x; a warp 32 columns (two tiles of a slab) x kTokens / 2. Of a lane, lane = 4 r + c, are
// columns r and r + 8 of a tile and rows 2 c and 2 c + 1 of eight. Device code only.
//
// A Shape has kTokenTiles, of eight rows, of a warp; and kGroupScales: y is the sum itself, not
// times the scale of its row, if there are such scales.
#pragma once

#include "gemm/cuda/mma_sm80.h"

namespace nibble::cuda::mma {

constexpr int kThreads = 256;
constexpr int kBlockColumns = 128;
constexpr int kTiles = kBlockColumns / kSlabColumns;
constexpr int kWarpTiles = 2, kColumnWarps = kTiles / kWarpTiles, kTokenWarps = 2;
static_assert(32 * kColumnWarps * kTokenWarps == kThreads);

struct Position {
  int tile, token;  // first of the block
  int lane, r, c;
  int warp_tile, warp_token;  // first of the warp, within the block
};

__device__ __forceinline__ Position position(int block_tokens) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Position p;
  p.token = static_cast<int>(blockIdx.x) * block_tokens;
  p.tile = static_cast<int>(blockIdx.y) * kTiles;
  p.lane = lane;
  p.r = lane / 4;
  p.c = lane % 4;
  p.warp_tile = warp % kColumnWarps * kWarpTiles;
  p.warp_token = warp / kColumnWarps * (block_tokens / kTokenWarps);
  return p;
}

template <class S>
using Accumulators = float[kWarpTiles][S::kTokenTiles][4];

/// Starts the copies of a slice's scales and zero points, kBytes of each of the block's tiles.
/// Tiles past N repeat the last one.
template <int kBytes>
__device__ __forceinline__ void copy_scales(const GemmArgs& a, const Position& p, int slice,
                                            uint32_t to) {
  constexpr int kPieces = kBytes / 16;
  const int last_tile = static_cast<int>(a.layout.tiles) - 1;
  for (int piece = threadIdx.x; piece < kTiles * kPieces; piece += kThreads) {
    const int tile = min(p.tile + piece / kPieces, last_tile);
    ptx::copy16_async(to + piece * 16, a.slabs +
                                           (tile * a.layout.slices + slice) * a.layout.slab_bytes +
                                           kSlabCodeBytes + piece % kPieces * 16);
  }
}

/// acc = fma(s [* factor], scale, acc) for a lane's sums of one tile and eight rows. factor: of
/// rows 2 c and 2 c + 1, for scales per (token, group).
template <bool kGroupScales>
__device__ __forceinline__ void promote(float (&s)[4], const float (&factor)[2], float2 scale,
                                        float (&acc)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kGroupScales) s[i] = s[i] * factor[i % 2];
    acc[i] = __fmaf_rn(s[i], i < 2 ? scale.x : scale.y, acc[i]);
  }
}

/// Columns `column` (even) and the next, of one row.
__device__ __forceinline__ void store_pair(const Output& out, int64_t row, int column, int n,
                                           float2 y, bool paired) {
  const int64_t at = row * out.stride + column;
  const bool both = column + 1 < n;
  if (out.type == Element::f32) {
    float* to = static_cast<float*>(out.y) + at;
    if (paired && both) {
      *reinterpret_cast<float2*>(to) = y;
      return;
    }
    to[0] = y.x;
    if (both) to[1] = y.y;
    return;
  }
  auto* to = static_cast<unsigned short*>(out.y) + at;
  const uint32_t first = bits16(y.x, out.type), second = bits16(y.y, out.type);
  if (paired && both) {
    *reinterpret_cast<uint32_t*>(to) = first | second << 16;
    return;
  }
  to[0] = static_cast<unsigned short>(first);
  if (both) to[1] = static_cast<unsigned short>(second);
}

/// Lanes of columns r and r + 1 (r even) swap a value each, so that each has two neighbours of one
/// row: the even one those of row 2 c, the odd one those of row 2 c + 1.
template <class S>
__device__ __forceinline__ void store_outputs(const GemmArgs& a, const Position& p,
                                              const Accumulators<S>& acc) {
  const bool odd = p.r % 2 != 0;
  const int n_end = static_cast<int>(a.layout.n);
  const int element = a.out.type == Element::f32 ? 4 : 2;
  const bool paired =
      reinterpret_cast<uintptr_t>(a.out.y) % (2 * element) == 0 && a.out.stride % 2 == 0;
#pragma unroll
  for (int n = 0; n < S::kTokenTiles; ++n) {
    const int row = p.token + p.warp_token + n * 8 + 2 * p.c + (odd ? 1 : 0);
    const bool inside = row < a.m;
    const float t = S::kGroupScales || a.scales == nullptr || !inside ? 1.0f : a.scales[row];
#pragma unroll
    for (int tile = 0; tile < kWarpTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float first = acc[tile][n][2 * half], second = acc[tile][n][2 * half + 1];
        const float other = __shfl_xor_sync(0xffffffffu, odd ? first : second, 4);
        float2 y = odd ? float2{other, second} : float2{first, other};
        const int column = (p.tile + p.warp_tile + tile) * kSlabColumns + half * 8 + p.r / 2 * 2;
        if (!inside || column >= n_end) continue;
        y.x = finish(y.x, t, a.out.bias, column);
        y.y = finish(y.y, t, a.out.bias, min(column + 1, n_end - 1));
        store_pair(a.out, row, column, n_end, y, paired);
      }
    }
  }
}

}  // namespace nibble::cuda::mma
