// What the slab kernels share: who a thread is, the ring of slabs of a warp, shared memory. Then
// slab_slice.h (activations), slab_product.h, slab_output.h.
//
//   activations --> HeldSlice --write_sums--> table in shared memory
//   Accumulator::add(slab, slice, table): float sums; lane 4 r + c has column r of tokens 2 c and
//       2 c + 1, then column r + 8
//   Accumulator::store: a partial for each tile and warp along K
//   reduce(): adds partials in order of the warps; scale, bias, y
//
// Two token columns (M <= 2) are folded: the product has 8 columns on the right, so the four blocks
// of a slab take four each of a token, with zeros where another block is meant: column 4 t + u is
// token t, block u. One promotion to float then serves what would take four.
#pragma once

#include "gemm/cuda/kernels.h"
#include "gemm/cuda/ptx.h"

namespace nibble::cuda::slab {

/// Everything a block needs, worked out on the host: there is no division in a kernel's prologue.
struct Params {
  const uint8_t* slabs = nullptr;
  const int8_t* codes = nullptr;
  const float* scales = nullptr;
  const uint8_t* x = nullptr;  // w4a16, instead of codes and scales: (m, k) of 16 bits
  int64_t x_row_bytes = 0;
  Output out;
  SlabShared shared;
  int64_t tile_bytes = 0;  // of a column tile
  int m = 0, n = 0, x_columns = 0;
  int padded_k = 0, slices = 0, slab_bytes = 0;
  int groups = 0, group_size = 0;  // of the scales of the activations
  int tiles = 0, more_tiles = 0;   // of a block; blocks that have one more
  int k_warps = 0, tile_warps_log2 = 0, stages = 0, held_tiles = 0;
  int k_warps_inverse = 0;  // warp * k_warps_inverse >> 16 is warp / k_warps
  bool bf16_scales = false;
  bool activations_first = false;  // else the slabs, and then the kernel in front is waited for
};

/// The same for blocks that make the activations themselves (slab_made.h).
struct MadeParams : Params {
  SlabRows rows;
  int early_warps = 0;          // those that ask for a slab before the kernel in front is complete
  int up_tiles = 0;             // gated: how far a tile of up is behind that of its gate
  bool gelu_tanh = false;       // gated: the function, else silu
  uint32_t* largest = nullptr;  // gated: RowRanges, or null
  int largest_count = 0;
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
  static constexpr bool kGated = false;
  static constexpr int kEntries = (kSlabGroups * columns + 31) / 32;  // of a table, per lane
  static constexpr int kPartialBytes = slab_partial_bytes(columns);
  static constexpr int kRegistersWarps = kSlabWarps;  // of a block of each form, at most
  static constexpr int kStreamedWarps = slab_streamed_warps(columns);
};

/// Of activations of 16 bits.
template <int columns, int promoted_depth, Element type>
struct HalvesShape : Shape<columns, promoted_depth, false> {
  static constexpr Element kType = type;
  static constexpr int kRegistersWarps = slab_halves_warps(columns, SlabForm::registers);
  static constexpr int kStreamedWarps = slab_halves_warps(columns, SlabForm::streamed);
};

/// Columns of gate and up side by side, y their product.
template <class S>
struct GatedShape : S {
  static constexpr bool kGated = true;
};

/// Who a thread is. `leader`: one lane of each warp.
struct Place {
  int lane, warp, r, c;
  int tile_warp, k_warp;
  bool leader;

  __device__ explicit Place(const Params& p)
      : lane(threadIdx.x & 31),
        warp(__shfl_sync(~0u, threadIdx.x >> 5, 0)),
        r(lane >> 2),
        c(lane & 3),
        tile_warp(warp * p.k_warps_inverse >> 16),
        k_warp(warp - tile_warp * p.k_warps),
        leader(ptx::elect_one()) {}
};

/// The column tiles of this block. Gated: gate and up in turn, and Params counts pairs.
struct Tiles {
  int first, count;

  __device__ explicit Tiles(const Params& p) {
    const int block = static_cast<int>(blockIdx.x);
    first = block * p.tiles + min(block, p.more_tiles);
    count = p.tiles + (block < p.more_tiles ? 1 : 0);
  }
  /// Of pairs, the number of single tiles.
  __device__ void count_both() { first *= 2, count *= 2; }
  /// Whether the warp has one in that step.
  __device__ bool has(const Params& p, const Place& at, int step) const {
    return (step << p.tile_warps_log2) + at.tile_warp < count;
  }
};

/// What a warp meets with K outside and tiles inside: batches of tiles, its slices, the tiles of
/// the batch.
struct Walk {
  int batch = 0, slice, tile = 0;

  __device__ explicit Walk(const Place& at) : slice(at.k_warp) {}
  __device__ bool done(const Tiles& tiles) const { return batch >= tiles.count; }
  __device__ int held(const Params& p, const Tiles& tiles) const {
    return min(p.held_tiles, tiles.count - batch);
  }
  __device__ void next_slice(const Params& p, const Place& at) {
    tile = 0;
    slice += p.k_warps;
    if (slice >= p.slices) {
      slice = at.k_warp;
      batch += p.held_tiles;
    }
  }
  __device__ const uint8_t* slab(const Params& p, const Tiles& tiles) const {
    return p.slabs + (tiles.first + batch + tile) * p.tile_bytes + slice * p.slab_bytes;
  }
  __device__ void next_slab(const Params& p, const Place& at, const Tiles& tiles) {
    if (++tile >= held(p, tiles)) next_slice(p, at);
  }
};

// ---- shared memory: header ---------------------------------------------------------------------
//     0: step barrier   16: (warp, stage) ring   400: a barrier a warp   544: scales of tokens
//     640: ranges of warps
#ifdef NIBBLE_RACECHECK  // it knows of an arrival only what the arriving thread itself has done
inline constexpr int kArrivals = 32;
#else
inline constexpr int kArrivals = 1;  // of a warp at the step's barrier
#endif
inline constexpr int kStepBarrier = 0, kRingBarriers = 16;
inline constexpr int kWarpBarriers = 400, kTokenScales = 544;
static_assert(kRingBarriers + 8 * kSlabWarps * kSlabStages <= kWarpBarriers);
static_assert(kWarpBarriers + 8 * kSlabWarps <= kTokenScales);
inline constexpr int kWarpRanges = 640;  // of kernels that quantize: (warp, token)
static_assert(kTokenScales + 4 * kSlabTokens <= kWarpRanges);
static_assert(kWarpRanges + 4 * kSlabWarps * kSlabFusedTokens <= kSlabHeaderBytes);

/// The slabs of a warp, in the order in which it meets them. Only the leader requests.
struct Ring {
  uint32_t buffers, barriers;
  int stages, bytes;
  int stage = 0, parity = 0;

  __device__ Ring(const Params& p, uint32_t shared, int warp)
      : buffers(shared + p.shared.ring + warp * p.stages * p.slab_bytes),
        barriers(shared + kRingBarriers + warp * kSlabStages * 8),
        stages(p.stages),
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

/// The ring of a warp and what it asks for next, with K outside and tiles inside.
struct SlabQueue {
  const Params& p;
  const Place& at;
  const Tiles& tiles;
  Ring ring;
  Walk ahead;

  __device__ SlabQueue(const Params& params, const Place& place, const Tiles& all, uint32_t shared)
      : p(params), at(place), tiles(all), ring(params, shared, place.warp), ahead(place) {}

  /// The leader: asks for the next slab, if there is one, into buffer `stage`.
  __device__ void request(int stage) {
    if (ahead.done(tiles)) return;
    ring.request(stage, ahead.slab(p, tiles));
    ahead.next_slab(p, at, tiles);
  }
  __device__ void request_first() {
#pragma unroll 1
    for (int s = 0; s < p.stages; ++s) request(s);
  }
  /// In two goes: into buffers [first, end), none of which has been used.
  __device__ void request_part(int first, int end) {
#pragma unroll 1
    for (int s = first; s < end; ++s) request(s);
  }

  /// The slabs of `held` tiles times one slice: multiply(slab, accumulator). Their sums go to, or
  /// onto, the warp's partials.
  template <class S, class Accumulator, class Multiply>
  __device__ __forceinline__ void multiply_tiles(int held, uint32_t partials, bool first_slice,
                                                 const Multiply& multiply) {
#pragma unroll 1
    for (int tile = 0; tile < held; ++tile) {
      Accumulator acc;
      multiply(ring.wait(), acc);
      __syncwarp();  // all lanes have read the slab, and in the end the table
      if (at.leader) request(ring.stage);
      ring.advance();
      acc.store(partials + (tile * p.k_warps + at.warp) * S::kPartialBytes, !first_slice);
    }
  }
};

}  // namespace nibble::cuda::slab
