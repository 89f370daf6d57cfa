// A slice of the activations, 512 k, as the slab kernels hold it: fragments of products, and a
// table of minus the sums, and of the scales, of its groups.
#pragma once

#include "gemm/cuda/slab_device.h"

namespace nibble::cuda::slab {

/// The activations that a lane multiplies in one block: two words for each of the 4 product steps.
template <class S>
struct Fragments {
  uint32_t word[S::kHalves][8];
};

/// The 4 times 8 bytes of a lane in one row of a block.
template <class Address, class Load>
__device__ __forceinline__ void load_row(Address from, Load&& load, uint32_t (&word)[8]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint2 v = load(from + 32 * j);
    word[2 * j] = v.x;
    word[2 * j + 1] = v.y;
  }
}

/// The activations of a slice in registers. Not folded: of tokens r (and r + 8). Folded: of token
/// r / 4, block r % 4 alone; in the other blocks the lane multiplies zeros. The last token stands
/// in for those that are absent: nobody reads their sums.
template <class S>
struct HeldSlice {
  Fragments<S> held[S::kFold ? 1 : 4];

  /// load: 8 bytes from an address. Row 0 of the slice at `slice`.
  template <class Address, class Load>
  __device__ __forceinline__ void load(const Place& at, Address slice, int row_bytes, int m,
                                       Load&& load) {
#pragma unroll
    for (int h = 0; h < S::kHalves; ++h) {
      const int token = min(S::kFold ? at.r >> 2 : at.r + 8 * h, m - 1);
      const Address from = slice + token * row_bytes + at.c * 8;
      if constexpr (S::kFold) {
        load_row(from + (at.r & 3) * kBlockDepth, load, held[0].word[h]);
      } else {
#pragma unroll
        for (int u = 0; u < 4; ++u) load_row(from + u * kBlockDepth, load, held[u].word[h]);
      }
    }
  }
  __device__ __forceinline__ Fragments<S> block(const Place& at, int u) const {
    Fragments<S> f = held[S::kFold ? 0 : u];
    if constexpr (S::kFold) {
#pragma unroll
      for (int i = 0; i < 8; ++i) f.word[0][i] = (at.r & 3) == u ? f.word[0][i] : 0;
    }
    return f;
  }
};

// ---- table of a slice: minus the sums, and the scales, of the activations of its groups --------
// Not folded: (group, token) words, so that the pair 2 c, 2 c + 1 is 8 bytes; the scales follow
// all sums. Folded: (token, group), so that the groups of two neighbouring blocks are neighbours.

template <class S>
__device__ __forceinline__ uint32_t table_offset(int group, int token) {
  return 4 * (S::kFold ? token * S::kSlabGroups + group : group * S::kColumns + token);
}
template <class S>
inline constexpr int kScalesOffset = 4 * S::kSlabGroups* S::kColumns;

/// Minus the sums of the codes of each group and token, by a product with ones: each of its rows
/// is the sums. The warp must be synchronized before it reads them.
template <class S, class Slice>
__device__ __forceinline__ void write_sums(const Place& at, uint32_t table, const Slice& slice) {
  constexpr uint32_t kOnes = 0x01010101u;
  const uint4 ones = make_uint4(kOnes, kOnes, kOnes, kOnes);
  constexpr int kGroups = S::kBlockGroups, kGroupSteps = 4 / kGroups;
#pragma unroll
  for (int u = 0; u < (S::kFold ? 1 : 4); ++u) {
    Fragments<S> f;
    if constexpr (S::kFold)
      f = slice.held[0];  // column r: token r / 4, block r % 4
    else
      f = slice.block(at, u);
#pragma unroll
    for (int h = 0; h < S::kHalves; ++h) {
      int sums[kGroups][4] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        ptx::mma_u8s8(sums[j / kGroupSteps], ones, f.word[h][2 * j], f.word[h][2 * j + 1]);
      }
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        if constexpr (S::kFold) {  // columns 2 c, 2 c + 1: token c / 2, two neighbouring blocks
          const int group = 2 * (at.c & 1) * kGroups + i;
          const uint32_t to = table + table_offset<S>(group, at.c >> 1);
          if (at.r == 0) ptx::store4_shared(to, -sums[i][0]);
          if (at.r == 0) ptx::store4_shared(to + 4 * kGroups, -sums[i][1]);
        } else {
          const uint32_t to = table + table_offset<S>(u * kGroups + i, 8 * h + 2 * at.c);
          if (at.r == 0) ptx::store8_shared(to, make_uint2(-sums[i][0], -sums[i][1]));
        }
      }
    }
  }
}

/// A lane's share of the scales of a slice, on their way from global memory, or from where the
/// block has made them, to the table.
template <class S>
struct SliceScales {
  float value[S::kEntries];

  __device__ void load(const Params& p, const Place& at, int slice) {
    load(p, at, slice, [&](int64_t index) { return ptx::load_float(p.scales + index); });
  }
  /// load_one(index) of a matrix (m, p.groups).
  template <class Load>
  __device__ __forceinline__ void load(const Params& p, const Place& at, int slice,
                                       Load&& load_one) {
#pragma unroll
    for (int i = 0; i < S::kEntries; ++i) {
      const int entry = at.lane + 32 * i, token = entry % S::kColumns, group = entry / S::kColumns;
      // groups of more than 128 are several promoted ones; past K the last one stands in
      const int k = slice * kSlabDepth + group * S::kPromoted;
      const int g =
          min(S::kPromoted < kBlockDepth ? k / S::kPromoted : k / p.group_size, p.groups - 1);
      value[i] = 0.0f;
      if (token < p.m && group < S::kSlabGroups) {
        value[i] = load_one(int64_t{token} * p.groups + g);
      }
    }
  }
  __device__ void store(const Place& at, uint32_t table) const {
#pragma unroll
    for (int i = 0; i < S::kEntries; ++i) {
      const int entry = at.lane + 32 * i, token = entry % S::kColumns, group = entry / S::kColumns;
      if (group < S::kSlabGroups) {
        ptx::store_float_shared(table + kScalesOffset<S> + table_offset<S>(group, token), value[i]);
      }
    }
  }
};

}  // namespace nibble::cuda::slab
