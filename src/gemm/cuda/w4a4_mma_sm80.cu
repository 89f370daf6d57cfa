// The product of int4 activations on 4-bit tensor cores (8.0 to 8.9): mma.sync m16n8k64, weights as
// A straight from the slab, zero points and all: q is never unpacked. What that leaves to do for
// each sum of a run of k, exactly, in int32:
//
//   sum (q - z) a = sum q u - z sum a - lift sum q          a = u - lift; symmetric: u = a, lift =
//   0
//
// The sums of a are in the operand (int4_operand.h); those of q are a product with ones. K is not
// split: every output is one chain of fused multiply-adds over its groups in order, the CPU's bits.
//
// What a block, a warp and a lane make: mma_block_sm80.h. Shared memory
//   stage   8 tiles x 1 KiB: a block of the slab as it is: two 16-byte loads give a lane its part
//           kTokens x 64 bytes of codes: a 16-byte load gives a lane its part of eight rows
//           (groups of 128 k, kTokens) sums and lifts
//           if activation scales are per group: (groups of 128 k, kTokens)
//   slice   8 tiles x scales and zero points of 512 k, as in the slab; twice
#include "gemm/cuda/launch.h"
#include "gemm/cuda/mma_block_sm80.h"
#include "gemm/cuda/mma_int4_sm80.h"
#include "gemm/cuda/w4a4_mma_sm80.h"

namespace nibble::cuda {
namespace {

using namespace mma;

constexpr int kStages = 4;
constexpr int kTokens = 128;
constexpr int kRowBytes = kBlockDepth / 2;
constexpr int kProducts = kBlockDepth / 64;  // of 128 k
constexpr uint32_t kOnes = 0x11111111u;

template <int promoted, bool group_scales, bool symmetric>
struct Shape : Depth<promoted> {
  static constexpr bool kGroupScales = group_scales, kSymmetric = symmetric;
  static constexpr int kTokenTiles = kTokens / kTokenWarps / 8;  // of a warp
  static constexpr int kGroupProducts = kProducts / Shape::kGroups;
  static constexpr int kTokensAt = kTiles * kTileBytes;
  static constexpr int kRunsAt = kTokensAt + kTokens * kRowBytes;
  static constexpr int kRunBytes = Shape::kGroups * kTokens * 4;
  static constexpr int kFactorsAt = kRunsAt + kRunBytes;
  static constexpr int kStageBytes = kFactorsAt + (group_scales ? kRunBytes : 0);
  static constexpr int kSliceBytes = kTiles * Shape::kScaleBytes;
  static constexpr int kSlicesAt = kStages * kStageBytes;
  static constexpr int kSharedBytes = kSlicesAt + 2 * kSliceBytes;
  static_assert(kSharedBytes <= 99 * 1024, "what sm_86 and sm_89 have");
};

/// The activations in scratch.
struct Int4Operand {
  const uint8_t* codes;
  const int32_t* runs;
};

/// What a thread copies of each stage, found once: 16-byte pieces of the weights and of the codes.
struct Pieces {
  static constexpr int kWeights = kTiles * kTileBytes / 16 / kThreads;
  static constexpr int kRows = kTokens * kRowBytes / 16 / kThreads;
  const uint8_t* weights[kWeights];  // in slice 0, block 0
  const uint8_t* rows[kRows];        // in block 0
  int row_bytes[kRows];              // 0 past M: zeros

  __device__ __forceinline__ Pieces(const GemmArgs& a, const Int4Operand& x, const Position& p) {
    const int last_tile = static_cast<int>(a.layout.tiles) - 1, m = static_cast<int>(a.m);
#pragma unroll
    for (int i = 0; i < kWeights; ++i) {
      const int piece = i * kThreads + threadIdx.x, tile = p.tile + piece / (kTileBytes / 16);
      weights[i] = a.slabs + min(tile, last_tile) * a.layout.slices * a.layout.slab_bytes +
                   piece % (kTileBytes / 16) * 16;
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int piece = i * kThreads + threadIdx.x, row = p.token + piece / 4;
      rows[i] = x.codes + min(row, m - 1) * (a.layout.padded_k() / 2) + piece % 4 * 16;
      row_bytes[i] = row < m ? 16 : 0;
    }
  }
};

/// Starts the copies of stage `block`. Rows past M are zeros; tiles past N repeat the last one.
template <class S>
__device__ __forceinline__ void load_stage(const GemmArgs& a, const Int4Operand& x,
                                           const Position& p, const Pieces& pieces, int block,
                                           uint32_t shared, const Groups& groups) {
  const uint32_t stage = shared + block % kStages * S::kStageBytes;
  const int slice = block / kSliceBlocks, m = static_cast<int>(a.m);
  const int64_t in_codes = int64_t{slice} * a.layout.slab_bytes + block % kSliceBlocks * kTileBytes;
#pragma unroll
  for (int i = 0; i < Pieces::kWeights; ++i) {
    ptx::copy16_async(stage + (i * kThreads + threadIdx.x) * 16, pieces.weights[i] + in_codes);
  }
#pragma unroll
  for (int i = 0; i < Pieces::kRows; ++i) {
    ptx::copy16_async(stage + S::kTokensAt + (i * kThreads + threadIdx.x) * 16,
                      pieces.rows[i] + block * kRowBytes, pieces.row_bytes[i]);
  }
  for (int piece = threadIdx.x; piece < kTokens * S::kGroups; piece += kThreads) {
    const int row = p.token + piece % kTokens, run = block * S::kGroups + piece / kTokens;
    const bool inside = row < m;
    ptx::copy4_async(stage + S::kRunsAt + piece * 4, x.runs + (inside ? int64_t{run} * m + row : 0),
                     inside ? 4 : 0);
    if constexpr (S::kGroupScales) {
      const int group = S::kGroups == 1 ? block / groups.blocks : run;
      const bool there = inside && group < groups.count;
      ptx::copy4_async(stage + S::kFactorsAt + piece * 4,
                       a.scales + (there ? int64_t{row} * groups.count + group : 0), there ? 4 : 0);
    }
  }
  if (block % kSliceBlocks == 0) {
    copy_scales<S::kScaleBytes>(a, p, slice, shared + S::kSlicesAt + slice % 2 * S::kSliceBytes);
  }
}

/// A lane's part of one tile of a stage: columns r and r + 8.
template <class S>
struct Tile {
  uint4 q[kProducts];
  float2 scale[S::kGroups];
  int zero[S::kGroups][2];
  int sum[S::kGroups][2];  // of q; asymmetric only
};

template <class S>
__device__ __forceinline__ void multiply(int (&sum)[4], const Tile<S>& tile, int g, uint4 b) {
#pragma unroll
  for (int j = 0; j < S::kGroupProducts; ++j) {
    const int h = g * S::kGroupProducts + j;
    const uint32_t b0 = h == 0 ? b.x : b.z, b1 = h == 0 ? b.y : b.w;
    if constexpr (S::kSymmetric) {
      ptx::mma_u4s4(sum, tile.q[h], b0, b1);
    } else {
      ptx::mma_u4u4(sum, tile.q[h], b0, b1);
    }
  }
}

/// codes, scales: shared memory addresses of the 128 k, and of the slab's scales; block: which 128
/// k of the slab.
template <class S>
__device__ __forceinline__ Tile<S> load_int4_tile(uint32_t codes, uint32_t scales, int block,
                                                  int lane, bool bf16) {
  Tile<S> t;
#pragma unroll
  for (int h = 0; h < kProducts; ++h) {
    t.q[h] = ptx::load16_shared(codes + h * (kTileBytes / kProducts) + lane * 16);
  }
  const int first_group = lane / 4 * S::kSlabGroups + block * S::kGroups;
#pragma unroll
  for (int g = 0; g < S::kGroups; ++g) {
    t.scale[g] = scales_of(ptx::load4_shared(scales + (first_group + g) * 4), bf16);
    const uint32_t both = ptx::load1_shared(scales + S::kSlabGroups * 32 + first_group + g);
    t.zero[g][0] = static_cast<int>(both & 15);
    t.zero[g][1] = static_cast<int>(both >> 4);
    if constexpr (!S::kSymmetric) {
      int ones[4] = {};  // all eight columns of B are ones, so all sums of a row are its q's
      multiply<S>(ones, t, g, make_uint4(kOnes, kOnes, kOnes, kOnes));
      t.sum[g][0] = ones[0];
      t.sum[g][1] = ones[2];
    }
  }
  return t;
}

/// The sums of group g as floats. runs: of the lane's two rows of x. They start from the bits of
/// kMagic, with what zero points and lifts take off; 15 * 15 * 128 and both together stay below
/// 2^22.
template <class S>
__device__ __forceinline__ void int4_group_sums(const Tile<S>& tile, uint4 b, uint2 runs, int g,
                                                float (&s)[4]) {
  const int run[2] = {static_cast<int>(runs.x), static_cast<int>(runs.y)};
  int sum[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum[i] = kMagicBits - tile.zero[g][i / 2] * (run[i % 2] >> 4);
    if constexpr (!S::kSymmetric) sum[i] -= (run[i % 2] & 15) * tile.sum[g][i / 2];
  }
  multiply<S>(sum, tile, g, b);
#pragma unroll
  for (int i = 0; i < 4; ++i) s[i] = __int_as_float(sum[i]) - kMagic;
}

/// One stage: exact sums of each group, then acc = fma(float(sum) [* t], s, acc).
template <class S>
__device__ __forceinline__ void multiply_stage(uint32_t shared, int block, const Position& p,
                                               bool bf16, Accumulators<S>& acc) {
  const uint32_t stage = shared + block % kStages * S::kStageBytes;
  const uint32_t slice = shared + S::kSlicesAt + block / kSliceBlocks % 2 * S::kSliceBytes;
  Tile<S> tiles[kWarpTiles];
#pragma unroll
  for (int t = 0; t < kWarpTiles; ++t) {
    const int tile = p.warp_tile + t;
    tiles[t] = load_int4_tile<S>(stage + tile * kTileBytes, slice + tile * S::kScaleBytes,
                                 block % kSliceBlocks, p.lane, bf16);
  }
  const uint32_t row = stage + S::kTokensAt + (p.warp_token + p.r) * kRowBytes + p.c * 16;
#pragma unroll
  for (int n = 0; n < S::kTokenTiles; ++n) {
    const uint4 b = ptx::load16_shared(row + n * 8 * kRowBytes);
    const int token = p.warp_token + n * 8 + 2 * p.c;
#pragma unroll
    for (int g = 0; g < S::kGroups; ++g) {
      const uint32_t at = stage + (g * kTokens + token) * 4;
      const uint2 runs = ptx::load8_shared(at + S::kRunsAt);
      float factor[2] = {1.0f, 1.0f};
      if constexpr (S::kGroupScales) {
        const uint2 f = ptx::load8_shared(at + S::kFactorsAt);
        factor[0] = __uint_as_float(f.x);
        factor[1] = __uint_as_float(f.y);
      }
#pragma unroll
      for (int t = 0; t < kWarpTiles; ++t) {
        float s[4];
        int4_group_sums<S>(tiles[t], b, runs, g, s);
        promote<S::kGroupScales>(s, factor, tiles[t].scale[g], acc[t][n]);
      }
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, 1)
    w4a4_mma(const __grid_constant__ GemmArgs args, const __grid_constant__ Int4Operand x,
             const __grid_constant__ Groups groups) {
  extern __shared__ __align__(128) uint8_t memory[];
  const uint32_t shared = ptx::shared_address(memory);
  const Position p = position(kTokens);
  const int blocks = static_cast<int>((args.layout.k + kBlockDepth - 1) / kBlockDepth);
  const Pieces pieces(args, x, p);
  Accumulators<S> acc = {};
  for (int block = 0; block < kStages - 1; ++block) {
    if (block < blocks) load_stage<S>(args, x, p, pieces, block, shared, groups);
    ptx::copy_commit();
  }
  for (int block = 0; block < blocks; ++block) {
    ptx::copy_wait<kStages - 2>();
    __syncthreads();  // the stage is there for all, and nobody reads the one before any more
    const int next = block + kStages - 1;
    if (next < blocks) load_stage<S>(args, x, p, pieces, next, shared, groups);
    ptx::copy_commit();
    multiply_stage<S>(shared, block, p, args.bf16_scales, acc);
  }
  store_outputs<S>(args, p, acc);
}

template <class S>
cudaError_t launch(const GemmArgs& args, const Int4Operand& x, cudaStream_t stream) {
  const auto blocks_of = [](int64_t count, int64_t size) {
    return static_cast<unsigned>((count + size - 1) / size);
  };
  const dim3 grid(blocks_of(args.m, kTokens), blocks_of(args.layout.tiles, kTiles));
  return launch_kernel(
      w4a4_mma<S>,
      {.grid = grid, .threads = kThreads, .shared_bytes = S::kSharedBytes, .stream = stream}, args,
      x, groups_of(args.layout));
}

template <int promoted, bool group_scales>
cudaError_t launch(const GemmArgs& args, const Int4Operand& x, bool symmetric,
                   cudaStream_t stream) {
  return symmetric ? launch<Shape<promoted, group_scales, true>>(args, x, stream)
                   : launch<Shape<promoted, group_scales, false>>(args, x, stream);
}

template <int promoted>
cudaError_t launch(const GemmArgs& args, const Int4Operand& x, bool symmetric,
                   cudaStream_t stream) {
  return args.group_scales ? launch<promoted, true>(args, x, symmetric, stream)
                           : launch<promoted, false>(args, x, symmetric, stream);
}

}  // namespace

cudaError_t launch_w4a4_mma_sm80(const GemmArgs& args, bool symmetric, void* scratch,
                                 cudaStream_t stream) {
  const cudaError_t made = launch_int4_operand(args, symmetric, scratch, stream);
  if (made != cudaSuccess) return made;
  const Int4Scratch at = int4_scratch(args.layout, args.m);
  const auto* base = static_cast<const uint8_t*>(scratch);
  const Int4Operand x = {base + at.codes, reinterpret_cast<const int32_t*>(base + at.runs)};
  switch (args.layout.promoted) {
    case 64: return launch<64>(args, x, symmetric, stream);
    case 128: return launch<128>(args, x, symmetric, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace nibble::cuda
