// What the slab kernels share: device code for one slab of packed.h times at most 16 tokens.
//
//   activations --> HeldSlice or SharedSlice --write_sums--> table in shared memory
//   Accumulator::add(slab, slice, table): float sums; lane 4 r + c has column r of tokens 2 c and
//       2 c + 1, then column r + 8
//   Accumulator::store: a partial for each tile and warp along K
//   reduce(): adds partials in order of the warps; scale, bias, y
//
// Two token columns (M <= 2) are folded: the product has 8 columns on the right, so the four blocks
// of a slab take four each of a token, with zeros where another block is meant: column 4 t + u is
// token t, block u. One promotion to float then serves what would take four.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "gemm/cuda/kernels.h"
#include "gemm/cuda/ptx.h"

namespace nibble::cuda::slab {

/// Everything a block needs, worked out on the host: there is no division in a kernel's prologue.
struct Params {
  const uint8_t* slabs = nullptr;
  const int8_t* codes = nullptr;
  const float* scales = nullptr;
  Output out;
  SlabShared shared;
  int64_t tile_bytes = 0;  // of a column tile
  int m = 0, n = 0;
  int padded_k = 0, slices = 0, slab_bytes = 0;
  int groups = 0, group_size = 0;  // of the scales of the activations
  int tiles = 0, more_tiles = 0;   // of a block; blocks that have one more
  int k_warps = 0, tile_warps_log2 = 0, stages = 0, held_tiles = 0;
  int k_warps_inverse = 0;  // warp * k_warps_inverse >> 16 is warp / k_warps
  bool bf16_scales = false;
  bool activations_first = false;  // else the slabs, and then the kernel in front is waited for
};

/// A kernel's compile-time choices.
template <int columns, int promoted_depth, bool with_group_scales>
struct Shape {
  static constexpr int kColumns = columns;  // slab_token_columns()
  static constexpr bool kFold = columns == 2;
  static constexpr int kHalves = columns == 16 ? 2 : 1;  // of 8 tokens
  static constexpr int kPromoted = promoted_depth;
  static constexpr int kBlockGroups = kBlockDepth / promoted_depth;
  static constexpr int kSlabGroups = 4 * kBlockGroups;
  static constexpr int kSets = promoted_depth == kBlockDepth ? 1 : 2;  // of Sums, for a block
  static constexpr int kSetGroups = kBlockGroups / kSets, kSetHalves = 2 / kSets;
  static constexpr bool kGroupScales = with_group_scales;
  static constexpr int kEntries = (kSlabGroups * columns + 31) / 32;  // of a table, per lane
  static constexpr int kPartialBytes = slab_partial_bytes(columns);
};

/// Who a thread is. `leader`: one lane of each warp.
struct Place {
  int lane, warp, r, c;
  int tile_warp, k_warp;
  bool leader;

  __device__ explicit Place(const Params& p)
      : lane(threadIdx.x & 31), warp(__shfl_sync(~0u, threadIdx.x >> 5, 0)), r(lane >> 2),
        c(lane & 3), tile_warp(warp * p.k_warps_inverse >> 16),
        k_warp(warp - tile_warp * p.k_warps), leader(ptx::elect_one()) {}
};

/// The column tiles of this block.
struct Tiles {
  int first, count;

  __device__ explicit Tiles(const Params& p) {
    const int block = static_cast<int>(blockIdx.x);
    first = block * p.tiles + min(block, p.more_tiles);
    count = p.tiles + (block < p.more_tiles ? 1 : 0);
  }
  /// Whether the warp has one in that step.
  __device__ bool has(const Params& p, const Place& at, int step) const {
    return (step << p.tile_warps_log2) + at.tile_warp < count;
  }
};

/// Slices of a warp: k_warp, k_warp + k_warps, ...
__device__ __forceinline__ int my_slices(const Params& p, const Place& at) {
  int count = 0;
#pragma unroll 1
  for (int slice = at.k_warp; slice < p.slices; slice += p.k_warps) ++count;
  return count;
}

// ---- shared memory: header ---------------------------------------------------------------------
//     0: step barrier   8: activations   16: (warp, stage) ring   512: scales of tokens
inline constexpr int kStepBarrier = 0, kActivationBarrier = 8, kRingBarriers = 16;
inline constexpr int kWarpBarriers = 400, kTokenScales = 544;
static_assert(kRingBarriers + 8 * kSlabWarps * kSlabStages <= kWarpBarriers);
static_assert(kWarpBarriers + 8 * kSlabWarps <= kTokenScales);
static_assert(kTokenScales + 4 * kSlabTokens <= kSlabHeaderBytes);

/// The slabs of a warp, in the order in which it meets them. Only the leader requests.
struct Ring {
  uint32_t buffers, barriers;
  int stages, bytes;
  int stage = 0, parity = 0;

  __device__ Ring(const Params& p, uint32_t shared, int warp)
      : buffers(shared + p.shared.ring + warp * p.stages * p.slab_bytes),
        barriers(shared + kRingBarriers + warp * kSlabStages * 8), stages(p.stages),
        bytes(p.slab_bytes) {}

  __device__ void open() const {
#pragma unroll 1
    for (int s = 0; s < stages; ++s) ptx::mbarrier_init(barriers + 8 * s, 1);
    ptx::fence_mbarrier_init();
  }
  __device__ void request(int s, const uint8_t* from) const {
    ptx::mbarrier_expect(barriers + 8 * s, bytes);
    ptx::bulk_load(buffers + s * bytes, from, bytes, barriers + 8 * s, ptx::kEvictFirst);
  }
  /// Address of the next slab, when it is there.
  __device__ uint32_t wait() const {
    ptx::mbarrier_wait(barriers + 8 * stage, parity);
    return buffers + stage * bytes;
  }
  __device__ void advance() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// ---- activations -------------------------------------------------------------------------------

/// The activations that a lane multiplies in one block: two words for each of the 4 product steps.
template <class S>
struct Fragments {
  uint32_t word[S::kHalves][8];
};

/// The 4 times 8 bytes of a lane in one row of a block; zeros if not present.
template <class Address, class Load>
__device__ __forceinline__ void load_row(Address from, bool present, Load&& load,
                                         uint32_t (&word)[8]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint2 v = make_uint2(0, 0);
    if (present) v = load(from + 32 * j);
    word[2 * j] = v.x;
    word[2 * j + 1] = v.y;
  }
}

/// The activations of a slice in registers. Not folded: of tokens r (and r + 8). Folded: of token
/// r / 4, block r % 4 alone; in the other blocks the lane multiplies zeros.
template <class S>
struct HeldSlice {
  Fragments<S> held[S::kFold ? 1 : 4];

  /// load: 8 bytes from an address. Row 0 of the slice at `slice`.
  template <class Address, class Load>
  __device__ __forceinline__ void load(const Place& at, Address slice, int row_bytes, int m,
                                       Load&& load) {
#pragma unroll
    for (int h = 0; h < S::kHalves; ++h) {
      const int token = S::kFold ? at.r >> 2 : at.r + 8 * h;
      const Address from = slice + token * row_bytes + at.c * 8;
      if constexpr (S::kFold) {
        load_row(from + (at.r & 3) * kBlockDepth, token < m, load, held[0].word[h]);
      } else {
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          load_row(from + u * kBlockDepth, token < m, load, held[u].word[h]);
        }
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

/// The same, left in shared memory until it is needed. Not for folded tokens.
template <class S>
struct SharedSlice {
  uint32_t from;
  int row_bytes, m;

  __device__ __forceinline__ Fragments<S> block(const Place& at, int u) const {
    Fragments<S> f;
#pragma unroll
    for (int h = 0; h < S::kHalves; ++h) {
      const int token = at.r + 8 * h;
      load_row(from + token * row_bytes + at.c * 8 + u * kBlockDepth, token < m,
               [](uint32_t p) { return ptx::load8_shared(p); }, f.word[h]);
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
inline constexpr int kScalesOffset = 4 * S::kSlabGroups * S::kColumns;

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
    if constexpr (S::kFold) f = slice.held[0];  // column r: token r / 4, block r % 4
    else f = slice.block(at, u);
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

/// A lane's share of the scales of a slice, on their way from global memory to the table.
template <class S>
struct SliceScales {
  float value[S::kEntries];

  __device__ void load(const Params& p, const Place& at, int slice) {
#pragma unroll
    for (int i = 0; i < S::kEntries; ++i) {
      const int entry = at.lane + 32 * i, token = entry % S::kColumns, group = entry / S::kColumns;
      // groups of more than 128 are several promoted ones; past K the last one stands in
      const int k = slice * kSlabDepth + group * S::kPromoted;
      const int g = min(S::kPromoted < kBlockDepth ? k / S::kPromoted : k / p.group_size,
                        p.groups - 1);
      value[i] = 0.0f;
      if (token < p.m && group < S::kSlabGroups) {
        value[i] = ptx::load_float(p.scales + int64_t{token} * p.groups + g);
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

// ---- products ----------------------------------------------------------------------------------

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
    if constexpr (S::kSetGroups == 2) return i == 0 ? low[e] : high[e] >> 4;
    else return low[e] + (high[e] >> 4);
  }
};

/// Scales of columns r and r + 8.
__device__ __forceinline__ float2 scale_pair(uint32_t word, bool bf16) {
  const float2 half = __half22float2(*reinterpret_cast<const __half2*>(&word));
  return bf16 ? make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u))
              : half;
}

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
  if constexpr (kMine == 2) zero[0] = ptx::load4_shared(bytes & ~3u) >> (8 * first);
  else load_words(bytes, zero);
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
    const float2 s = scale_pair(scale[i], bf16);
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
        const float2 s = scale_pair(scale[group], bf16);
        const int z = zeros >> (8 * group);
#pragma unroll
        for (int h = 0; h < S::kHalves; ++h) {
          const uint32_t entry = table + table_offset<S>(u * kGroups + group, 8 * h + 2 * at.c);
          const uint2 less = ptx::load8_shared(entry);
          uint2 t = make_uint2(0, 0);
          if constexpr (S::kGroupScales) t = ptx::load8_shared(entry + kScalesOffset<S>);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            acc[h][e] = promote<S>(sums[h].of(i, e), (e < 2 ? z : z >> 4) & 15,
                                   static_cast<int>(e % 2 ? less.y : less.x),
                                   __uint_as_float(e % 2 ? t.y : t.x), e < 2 ? s.x : s.y,
                                   acc[h][e]);
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

// ---- output ------------------------------------------------------------------------------------

template <class S>
__device__ __forceinline__ void store_output(const Params& p, int token, int column, float acc,
                                             float token_scale, float bias) {
  float value = acc;
  if constexpr (S::kGroupScales) {
    if (p.out.bias != nullptr) value = __fadd_rn(acc, bias);
  } else {
    value = p.out.bias != nullptr ? __fmaf_rn(acc, token_scale, bias)
                                  : __fmul_rn(acc, token_scale);
  }
  const int64_t at = token * p.out.stride + column;
  switch (p.out.type) {
    case Element::f32: static_cast<float*>(p.out.y)[at] = value; break;
    case Element::f16: static_cast<__half*>(p.out.y)[at] = __float2half_rn(value); break;
    case Element::bf16:
      static_cast<__nv_bfloat16*>(p.out.y)[at] = __float2bfloat16_rn(value);
      break;
  }
}

/// Adds the partials of `tiles` column tiles in order of the warps along K, four chains side by
/// side, and writes y. The partial of (tile, k_warp) is the (tile * k_warps + k_warp)-th. ready():
/// waits for them.
template <class S, class Wait>
__device__ __forceinline__ void reduce(const Params& p, uint32_t shared, uint32_t partials,
                                       int first_tile, int tiles, Wait&& ready) {
  const int outputs = tiles * kSlabColumns * S::kColumns;
  bool waited = false;
#pragma unroll 1
  for (int o = threadIdx.x; o < outputs; o += blockDim.x) {
    const int column = o % kSlabColumns, token = o / kSlabColumns % S::kColumns;
    const int tile = o / (kSlabColumns * S::kColumns);
    const int n = (first_tile + tile) * kSlabColumns + column;
    const bool wanted = token < p.m && n < p.n;
    // asked for before waiting: it comes from memory
    const float bias = wanted && p.out.bias != nullptr ? __ldg(p.out.bias + n) : 0.0f;
    if (!waited) ready();
    waited = true;
    if (!wanted) continue;
    uint32_t from =
        partials + tile * p.k_warps * S::kPartialBytes + partial_offset<S>(token, column);
    float sum[4] = {};
    int w = 0;
#pragma unroll 1
    for (; w + 4 <= p.k_warps; w += 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[i] += ptx::load_float_shared(from + i * S::kPartialBytes);
      }
      from += 4 * S::kPartialBytes;
    }
#pragma unroll 1
    for (; w < p.k_warps; ++w, from += S::kPartialBytes) sum[0] += ptx::load_float_shared(from);
    const float acc = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    const float t =
        S::kGroupScales ? 0.0f : ptx::load_float_shared(shared + kTokenScales + 4 * token);
    store_output<S>(p, token, n, acc, t, bias);
  }
  if (!waited) ready();
}

/// End of a step of all warps, each with a tile of its own: adds the partials of the step before,
/// then hands over this step's without waiting for the other warps. False after the last tile, in
/// the step that only adds.
template <class S>
__device__ __forceinline__ bool finish_step(const Params& p, const Place& at, const Tiles& tiles,
                                            uint32_t shared, int step, Accumulator<S>& acc) {
  const uint32_t partials = shared + p.shared.partials, barrier = shared + kStepBarrier;
  if (step > 0) {
    const int before = step - 1, first = before << p.tile_warps_log2;
    reduce<S>(p, shared, partials + (before & 1) * p.shared.partials_bytes, tiles.first + first,
              min(1 << p.tile_warps_log2, tiles.count - first),
              [&] { ptx::mbarrier_wait(barrier, before & 1); });
  }
  if (step << p.tile_warps_log2 >= tiles.count) return false;
  acc.store(partials + (step & 1) * p.shared.partials_bytes + at.warp * S::kPartialBytes);
  // One arrival carries the stores of the whole warp: lane -> __syncwarp -> arrive -> wait.
  __syncwarp();
  if (at.leader) ptx::mbarrier_arrive(barrier);
  return true;
}

/// The scale of one token, on its way to the header; threads 0..m-1 have one. store() in time for
/// the first reduce(), not at once: it waits for the load.
template <class S>
struct TokenScale {
  float value = 0.0f;

  __device__ void load(const Params& p) {
    if (!S::kGroupScales && threadIdx.x < p.m) value = ptx::load_float(p.scales + threadIdx.x);
  }
  __device__ void store(uint32_t shared) const {
    if (!S::kGroupScales && threadIdx.x < kSlabTokens) {
      ptx::store_float_shared(shared + kTokenScales + 4 * threadIdx.x, value);
    }
  }
};

}  // namespace nibble::cuda::slab
