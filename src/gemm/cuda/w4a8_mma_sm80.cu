// The product for any M on any device from sm_80 on: mma.sync m16n8k32 on int8, weights as A,
// activations as B, cp.async through a ring of stages of 128 k. Nothing of sm_90 is used. K is not
// split: every output is one chain of fused multiply-adds over its groups in order, the CPU's bits.
//
// What a block, a warp and a lane make: mma_block_sm80.h. Shared memory
//   stage   8 tiles x 1 KiB: a block of the slab as it is: two 16-byte loads give a lane its part
//           kTokens x 128 codes, swizzled as load_row() wants them
//           if activation scales are per group: (groups of 128 k, kTokens)
//   slice   8 tiles x scales and zero points of 512 k, as in the slab; twice
#include "gemm/cuda/launch.h"
#include "gemm/cuda/mma_block_sm80.h"
#include "gemm/cuda/w4a8_mma_skinny_sm80.h"

namespace nibble::cuda {
namespace {

using namespace mma;

constexpr int kStages = 3;  // what fits the 99 KiB of sm_86 and sm_89

template <int tokens, int promoted, bool group_scales>
struct Shape : Depth<promoted> {
  static constexpr int kPromoted = promoted, kTokens = tokens;
  static constexpr bool kGroupScales = group_scales;
  static constexpr int kTokenTiles = tokens / kTokenWarps / 8;  // of a warp
  static constexpr int kTokensAt = kTiles * kTileBytes;
  static constexpr int kFactorsAt = kTokensAt + tokens * kBlockDepth;
  static constexpr int kStageBytes = kFactorsAt + (group_scales ? tokens * Shape::kGroups * 4 : 0);
  static constexpr int kSliceBytes = kTiles * Shape::kScaleBytes;
  static constexpr int kSlicesAt = kStages * kStageBytes;
  static constexpr int kSharedBytes = kSlicesAt + 2 * kSliceBytes;
};

/// What a thread copies of each stage, found once: 16-byte pieces of the codes and of x.
template <class S>
struct Pieces {
  static constexpr int kCodes = kTiles * kTileBytes / 16 / kThreads;
  static constexpr int kRows = S::kTokens * 8 / kThreads;
  const uint8_t* codes[kCodes];  // in slice 0, block 0
  const int8_t* rows[kRows];     // in block 0
  int row_bytes[kRows];          // 0 past M: zeros

  __device__ __forceinline__ Pieces(const GemmArgs& a, const Position& p) {
    const int last_tile = static_cast<int>(a.layout.tiles) - 1, m = static_cast<int>(a.m);
#pragma unroll
    for (int i = 0; i < kCodes; ++i) {
      const int piece = i * kThreads + threadIdx.x, tile = p.tile + piece / (kTileBytes / 16);
      codes[i] = a.slabs + min(tile, last_tile) * a.layout.slices * a.layout.slab_bytes +
                 piece % (kTileBytes / 16) * 16;
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int piece = i * kThreads + threadIdx.x, row = p.token + piece / 8;
      rows[i] = a.codes + min(row, m - 1) * (a.layout.slices * kSlabDepth) + piece % 8 * 16;
      row_bytes[i] = row < m ? 16 : 0;
    }
  }
};

/// Starts the copies of stage `block`. Rows past M are zeros; tiles past N repeat the last one.
template <class S>
__device__ __forceinline__ void load_stage(const GemmArgs& a, const Position& p,
                                           const Pieces<S>& pieces, int block, uint32_t shared,
                                           const Groups& groups) {
  const uint32_t stage = shared + block % kStages * S::kStageBytes;
  const int slice = block / kSliceBlocks, m = static_cast<int>(a.m);
  const int64_t in_codes = int64_t{slice} * a.layout.slab_bytes + block % kSliceBlocks * kTileBytes;
#pragma unroll
  for (int i = 0; i < Pieces<S>::kCodes; ++i) {
    ptx::copy16_async(stage + (i * kThreads + threadIdx.x) * 16, pieces.codes[i] + in_codes);
  }
#pragma unroll
  for (int i = 0; i < Pieces<S>::kRows; ++i) {
    const int piece = i * kThreads + threadIdx.x;
    ptx::copy16_async(stage + S::kTokensAt + row_piece(piece / 8, piece % 8),
                      pieces.rows[i] + block * kBlockDepth, pieces.row_bytes[i]);
  }
  if constexpr (S::kGroupScales) {
    for (int piece = threadIdx.x; piece < S::kTokens * S::kGroups; piece += kThreads) {
      const int token = piece % S::kTokens, g = piece / S::kTokens, row = p.token + token;
      const int group = S::kGroups == 1 ? block / groups.blocks : block * S::kGroups + g;
      const bool inside = row < m && group < groups.count;
      ptx::copy4_async(stage + S::kFactorsAt + piece * 4,
                       a.scales + (inside ? int64_t{row} * groups.count + group : 0),
                       inside ? 4 : 0);
    }
  }
  if (block % kSliceBlocks == 0) {
    copy_scales<S::kScaleBytes>(a, p, slice, shared + S::kSlicesAt + slice % 2 * S::kSliceBytes);
  }
}

/// One stage: exact sums of each group, then acc = fma(float(sum) [* t], s, acc).
template <class S>
__device__ __forceinline__ void multiply_stage(uint32_t shared, int block, const Position& p,
                                               bool bf16, Accumulators<S>& acc) {
  const uint32_t stage = shared + block % kStages * S::kStageBytes;
  const uint32_t slice = shared + S::kSlicesAt + block / kSliceBlocks % 2 * S::kSliceBytes;
  TileOperand<S::kPromoted> tiles[kWarpTiles];
#pragma unroll
  for (int t = 0; t < kWarpTiles; ++t) {
    const int tile = p.warp_tile + t;
    tiles[t] = load_tile<S::kPromoted>(stage + tile * kTileBytes, slice + tile * S::kScaleBytes,
                                       block % kSliceBlocks, p.lane, bf16);
  }
  const uint32_t row = stage + S::kTokensAt + (p.warp_token + p.r) * kBlockDepth;
#pragma unroll
  for (int n = 0; n < S::kTokenTiles; ++n) {
    uint2 b[kSteps];
    load_row(row + n * 8 * kBlockDepth, p.lane, b);
#pragma unroll
    for (int g = 0; g < S::kGroups; ++g) {
      float factor[2] = {1.0f, 1.0f};
      if constexpr (S::kGroupScales) {
        const int token = p.warp_token + n * 8 + 2 * p.c;
        const uint2 f = ptx::load8_shared(stage + S::kFactorsAt + (g * S::kTokens + token) * 4);
        factor[0] = __uint_as_float(f.x);
        factor[1] = __uint_as_float(f.y);
      }
#pragma unroll
      for (int t = 0; t < kWarpTiles; ++t) {
        float s[4];
        group_sums(tiles[t], b, g, s);
        promote<S::kGroupScales>(s, factor, tiles[t].scale[g], acc[t][n]);
      }
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, 1)
    w4a8_mma(const __grid_constant__ GemmArgs args, const __grid_constant__ Groups groups) {
  extern __shared__ __align__(128) uint8_t memory[];
  const uint32_t shared = ptx::shared_address(memory);
  const Position p = position(S::kTokens);
  const int blocks = static_cast<int>((args.layout.k + kBlockDepth - 1) / kBlockDepth);
  const Pieces<S> pieces(args, p);
  Accumulators<S> acc = {};
  for (int block = 0; block < kStages - 1; ++block) {
    if (block < blocks) load_stage<S>(args, p, pieces, block, shared, groups);
    ptx::copy_commit();
  }
  for (int block = 0; block < blocks; ++block) {
    ptx::copy_wait<kStages - 2>();
    __syncthreads();  // the stage is there for all, and nobody reads the one before any more
    const int next = block + kStages - 1;
    if (next < blocks) load_stage<S>(args, p, pieces, next, shared, groups);
    ptx::copy_commit();
    multiply_stage<S>(shared, block, p, args.bf16_scales, acc);
  }
  store_outputs<S>(args, p, acc);
}

template <class S>
cudaError_t launch(const GemmArgs& args, cudaStream_t stream) {
  const auto blocks_of = [](int64_t count, int64_t size) {
    return static_cast<unsigned>((count + size - 1) / size);
  };
  const dim3 grid(blocks_of(args.m, S::kTokens), blocks_of(args.layout.tiles, kTiles));
  return launch_kernel(
      w4a8_mma<S>,
      {.grid = grid, .threads = kThreads, .shared_bytes = S::kSharedBytes, .stream = stream}, args,
      groups_of(args.layout));
}

template <int tokens, int promoted>
cudaError_t launch(const GemmArgs& args, cudaStream_t stream) {
  return args.group_scales ? launch<Shape<tokens, promoted, true>>(args, stream)
                           : launch<Shape<tokens, promoted, false>>(args, stream);
}

template <int promoted>
cudaError_t launch(const GemmArgs& args, cudaStream_t stream) {
  return args.m <= 64 ? launch<64, promoted>(args, stream) : launch<128, promoted>(args, stream);
}

}  // namespace

cudaError_t launch_w4a8_mma_sm80(const GemmArgs& args, cudaStream_t stream) {
  if (args.m <= kSkinnyRows) return launch_w4a8_mma_skinny_sm80(args, stream);
  switch (args.layout.promoted) {
    case 32: return launch<32>(args, stream);
    case 64: return launch<64>(args, stream);
    case 128: return launch<128>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace nibble::cuda
