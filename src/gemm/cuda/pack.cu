// AWQ tensors in device memory to the slabs of packed.h, one block a slab. Memory decides the
// speed, and packing happens once per weight: the code follows the drawing, not the clock.
#include "gemm/cuda/kernels.h"
#include "gemm/cuda/launch.h"

namespace nibble::cuda {
namespace {

constexpr int kThreads = 128;

struct PackParams {
  PackArgs args;
  int64_t words;  // of a row of q and zeros
};

/// Eight columns of a word in AWQ's order: nibbles 0 4 1 5 2 6 3 7.
__device__ __forceinline__ int awq_shift(int column) { return 4 * (column / 2 + column % 2 * 4); }

/// q of one k and column; 0 outside the matrix.
__device__ __forceinline__ uint32_t code(const PackParams& p, int64_t k, int64_t n) {
  if (k >= p.args.layout.k || n >= p.args.layout.n) return 0;
  return p.args.q[k * p.words + n / 8] >> awq_shift(static_cast<int>(n % 8)) & 15;
}

__device__ __forceinline__ uint32_t zero_point(const PackParams& p, int64_t group, int64_t n) {
  if (p.args.zeros == nullptr) return 8;
  return p.args.zeros[group * p.words + n / 8] >> awq_shift(static_cast<int>(n % 8)) & 15;
}

/// Word w of a lane in half h of the block from `k` on.
__device__ __forceinline__ uint32_t code_word(const PackParams& p, int64_t k, int64_t n, int lane,
                                              int h, int w) {
  const int64_t column = n + lane / 4 + w % 2 * 8;
  const int64_t first = k + 64 * h + 8 * (lane % 4) + w / 2 * 4;
  uint32_t word = 0;
  for (int b = 0; b < 4; ++b) {
    word |= (code(p, first + b, column) | code(p, first + 32 + b, column) << 4) << (8 * b);
  }
  return word;
}

__global__ void __launch_bounds__(kThreads) pack(const __grid_constant__ PackParams p) {
  const PackedLayout& layout = p.args.layout;
  // neighbouring tiles at the same time: they share the sectors of q
  const int64_t tile = blockIdx.x % layout.tiles, slice = blockIdx.x / layout.tiles;
  const int64_t n = tile * kSlabColumns, k = slice * kSlabDepth;
  uint8_t* slab = p.args.slabs + (tile * layout.slices + slice) * layout.slab_bytes;

  auto* words = reinterpret_cast<uint32_t*>(slab);
  for (int i = threadIdx.x; i < kSlabCodeBytes / 4; i += kThreads) {
    const int block = i / 256, half = i / 128 % 2, lane = i / 4 % 32, w = i % 4;
    words[i] = code_word(p, k + block * kBlockDepth, n, lane, half, w);
  }
  for (int i = threadIdx.x; i < 8 * layout.slab_groups; i += kThreads) {
    const int r = i / layout.slab_groups, group = i % layout.slab_groups;
    const int64_t first = k + group * layout.promoted, g = first / layout.group_size;
    uint32_t scales = 0, zeros = 0;
    for (int upper = 0; upper < 2; ++upper) {
      const int64_t column = n + r + 8 * upper;
      if (first >= layout.k || column >= layout.n) continue;
      zeros |= zero_point(p, g, column) << (4 * upper);
      scales |= uint32_t{p.args.scales[g * layout.n + column]} << (16 * upper);
    }
    words[kSlabCodeBytes / 4 + i] = scales;
    slab[layout.zeros_offset() + i] = static_cast<uint8_t>(zeros);
  }
}

}  // namespace

cudaError_t launch_pack(const PackArgs& args, cudaStream_t stream) {
  const PackParams params{args, args.layout.n / 8};
  const dim3 grid(static_cast<unsigned>(args.layout.tiles * args.layout.slices));
  return launch_kernel(pack, {.grid = grid, .threads = kThreads, .stream = stream}, params);
}

}  // namespace nibble::cuda
