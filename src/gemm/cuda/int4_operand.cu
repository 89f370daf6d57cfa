// int8 codes to the operand of w4a4_mma_sm80. Four neighbouring threads make 128 k: thread c the 16
// bytes of lane c, from four pieces of eight codes.
#include "gemm/cuda/launch.h"
#include "gemm/cuda/ptx.h"
#include "gemm/cuda/w4a4_mma_sm80.h"

namespace nibble::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kQuad = 4;  // threads of 128 k

struct Int4Params {
  const int8_t* from;
  int64_t m, blocks;  // rows; of 128 k in a row
  uint4* codes;
  int32_t* runs;
  bool symmetric;
};

/// Sum over the four threads of 128 k.
__device__ __forceinline__ int quad_sum(int v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}
__device__ __forceinline__ int quad_min(int v) {
  v = min(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return min(v, __shfl_xor_sync(0xffffffffu, v, 2));
}

__device__ __forceinline__ int sum_of(uint2 codes) {
  return __dp4a(static_cast<int>(codes.x), 0x01010101,
                __dp4a(static_cast<int>(codes.y), 0x01010101, 0));
}
__device__ __forceinline__ int least_of(uint32_t codes) {
  int least = 127;
#pragma unroll
  for (int b = 0; b < 4; ++b) least = min(least, static_cast<int>(codes << (24 - 8 * b)) >> 24);
  return least;
}
__device__ __forceinline__ int least_of(uint2 codes) {
  return min(least_of(codes.x), least_of(codes.y));
}

/// Four codes, plus the lift, as low and four as high nibbles. No byte carries into the next.
__device__ __forceinline__ uint32_t nibbles(uint32_t low, uint32_t high, int lift) {
  const uint32_t lifts = static_cast<uint32_t>(lift) * 0x01010101u;
  const uint32_t l = ((low & 0x0f0f0f0fu) + lifts) & 0x0f0f0f0fu;
  const uint32_t h = ((high & 0x0f0f0f0fu) + lifts) & 0x0f0f0f0fu;
  return l | h << 4;
}

template <int promoted>
__global__ void __launch_bounds__(kThreads) int4_operand(const __grid_constant__ Int4Params p) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t block = i / kQuad, count = p.m * p.blocks;
  const int c = threadIdx.x % kQuad;
  const bool inside = block < count;  // whole warps stay for the sums
  const int8_t* from = p.from + (inside ? block : count - 1) * kBlockDepth + c * 8;
  uint2 piece[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) piece[j] = ptx::load8(from + 32 * j);
  constexpr int kRuns = kBlockDepth / promoted, kPieces = 4 / kRuns;
  const int64_t row = block / p.blocks, in_row = block % p.blocks;
  int lift[kRuns] = {};
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    int sum = 0, least = 0;
#pragma unroll
    for (int j = r * kPieces; j < (r + 1) * kPieces; ++j) {
      sum += sum_of(piece[j]);
      least = min(least, least_of(piece[j]));
    }
    sum = quad_sum(sum);
    if (!p.symmetric) lift[r] = -quad_min(least);
    if (inside && c == 0) p.runs[(in_row * kRuns + r) * p.m + row] = sum * 16 + lift[r];
  }
  const int first = lift[0], second = lift[kRuns - 1];
  const uint4 made = {
      nibbles(piece[0].x, piece[1].x, first), nibbles(piece[0].y, piece[1].y, first),
      nibbles(piece[2].x, piece[3].x, second), nibbles(piece[2].y, piece[3].y, second)};
  if (inside) p.codes[i] = made;
}

}  // namespace

cudaError_t launch_int4_operand(const GemmArgs& args, bool symmetric, void* scratch,
                                cudaStream_t stream) {
  const Int4Scratch at = int4_scratch(args.layout, args.m);
  auto* base = static_cast<uint8_t*>(scratch);
  Int4Params p = {};
  p.from = args.codes;
  p.m = args.m;
  p.blocks = args.layout.padded_k() / kBlockDepth;
  p.codes = reinterpret_cast<uint4*>(base + at.codes);
  p.runs = reinterpret_cast<int32_t*>(base + at.runs);
  p.symmetric = symmetric;
  const int64_t threads = p.m * p.blocks * kQuad;
  const Launch how = {.grid = dim3(static_cast<unsigned>((threads + kThreads - 1) / kThreads)),
                      .threads = kThreads,
                      .stream = stream};
  switch (args.layout.promoted) {
    case 64: return launch_kernel(int4_operand<64>, how, p);
    case 128: return launch_kernel(int4_operand<128>, how, p);
  }
  return cudaErrorInvalidValue;
}

}  // namespace nibble::cuda
