// What w4a8_ss_sm90 and w4a16_ss_sm90 start from: the first tiles of the weights' image
// (ss_image.h), and scales per (token, group) group by group. One launch, at memory speed.
#include <cuda_runtime.h>

#include "gemm/cuda/kernels.h"
#include "gemm/cuda/launch.h"
#include "gemm/cuda/ptx.h"
#include "gemm/cuda/ss_expander.h"

namespace nibble::cuda {
namespace {

constexpr int kThreads = 128;  // four warps: two or three of a tile's runs of 16 columns each
constexpr int kScalesOfBlock = kThreads * 8;  // copied
constexpr int kWordsOfBlock = kThreads * 8;   // cleared

struct ExpandParams {
  ExpandSource weights;
  SsImage shape;
  const float* t;  // (m, groups) to (groups, rows)
  float* t_of_groups;
  int64_t m, groups, rows;
  uint32_t* pieces;  // piece_words zeros
  int64_t piece_words;
  int first_scales, first_pieces;  // blocks of the grid: first those of the image
};

/// Block `index` of the image: all of a warp's runs are loaded before the first is stored.
template <Expanded to, int runs>
__device__ void expand_runs(const ExpandParams& p, int index) {
  constexpr int kWarps = kThreads / 32;
  const int tile = index / p.weights.blocks, block = index - tile * p.weights.blocks;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  constexpr SsImage kShape = {.columns = runs * kWarps * kSlabColumns,
                              .weight_bytes = is_half(to) ? 2 : 1};
  uint8_t* image = p.weights.image + int64_t{index} * kShape.block_bytes();
  Run of[runs];
#pragma unroll
  for (int i = 0; i < runs; ++i) {
    of[i] = Run(p.weights, int64_t{tile} * (runs * kWarps) + i * kWarps + warp, block, lane);
  }
#pragma unroll
  for (int i = 0; i < runs; ++i)
    of[i].template store<to>(p.weights, kShape, image, i * kWarps + warp, lane);
}

template <Expanded to>
__device__ void expand(const ExpandParams& p, int index) {
  constexpr int kRunsOfPass = kThreads / 32;
  if (p.shape.columns == 2 * kRunsOfPass * kSlabColumns) {
    expand_runs<to, 2>(p, index);
  } else {
    expand_runs<to, 3>(p, index);
  }
}

__device__ void transpose_scales(const ExpandParams& p, int block) {
  const int64_t first = int64_t{block} * kScalesOfBlock;
#pragma unroll
  for (int j = 0; j < kScalesOfBlock; j += kThreads) {
    const int64_t i = first + j + threadIdx.x;
    if (i >= p.groups * p.rows) return;
    const int64_t group = i / p.rows, row = i - group * p.rows;
    p.t_of_groups[i] = row < p.m ? p.t[row * p.groups + group] : 0.0f;
  }
}

__device__ void clear_pieces(const ExpandParams& p, int block) {
  const int64_t first = int64_t{block} * kWordsOfBlock;
#pragma unroll
  for (int j = 0; j < kWordsOfBlock; j += kThreads) {
    const int64_t i = first + j + threadIdx.x;
    if (i < p.piece_words) p.pieces[i] = 0;
  }
}

template <Expanded to>
__global__ void __launch_bounds__(kThreads) prepare(const __grid_constant__ ExpandParams p) {
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  const int block = static_cast<int>(blockIdx.x);
  if (block < p.first_scales) {
    expand<to>(p, block);
  } else if (block < p.first_pieces) {
    transpose_scales(p, block - p.first_scales);
  } else {
    clear_pieces(p, block - p.first_pieces);
  }
}

/// What makes the first `tiles` tiles of the image, and nothing else.
ExpandParams image_params(const GemmArgs& args, const SsImage& shape, int64_t tiles,
                          uint8_t* image) {
  ExpandParams p = {};
  p.weights = expand_source(args, image);
  p.shape = shape;
  p.first_scales = p.first_pieces = static_cast<int>(tiles) * p.weights.blocks;
  return p;
}

cudaError_t launch_prepare(const ExpandParams& p, Expanded to, int blocks, bool programmatic,
                           cudaStream_t stream) {
  const auto kernel = to == Expanded::int8   ? prepare<Expanded::int8>
                      : to == Expanded::e4m3 ? prepare<Expanded::e4m3>
                      : to == Expanded::f16  ? prepare<Expanded::f16>
                                             : prepare<Expanded::bf16>;
  return launch_kernel(kernel,
                       {.grid = dim3(static_cast<unsigned>(blocks)),
                        .threads = kThreads,
                        .stream = stream,
                        .programmatic = programmatic},
                       p);
}

}  // namespace

cudaError_t launch_expand_weights(const GemmArgs& args, bool e4m3, uint8_t* image,
                                  cudaStream_t stream) {
  if (args.layout.promoted != kBlockDepth) return cudaErrorInvalidValue;
  const ExpandParams p = image_params(args, kKeptImage, kKeptImage.tiles(args.layout), image);
  return launch_prepare(p, e4m3 ? Expanded::e4m3 : Expanded::int8, p.first_scales, false, stream);
}

cudaError_t launch_expand(const GemmArgs& args, const SsConfig& config, void* scratch,
                          cudaStream_t stream) {
  const PackedLayout& layout = args.layout;
  if (layout.promoted != kBlockDepth || args.group_scales != config.group_scales) {
    return cudaErrorInvalidValue;
  }
  const SsImage shape = config.image();
  if (shape.columns != 128 && shape.columns != 192) return cudaErrorInvalidValue;
  const SsScratch at = ss_scratch(layout, args.m, config);
  auto* bytes = static_cast<uint8_t*>(scratch);
  ExpandParams p = {};
  if (!config.expanded) {
    p = image_params(args, shape, 2 * ss_first_pairs(layout, config), bytes + at.image);
  }
  const auto blocks_for = [](int64_t count, int of_block) {
    return static_cast<int>((count + of_block - 1) / of_block);
  };
  if (config.group_scales) {
    p.t = args.scales;
    p.t_of_groups = reinterpret_cast<float*>(bytes + at.scales);
    p.m = args.m;
    p.groups = layout.k / layout.group_size;
    p.rows = ss_scale_rows(args.m, config);
    p.first_pieces += blocks_for(p.groups * p.rows, kScalesOfBlock);
  }
  p.pieces = reinterpret_cast<uint32_t*>(bytes + at.pieces);
  p.piece_words = ss_piece_words(layout, config);
  const int blocks = p.first_pieces + blocks_for(p.piece_words, kWordsOfBlock);
  if (blocks == 0) return cudaSuccess;
  Expanded to = config.e4m3 ? Expanded::e4m3 : Expanded::int8;
  if (config.halves) to = args.x_type == Element::f16 ? Expanded::f16 : Expanded::bf16;
  return launch_prepare(p, to, blocks, config.programmatic, stream);
}

}  // namespace nibble::cuda
