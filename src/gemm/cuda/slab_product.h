// One slab times a slice of the activations.
#pragma once

#include "gemm/cuda/slab_scales.h"
#include "gemm/cuda/slab_slice.h"

namespace nibble::cuda::slab {

/// Codes of one block of a lane: its two halves.
struct Codes {
  uint4 half[2];

  Codes() = default;
  __device__ __forceinline__ Codes(uint32_t slab, const Place& at, int block) {
    half[0] = ptx::load16_shared(slab + block * 1024 + at.lane * 16);
    half[1] = ptx::load16_shared(slab + block * 1024 + 512 + at.lane * 16);
  }
};

__device__ __forceinline__ uint4 mask(uint4 v, uint32_t m) {
  return make_uint4(v.x & m, v.y & m, v.z & m, v.w & m);
}

/// Integer sums of the groups of a half block, or of the one group of a block. High nibbles are
/// multiplied where they are, 16 times too large.
template <class S>
struct Sums {
  int low[4] = {}, high[4] = {};

  /// Half a block: `codes`, and the activations of its two product steps.
  __device__ __forceinline__ void add(const uint4& codes, const uint32_t* b) {
    ptx::mma_u8s8(low, mask(codes, 0x0f0f0f0fu), b[0], b[1]);
    ptx::mma_u8s8(high, mask(codes, 0xf0f0f0f0u), b[2], b[3]);
  }
  /// Sum of q * a of group i.
  __device__ __forceinline__ int of(int i, int e) const {
    if constexpr (S::kSetGroups == 2)
      return i == 0 ? low[e] : high[e] >> 4;
    else
      return low[e] + (high[e] >> 4);
  }
};

/// One step of an output's chain: the sum of a group, less its zero point, times the scales.
/// less: minus the sum of the activations.
template <class S>
__device__ __forceinline__ float promote(int sum, int zero, int less, float token_scale,
                                         float scale, float acc) {
  float value = __int2float_rn(sum + zero * less);
  if constexpr (S::kGroupScales) value = __fmul_rn(value, token_scale);
  return __fmaf_rn(value, scale, acc);
}

/// `count` words, a power of two, that lie at an address aligned to them.
template <int count>
__device__ __forceinline__ void load_words(uint32_t address, uint32_t (&to)[count]) {
  if constexpr (count == 1) to[0] = ptx::load4_shared(address);
  if constexpr (count == 2) {
    const uint2 v = ptx::load8_shared(address);
    to[0] = v.x, to[1] = v.y;
  }
  if constexpr (count >= 4) {
#pragma unroll
    for (int i = 0; i < count; i += 4) {
      const uint4 v = ptx::load16_shared(address + 4 * i);
      to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
    }
  }
}

/// Folded: acc[0], acc[1] are columns r and r + 8 of token c / 2, the sum of two blocks each: 0 and
/// 1 if c is even, 2 and 3 if it is odd.
template <class S, class Slice>
__device__ __forceinline__ void multiply_folded(const Place& at, uint32_t slab, uint32_t table,
                                                bool bf16, const Slice& slice, float (&acc)[2]) {
  constexpr int kGroups = S::kBlockGroups, kMine = 2 * kGroups;  // of a block; of a lane
  Codes codes[4];
#pragma unroll
  for (int u = 0; u < 4; ++u) codes[u] = Codes(slab, at, u);
  const int first = (at.c & 1) * kMine;
  uint32_t scale[kMine], less[kMine], token_scale[kMine] = {}, zero[(kMine + 3) / 4];
  const uint32_t words = slab + kSlabCodeBytes;
  load_words(words + (at.r * S::kSlabGroups + first) * 4, scale);
  // zero points: bytes, one a group
  const uint32_t bytes = words + S::kSlabGroups * 32 + at.r * S::kSlabGroups + first;
  if constexpr (kMine == 2)
    zero[0] = ptx::load4_shared(bytes & ~3u) >> (8 * first);
  else
    load_words(bytes, zero);
  const uint32_t mine = table + table_offset<S>(first, at.c >> 1);
  load_words(mine, less);
  if constexpr (S::kGroupScales) load_words(mine + kScalesOffset<S>, token_scale);

  Sums<S> sums[S::kSets];
#pragma unroll
  for (int u = 0; u < 4; ++u) {
    const Fragments<S> f = slice.block(at, u);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sums[half / S::kSetHalves].add(codes[u].half[half], f.word[0] + 4 * half);
    }
  }
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int odd = i / kGroups, set = i % kGroups / S::kSetGroups, group = i % S::kSetGroups;
    const float2 s = scales_of(scale[i], bf16);
    const uint32_t z = zero[i / 4] >> (8 * (i % 4));
    const float t = __uint_as_float(token_scale[i]);
    const int of_token = static_cast<int>(less[i]);
    acc[0] = promote<S>(sums[set].of(group, odd), z & 15, of_token, t, s.x, acc[0]);
    acc[1] = promote<S>(sums[set].of(group, 2 + odd), z >> 4 & 15, of_token, t, s.y, acc[1]);
  }
}

template <class S, class Slice>
__device__ __forceinline__ void multiply_plain(const Place& at, uint32_t slab, uint32_t table,
                                               bool bf16, const Slice& slice,
                                               float (&acc)[S::kHalves][4]) {
  constexpr int kGroups = S::kBlockGroups;
  const uint32_t words = slab + kSlabCodeBytes + at.r * S::kSlabGroups * 4;
  const uint32_t bytes = slab + kSlabCodeBytes + S::kSlabGroups * 32 + at.r * S::kSlabGroups;
  // With 8 tokens there are registers for all loads of a slab at once.
  constexpr bool kAtOnce = S::kHalves == 1;
  Codes codes[4];
  uint32_t all_scales[4], all_zeros = 0;
  if constexpr (kAtOnce && kGroups == 1) {
    load_words(words, all_scales);
    all_zeros = ptx::load4_shared(bytes);
  }
  if constexpr (kAtOnce) {
#pragma unroll
    for (int u = 0; u < 4; ++u) codes[u] = Codes(slab, at, u);
  }
#pragma unroll
  for (int u = 0; u < 4; ++u) {
    if constexpr (!kAtOnce) codes[u] = Codes(slab, at, u);
    uint32_t scale[kGroups], zeros;
    if constexpr (kAtOnce && kGroups == 1) {
      scale[0] = all_scales[u];
      zeros = all_zeros >> (8 * u);
    } else {
      load_words(words + 4 * kGroups * u, scale);
      constexpr int kBlocks = 4 / kGroups;  // whose zero points are in one word
      zeros = ptx::load4_shared(bytes + 4 * (u / kBlocks)) >> (32 / kBlocks * (u % kBlocks));
    }
    const Fragments<S> f = slice.block(at, u);
#pragma unroll
    for (int set = 0; set < S::kSets; ++set) {
      Sums<S> sums[S::kHalves];
#pragma unroll
      for (int half = set * S::kSetHalves; half < (set + 1) * S::kSetHalves; ++half) {
#pragma unroll
        for (int h = 0; h < S::kHalves; ++h) sums[h].add(codes[u].half[half], f.word[h] + 4 * half);
      }
#pragma unroll
      for (int i = 0; i < S::kSetGroups; ++i) {
        const int group = set * S::kSetGroups + i;
        const float2 s = scales_of(scale[group], bf16);
        const int z = zeros >> (8 * group);
#pragma unroll
        for (int h = 0; h < S::kHalves; ++h) {
          const uint32_t entry = table + table_offset<S>(u * kGroups + group, 8 * h + 2 * at.c);
          const uint2 less = ptx::load8_shared(entry);
          uint2 t = make_uint2(0, 0);
          if constexpr (S::kGroupScales) t = ptx::load8_shared(entry + kScalesOffset<S>);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            acc[h][e] =
                promote<S>(sums[h].of(i, e), (e < 2 ? z : z >> 4) & 15,
                           static_cast<int>(e % 2 ? less.y : less.x),
                           __uint_as_float(e % 2 ? t.y : t.x), e < 2 ? s.x : s.y, acc[h][e]);
          }
        }
      }
    }
  }
}

/// Float sums of one warp for one tile.
template <class S>
struct Accumulator {
  float plain[S::kHalves][4] = {};  // folded: plain[0][0], [0][1]

  /// Adds a slab. table: of the slab's slice.
  template <class Slice>
  __device__ __forceinline__ void add(const Place& at, uint32_t slab, uint32_t table, bool bf16,
                                      const Slice& slice) {
    if constexpr (S::kFold) {
      float pair[2] = {plain[0][0], plain[0][1]};
      multiply_folded<S>(at, slab, table, bf16, slice, pair);
      plain[0][0] = pair[0];
      plain[0][1] = pair[1];
    } else {
      multiply_plain<S>(at, slab, table, bf16, slice, plain);
    }
  }

  // A partial is S::kPartialBytes. Not folded: of each half of the tokens 16 bytes a lane, where
  // lane 4 r + c goes to place 4 r + (c ^ r / 2), so that reduce() meets no bank conflict.
  // Folded: [r][token][column r, column r + 8].
  __device__ static uint32_t place_of(int r, int c, uint32_t partial) {
    if constexpr (S::kFold) return partial + r * 16 + (c >> 1) * 8;
    return partial + (4 * r + (c ^ (r >> 1))) * 16;
  }
  __device__ static uint32_t added(uint32_t bits, float x) {
    return __float_as_uint(__uint_as_float(bits) + x);
  }
  /// `onto`: adds to what is there.
  __device__ __forceinline__ void store(uint32_t partial, bool onto = false) {
    const int lane = ptx::lane(), r = lane >> 2, c = lane & 3;
    const uint32_t to = place_of(r, c, partial);
    if constexpr (S::kFold) {
      float x = plain[0][0] + __shfl_xor_sync(~0u, plain[0][0], 1);
      float y = plain[0][1] + __shfl_xor_sync(~0u, plain[0][1], 1);
      if (c % 2 != 0) return;
      if (onto) {
        const uint2 old = ptx::load8_shared(to);
        x += __uint_as_float(old.x);
        y += __uint_as_float(old.y);
      }
      ptx::store_float2_shared(to, x, y);
    } else {
#pragma unroll
      for (int h = 0; h < S::kHalves; ++h) {
        uint4 old = make_uint4(0, 0, 0, 0);
        if (onto) old = ptx::load16_shared(to + 512 * h);
        const uint4 sum = make_uint4(added(old.x, plain[h][0]), added(old.y, plain[h][1]),
                                     added(old.z, plain[h][2]), added(old.w, plain[h][3]));
        ptx::store16_shared(to + 512 * h, sum);
      }
    }
  }
};

/// Where the partial of a token and column lies in it.
template <class S>
__device__ __forceinline__ uint32_t partial_offset(int token, int column) {
  const int r = column & 7, upper = column >> 3;
  if constexpr (S::kFold) return r * 16 + token * 8 + upper * 4;
  const int c = token >> 1 & 3;
  return (token >> 3) * 512 + (4 * r + (c ^ (r >> 1))) * 16 + (2 * upper + (token & 1)) * 4;
}

}  // namespace nibble::cuda::slab
