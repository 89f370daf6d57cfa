// The product of few rows on any device from sm_80 on: a block makes 32 columns x 8 rows of x, so
// that there are blocks for all multiprocessors, and its eight warps share out K, 128 k a warp in
// turn. Splitting K changes no bit: the warps hand over exact sums, one for each output and group,
// and one thread an output adds them up, group after group in order.
//
// Shared memory
//   stage   of 1024 k: for each warp 2 tiles x 1 KiB of the slabs, and 8 rows x 128 codes, swizzled
//           as load_row() wants them; scales and zero points of 2 slices x 2 tiles; if activation
//           scales are per group: (warp, group, row)
//   sums    (warp, group, output), output = (tile * 4 + i) * 32 + lane: register i of that lane
#include "gemm/cuda/w4a8_mma_skinny_sm80.h"

#include "gemm/cuda/launch.h"
#include "gemm/cuda/mma_sm80.h"

namespace nibble::cuda {
namespace {

using namespace mma;

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kTokens = 8;
constexpr int kTiles = 2;
constexpr int kOutputs = kTiles * kSlabColumns * kTokens;
constexpr int kStageSlices = kWarps / kSliceBlocks;
static_assert(kOutputs == kThreads, "a thread adds up one output");

template <int promoted, bool group_scales>
struct Shape : Depth<promoted> {
  static constexpr int kPromoted = promoted;
  static constexpr bool kGroupScales = group_scales;
  static constexpr int kStages = promoted == 32 ? 2 : 3;  // within the 99 KiB of sm_86 and sm_89
  static constexpr int kTokensAt = kWarps * kTiles * kTileBytes;
  static constexpr int kScalesAt = kTokensAt + kWarps * kTokens * kBlockDepth;
  static constexpr int kFactorsAt = kScalesAt + kStageSlices * kTiles * Shape::kScaleBytes;
  static constexpr int kFactors = group_scales ? kWarps * Shape::kGroups * kTokens : 0;
  static constexpr int kStageBytes = kFactorsAt + kFactors * 4;
  static constexpr int kSumsAt = kStages * kStageBytes;
  static constexpr int kSharedBytes = kSumsAt + kWarps * Shape::kGroups * kOutputs * 4;
  static_assert(kFactors <= kThreads && kSharedBytes <= 99 * 1024);
};

struct Position {
  int tile, token;  // first of the block
  int lane, warp;
};

/// Starts the copies of blocks 8 step .. 8 step + 7 of 128 k, as far as there are any.
template <class S>
__device__ __forceinline__ void load_stage(const GemmArgs& a, const Position& p, int step,
                                           uint32_t shared, const Groups& groups) {
  const uint32_t stage = shared + step % S::kStages * S::kStageBytes;
  const int slices = static_cast<int>(a.layout.slices), m = static_cast<int>(a.m);
  const int last_tile = static_cast<int>(a.layout.tiles) - 1;
  const auto slab = [&](int tile, int slice) {
    return a.slabs +
           (min(p.tile + tile, last_tile) * a.layout.slices + slice) * a.layout.slab_bytes;
  };
  const int block = step * kWarps + p.warp, slice = block / kSliceBlocks;
  if (slice < slices) {  // each warp loads its own codes
#pragma unroll
    for (int i = 0; i < kTiles * kTileBytes / 512; ++i) {
      const int at = i * 512 + p.lane * 16;
      ptx::copy16_async(
          stage + p.warp * kTiles * kTileBytes + at,
          slab(at / kTileBytes, slice) + block % kSliceBlocks * kTileBytes + at % kTileBytes);
    }
#pragma unroll
    for (int i = 0; i < kTokens * kBlockDepth / 512; ++i) {
      const int token = (i * 32 + p.lane) / 8, piece = p.lane % 8, row = p.token + token;
      const int64_t from = min(row, m - 1) * (a.layout.slices * kSlabDepth) + block * kBlockDepth;
      ptx::copy16_async(
          stage + S::kTokensAt + p.warp * kTokens * kBlockDepth + row_piece(token, piece),
          a.codes + from + piece * 16, row < m ? 16 : 0);
    }
  }
  constexpr int kPieces = S::kScaleBytes / 16;
  const int first_slice = step * kStageSlices;
  for (int i = threadIdx.x; i < kStageSlices * kTiles * kPieces; i += kThreads) {
    const int of = first_slice + i / (kTiles * kPieces), tile = i / kPieces % kTiles;
    if (of >= slices) break;
    ptx::copy16_async(stage + S::kScalesAt + i * 16,
                      slab(tile, of) + kSlabCodeBytes + i % kPieces * 16);
  }
  if constexpr (S::kGroupScales) {
    if (static_cast<int>(threadIdx.x) < S::kFactors) {
      const int row = p.token + threadIdx.x % kTokens, g = threadIdx.x / kTokens % S::kGroups;
      const int of = step * kWarps + threadIdx.x / (kTokens * S::kGroups);
      const int group = S::kGroups == 1 ? of / groups.blocks : of * S::kGroups + g;
      const bool inside = row < m && group < groups.count;
      ptx::copy4_async(stage + S::kFactorsAt + threadIdx.x * 4,
                       a.scales + (inside ? int64_t{row} * groups.count + group : 0),
                       inside ? 4 : 0);
    }
  }
}

template <class S>
__device__ __forceinline__ uint32_t scales_at(uint32_t stage, int warp, int tile) {
  return stage + S::kScalesAt + (warp / kSliceBlocks * kTiles + tile) * S::kScaleBytes;
}

/// The sums of the warp's 128 k, times the activation scale if that is per group.
template <class S>
__device__ __forceinline__ void store_sums(uint32_t shared, uint32_t stage, const Position& p) {
  uint2 b[kSteps];
  load_row(stage + S::kTokensAt + (p.warp * kTokens + p.lane / 4) * kBlockDepth, p.lane, b);
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const auto tile = load_tile<S::kPromoted>(stage + (p.warp * kTiles + t) * kTileBytes,
                                              scales_at<S>(stage, p.warp, t), p.warp % kSliceBlocks,
                                              p.lane, false);
#pragma unroll
    for (int g = 0; g < S::kGroups; ++g) {
      const int group = p.warp * S::kGroups + g;
      float s[4];
      group_sums(tile, b, g, s);
      if constexpr (S::kGroupScales) {
        const int first = group * kTokens + p.lane % 4 * 2;
        const uint2 f = ptx::load8_shared(stage + S::kFactorsAt + first * 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) s[i] = s[i] * __uint_as_float(i % 2 == 0 ? f.x : f.y);
      }
      const uint32_t to = shared + S::kSumsAt + group * kOutputs * 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ptx::store_float_shared(to + ((t * 4 + i) * 32 + p.lane) * 4, s[i]);
      }
    }
  }
}

/// acc = fma(sum, s, acc) for this thread's output, over the stage's blocks of 128 k in order.
template <class S>
__device__ __forceinline__ float add_sums(uint32_t shared, uint32_t stage, int blocks,
                                          const Position& p, bool bf16, float acc) {
  const int tile = p.warp / 4, i = p.warp % 4;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w >= blocks) break;
#pragma unroll
    for (int g = 0; g < S::kGroups; ++g) {
      const uint32_t sums = shared + S::kSumsAt + (w * S::kGroups + g) * kOutputs * 4;
      const int group = p.lane / 4 * S::kSlabGroups + w % kSliceBlocks * S::kGroups + g;
      const float2 s = scales_of(ptx::load4_shared(scales_at<S>(stage, w, tile) + group * 4), bf16);
      acc = __fmaf_rn(ptx::load_float_shared(sums + threadIdx.x * 4), i < 2 ? s.x : s.y, acc);
    }
  }
  return acc;
}

template <class S>
__device__ __forceinline__ void store_output(const GemmArgs& a, const Position& p, float acc) {
  const int tile = p.warp / 4, i = p.warp % 4;
  const int row = p.token + p.lane % 4 * 2 + i % 2;
  const int column = (p.tile + tile) * kSlabColumns + p.lane / 4 + i / 2 * 8;
  if (row >= a.m || column >= a.layout.n) return;
  const float y = finish(acc, S::kGroupScales ? 1.0f : a.scales[row], a.out.bias, column);
  const int64_t at = row * a.out.stride + column;
  if (a.out.type == Element::f32) {
    static_cast<float*>(a.out.y)[at] = y;
  } else {
    static_cast<unsigned short*>(a.out.y)[at] = static_cast<unsigned short>(bits16(y, a.out.type));
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, 1)
    w4a8_mma_skinny(const __grid_constant__ GemmArgs args, const __grid_constant__ Groups groups) {
  extern __shared__ __align__(128) uint8_t memory[];
  const uint32_t shared = ptx::shared_address(memory);
  const Position p = {static_cast<int>(blockIdx.y) * kTiles, static_cast<int>(blockIdx.x) * kTokens,
                      static_cast<int>(threadIdx.x % 32), static_cast<int>(threadIdx.x / 32)};
  const int blocks = static_cast<int>((args.layout.k + kBlockDepth - 1) / kBlockDepth);
  const int steps = (blocks + kWarps - 1) / kWarps;
  for (int step = 0; step < S::kStages - 1; ++step) {
    if (step < steps) load_stage<S>(args, p, step, shared, groups);
    ptx::copy_commit();
  }
  float acc = 0;
  for (int step = 0; step < steps; ++step) {
    ptx::copy_wait<S::kStages - 2>();
    __syncthreads();  // the stage is there for all; nobody reads the one before, or sums, any more
    const int next = step + S::kStages - 1;
    if (next < steps) load_stage<S>(args, p, next, shared, groups);
    ptx::copy_commit();
    const uint32_t stage = shared + step % S::kStages * S::kStageBytes;
    const int left = blocks - step * kWarps;
    if (p.warp < left) store_sums<S>(shared, stage, p);
    __syncthreads();
    acc = add_sums<S>(shared, stage, left, p, args.bf16_scales, acc);
  }
  store_output<S>(args, p, acc);
}

template <class S>
cudaError_t launch(const GemmArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((args.m + kTokens - 1) / kTokens),
                  static_cast<unsigned>((args.layout.tiles + kTiles - 1) / kTiles));
  return launch_kernel(
      w4a8_mma_skinny<S>,
      {.grid = grid, .threads = kThreads, .shared_bytes = S::kSharedBytes, .stream = stream}, args,
      groups_of(args.layout));
}

template <int promoted>
cudaError_t launch(const GemmArgs& args, cudaStream_t stream) {
  return args.group_scales ? launch<Shape<promoted, true>>(args, stream)
                           : launch<Shape<promoted, false>>(args, stream);
}

}  // namespace

cudaError_t launch_w4a8_mma_skinny_sm80(const GemmArgs& args, cudaStream_t stream) {
  switch (args.layout.promoted) {
    case 32: return launch<32>(args, stream);
    case 64: return launch<64>(args, stream);
    case 128: return launch<128>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace nibble::cuda
