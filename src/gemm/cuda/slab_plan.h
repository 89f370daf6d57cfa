// How the slab kernels (M <= 16) divide a product. Pure arithmetic; no device is needed.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "gemm/cuda/packed.h"

namespace nibble::cuda {

inline constexpr int kSlabTokens = 16;  // largest M
inline constexpr int kSlabFusedTokens = 2;
inline constexpr int kSlabWarps = 16;  // of a block, at most
inline constexpr int kSlabStages = 3;

/// Where a slab kernel keeps the activations. One .cu file each.
enum class SlabForm : int {
  registers,  // a warp has one slice of 512 k for good: needs k_warps >= slices
  streamed,   // they come with the weights, slice by slice; k_warps <= slices
};

struct SlabConfig {
  SlabForm form = SlabForm::registers;
  int k_warps = 0;      // warps that share one column tile; slice s belongs to warp s % k_warps
  int tile_warps = 1;   // column tiles worked on at once by a block: 1, 2 or 4; streamed: 1
  int stages = 1;       // slabs in flight per warp, 1..kSlabStages
  int held_tiles = 1;   // streamed: tiles that meet a slice of activations while it is there
  int blocks = 0;       // asked for; the tiles are dealt out evenly
  bool halves = false;  // w4a16: activations are x itself, 16 bits each, and not int8 codes
  int early_warps = 0;  // quantizes: warps that ask for a slab before the rows, all others after
  bool quantizes = false;     // M <= 2: each block makes the codes of all rows itself
  bool handed = false;        // the first blocks make the codes, and all others wait for them
  bool programmatic = false;  // launched with programmatic stream serialization

  int warps() const { return k_warps * tile_warps; }
  std::string describe() const;  // "registers, 8x1 warps, ring of 1, 256 blocks"
};

/// The configuration that was fastest on an H200, or the nearest that fits in shared_bytes of a
/// block. Requires 1 <= m <= kSlabTokens. programmatic is left to the caller.
SlabConfig slab_config(const PackedLayout& layout, int64_t m, bool group_scales,
                       int multiprocessors, int64_t shared_bytes);

/// The same for x of 16 bits (w4a16).
SlabConfig slab_halves_config(const PackedLayout& layout, int64_t m, int multiprocessors,
                              int64_t shared_bytes);

/// The same, of one of slab_config()'s forms, for the kernels that make their rows themselves
/// (fused_product.h); nothing where slab_config() would add in another order, or K is too deep.
/// gated: columns of gate and up are worked on side by side.
std::optional<SlabConfig> slab_quantizing_config(const PackedLayout& layout, int64_t m,
                                                 bool group_scales, bool gated, int multiprocessors,
                                                 int64_t shared_bytes);

/// slab_config() for the kernel whose first blocks quantize x for all.
SlabConfig slab_handed_config(const PackedLayout& layout, int64_t m, bool group_scales,
                              int multiprocessors, int64_t shared_bytes);

/// Chunks of eight k that a thread of those kernels makes.
inline constexpr int kSlabRegistersChunks = 2, kSlabStreamedChunks = 4;
constexpr int slab_row_chunks(const SlabConfig& config) {
  if (config.form == SlabForm::streamed) return kSlabStreamedChunks;
  return config.tile_warps > 1 ? 1 : kSlabRegistersChunks;
}

/// Dynamic shared memory of a block.
int64_t slab_shared_bytes(const PackedLayout& layout, int64_t m, bool group_scales,
                          const SlabConfig& config);

/// Most warps of a block of the streamed form: 16 tokens want more registers.
constexpr int slab_streamed_warps(int token_columns) { return token_columns == 16 ? 12 : 16; }
/// The same where activations have 16 bits, and a warp holds 8 tokens in 64 registers of a lane.
constexpr int slab_halves_warps(int token_columns, SlabForm form) {
  return token_columns == 16 ? 8 : form == SlabForm::streamed ? 12 : 16;
}

/// Columns of the products' right operand. 2: the four blocks of a slab lie side by side in it.
constexpr int slab_token_columns(int64_t m, bool halves = false) {
  return m <= 2 && !halves ? 2 : m <= 8 ? 8 : 16;
}

/// Byte offsets into the shared memory of a block. Barriers and scales of tokens come first.
struct SlabShared {
  int partials = 0;        // float sums: two sets for steps in turn (streamed: one)
  int partials_bytes = 0;  // of a set: (tile, k_warp) x slab_partial_bytes
  int tables = 0;          // sums, and scales, of the groups of the activations, slice by slice
  int table_bytes = 0;     // of a slice
  int activations = 0;     // rows of row_pitch bytes: streamed (warps, m); quantizes: (m)
  int row_pitch = 0;
  int ring = 0;  // (warps, stages, slab_bytes)
  int64_t total = 0;
};
SlabShared slab_shared(const PackedLayout& layout, int64_t m, bool group_scales,
                       const SlabConfig& config);

/// What else a block that quantizes keeps of its rows, behind SlabShared::activations.
struct SlabRows {
  int scales = 0;   // (m, groups), if there is one for each
  int scratch = 0;  // kSlabRowSums floats of each row, twice
  int end = 0;
};
SlabRows slab_rows(const PackedLayout& layout, int64_t m, bool group_scales,
                   const SlabShared& shared);

inline constexpr int kSlabHeaderBytes = 1024;
inline constexpr int kSlabRowSums = 64;  // partial sums of a row's squares, at most
/// Float sums of one tile by one warp: 16 columns x token columns.
constexpr int slab_partial_bytes(int token_columns) {
  return kSlabColumns * token_columns * static_cast<int>(sizeof(float));
}
/// A fragment is 8 bytes a lane, 4 lanes a row: rows lie 32 bytes past a multiple of 128 apart. Of
/// x it is 16 bytes, and a quarter of a warp reads two rows: 64.
inline constexpr int kRowPadding = 32, kHalvesRowPadding = 64;

}  // namespace nibble::cuda
