// w4a16 for any M on any device from sm_80 on: mma.sync m16n8k16, q - z exact in f16 or bf16 as A,
// x itself as B, float sums of a group of at most 128 k, then acc = fma(sum, s, acc). K is not
// split. What a block, a warp and a lane make: mma_block_sm80.h. Shared memory
//   stage   8 tiles x 1 KiB: a block of the slab as it is
//           kTokens x 128 elements of x, swizzled: piece p (16 bytes) of row r at p ^ 4 (r % 2), so
//           that two rows, which a quarter of a warp reads at once, are in different banks
//   slice   8 tiles x scales and zero points of 512 k, as in the slab; twice
#include "gemm/cuda/halves.h"
#include "gemm/cuda/launch.h"
#include "gemm/cuda/mma_block_sm80.h"

namespace nibble::cuda {
namespace {

using namespace mma;

constexpr int kPieces = kBlockDepth * 2 / 16;  // of a row of a block

template <int tokens, int promoted, Element type>
struct Shape : Depth<promoted> {
  static constexpr int kTokens = tokens;
  static constexpr Element kType = type;
  static constexpr bool kGroupScales = false;
  static constexpr int kTokenTiles = tokens / kTokenWarps / 8;
  static constexpr int kStages = tokens == 128 ? 2 : 3;  // within the 99 KiB of sm_86 and sm_89
  static constexpr int kTokensAt = kTiles * kTileBytes;
  static constexpr int kStageBytes = kTokensAt + tokens * kBlockDepth * 2;
  static constexpr int kSliceBytes = kTiles * Shape::kScaleBytes;
  static constexpr int kSlicesAt = kStages * kStageBytes;
  static constexpr int kSharedBytes = kSlicesAt + 2 * kSliceBytes;
  static_assert(kSharedBytes <= 99 * 1024);
};

__device__ __forceinline__ int piece_at(int row, int piece) {
  return (row * kPieces + (piece ^ (row % 2 * 4))) * 16;
}

/// Starts the copies of stage `block`. Rows past M and k past K are zeros; tiles past N repeat the
/// last one.
template <class S>
__device__ __forceinline__ void load_stage(const GemmArgs& a, const Position& p, int block,
                                           uint32_t shared) {
  const uint32_t stage = shared + block % S::kStages * S::kStageBytes;
  const int slice = block / kSliceBlocks, m = static_cast<int>(a.m);
  const int last_tile = static_cast<int>(a.layout.tiles) - 1, thread = threadIdx.x;
  const auto slab = [&](int tile) {
    return a.slabs +
           (min(p.tile + tile, last_tile) * a.layout.slices + slice) * a.layout.slab_bytes;
  };
#pragma unroll
  for (int i = 0; i < kTiles * kTileBytes / 16 / kThreads; ++i) {
    const int at = (i * kThreads + thread) * 16;
    ptx::copy16_async(stage + at,
                      slab(at / kTileBytes) + block % kSliceBlocks * kTileBytes + at % kTileBytes);
  }
#pragma unroll
  for (int i = 0; i < S::kTokens * kPieces / kThreads; ++i) {
    const int at = i * kThreads + thread, token = at / kPieces, piece = at % kPieces;
    const int row = p.token + token;
    const int64_t k = int64_t{block} * kBlockDepth + piece * 8;
    const bool inside = row < m && k < a.x_columns;
    const auto* from = static_cast<const uint16_t*>(a.x) + (inside ? row * a.x_stride + k : 0);
    ptx::copy16_async(stage + S::kTokensAt + piece_at(token, piece), from, inside ? 16 : 0);
  }
  if (block % kSliceBlocks != 0) return;
  constexpr int kScalePieces = S::kScaleBytes / 16;
  const uint32_t to = shared + S::kSlicesAt + slice % 2 * S::kSliceBytes;
  for (int piece = thread; piece < kTiles * kScalePieces; piece += kThreads) {
    ptx::copy16_async(to + piece * 16,
                      slab(piece / kScalePieces) + kSlabCodeBytes + piece % kScalePieces * 16);
  }
}

/// The weights of one tile and block, and their scales.
template <class S>
struct TileHalves {
  uint32_t a[kSteps][2][4];
  float2 scale[S::kGroups];  // columns r and r + 8

  __device__ __forceinline__ void load(uint32_t codes, uint32_t scales, int block, int lane,
                                       bool bf16) {
    const int first_group = lane / 4 * S::kSlabGroups + block * S::kGroups;
    HalfExpander<S::kType> r[S::kGroups], r8[S::kGroups];
#pragma unroll
    for (int g = 0; g < S::kGroups; ++g) {
      scale[g] = scales_of(ptx::load4_shared(scales + (first_group + g) * 4), bf16);
      const uint32_t zeros = ptx::load1_shared(scales + S::kSlabGroups * 32 + first_group + g);
      r[g] = HalfExpander<S::kType>(zeros & 15);
      r8[g] = HalfExpander<S::kType>(zeros >> 4);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 v = ptx::load16_shared(codes + half * (kTileBytes / 2) + lane * 16);
      const int low = 2 * half, high = low + 1;
      expand_step<false>(v, r[low / S::kGroupSteps], r8[low / S::kGroupSteps], a[low]);
      expand_step<true>(v, r[high / S::kGroupSteps], r8[high / S::kGroupSteps], a[high]);
    }
  }
};

/// One stage: the sums of each group, then acc = fma(sum, s, acc).
template <class S>
__device__ __forceinline__ void multiply_stage(uint32_t shared, int block, const Position& p,
                                               bool bf16, Accumulators<S>& acc) {
  const uint32_t stage = shared + block % S::kStages * S::kStageBytes;
  const uint32_t slice = shared + S::kSlicesAt + block / kSliceBlocks % 2 * S::kSliceBytes;
  TileHalves<S> tiles[kWarpTiles];
#pragma unroll
  for (int t = 0; t < kWarpTiles; ++t) {
    const int tile = p.warp_tile + t;
    tiles[t].load(stage + tile * kTileBytes, slice + tile * S::kScaleBytes, block % kSliceBlocks,
                  p.lane, bf16);
  }
#pragma unroll
  for (int n = 0; n < S::kTokenTiles; ++n) {
    const int row = p.warp_token + n * 8 + p.r;
#pragma unroll
    for (int g = 0; g < S::kGroups; ++g) {
      float sum[kWarpTiles][4] = {};
#pragma unroll
      for (int i = 0; i < S::kGroupSteps; ++i) {
        const int step = g * S::kGroupSteps + i;
        const uint4 b = pair_activations(
            ptx::load16_shared(stage + S::kTokensAt + piece_at(row, 4 * step + p.c)));
#pragma unroll
        for (int t = 0; t < kWarpTiles; ++t) {
          mma_halves<S::kType>(sum[t], tiles[t].a[step][0], b.x, b.y);
          mma_halves<S::kType>(sum[t], tiles[t].a[step][1], b.z, b.w);
        }
      }
#pragma unroll
      for (int t = 0; t < kWarpTiles; ++t) {
        const float2 scale = tiles[t].scale[g];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          acc[t][n][i] = __fmaf_rn(sum[t][i], i < 2 ? scale.x : scale.y, acc[t][n][i]);
        }
      }
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, 1) w4a16_mma(const __grid_constant__ GemmArgs args) {
  extern __shared__ __align__(128) uint8_t memory[];
  const uint32_t shared = ptx::shared_address(memory);
  const Position p = position(S::kTokens);
  const int blocks = static_cast<int>((args.layout.k + kBlockDepth - 1) / kBlockDepth);
  Accumulators<S> acc = {};
  for (int block = 0; block < S::kStages - 1; ++block) {
    if (block < blocks) load_stage<S>(args, p, block, shared);
    ptx::copy_commit();
  }
  for (int block = 0; block < blocks; ++block) {
    ptx::copy_wait<S::kStages - 2>();
    __syncthreads();  // the stage is there for all, and nobody reads the one before any more
    const int next = block + S::kStages - 1;
    if (next < blocks) load_stage<S>(args, p, next, shared);
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
      w4a16_mma<S>,
      {.grid = grid, .threads = kThreads, .shared_bytes = S::kSharedBytes, .stream = stream}, args);
}

template <int tokens, int promoted>
cudaError_t launch(const GemmArgs& args, cudaStream_t stream) {
  return args.x_type == Element::f16 ? launch<Shape<tokens, promoted, Element::f16>>(args, stream)
                                     : launch<Shape<tokens, promoted, Element::bf16>>(args, stream);
}

template <int promoted>
cudaError_t launch(const GemmArgs& args, cudaStream_t stream) {
  if (args.m <= 16) return launch<16, promoted>(args, stream);
  // several groups of scales a block leave no registers for 128 rows
  if constexpr (promoted == kBlockDepth) {
    if (args.m > 64) return launch<128, promoted>(args, stream);
  }
  return launch<64, promoted>(args, stream);
}

}  // namespace

cudaError_t launch_w4a16_mma_sm80(const GemmArgs& args, cudaStream_t stream) {
  if (args.x_type == Element::f32) return cudaErrorInvalidValue;
  switch (args.layout.promoted) {
    case 32: return launch<32>(args, stream);
    case 64: return launch<64>(args, stream);
    case 128: return launch<128>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace nibble::cuda
