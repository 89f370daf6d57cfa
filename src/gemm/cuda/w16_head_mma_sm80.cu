// lm_head: 16-bit weights times float activations that come as two 16-bit parts (head_product.h).
//
// A warp owns 16 rows of w, the A side of m16n8k16, and keeps the next 128 k of them on their way
// in registers; the parts of up to 64 rows of x, the B side, go through shared memory, two stages
// of 128 k. Which k a lane's registers hold is free as long as A and B agree: lane 4 r + c takes
// the 8 neighbours from 32 j + 8 c on, so that w and x are read 16 bytes at a time.
#include "gemm/cuda/halves.h"
#include "gemm/cuda/head_product.h"
#include "gemm/cuda/launch.h"
#include "gemm/cuda/ptx.h"

namespace nibble::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kWarpRows = 16;
constexpr int kDepth = 128;          // k of a stage
constexpr int kSteps = kDepth / 32;  // of 32 k, two products each
// Of a row of x in shared memory: 64 bytes more than the data, so that the 8 lanes that read at
// once meet all banks once.
constexpr int kRowBytes = kDepth * 2 + 64;
constexpr int kStages = 2;

/// Bytes of one stage: two parts of 8 * tiles rows.
constexpr int stage_bytes(int tiles) { return 2 * 8 * tiles * kRowBytes; }

struct Rows {
  uint4 upper[kSteps], lower[kSteps];  // of w: rows r and r + 8
};

template <Element type, int kTiles>
__global__ void __launch_bounds__(kThreads, kTiles > 4 ? 1 : 2)
    head_product(const __grid_constant__ HeadArgs a) {
  extern __shared__ __align__(16) uint8_t shared[];
  const uint32_t stages = ptx::shared_address(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int r = lane / 4, c = lane % 4;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * kWarpRows + r;
  const auto* w = static_cast<const uint8_t*>(a.w);
  const int64_t row_bytes = a.k * 2;

  const auto load = [&](int64_t k0) {
    Rows rows;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const int64_t k = k0 + 32 * j + 8 * c;
      const uint4 zero = {};
      const auto* at = reinterpret_cast<const uint4*>(w + row * row_bytes + k * 2);
      const auto* below = reinterpret_cast<const uint4*>(w + (row + 8) * row_bytes + k * 2);
      rows.upper[j] = k < a.k && row < a.n ? __ldcs(at) : zero;
      rows.lower[j] = k < a.k && row + 8 < a.n ? __ldcs(below) : zero;
    }
    return rows;
  };
  // Rows of x past a.rows, and k past a.k, are zeros.
  const auto request = [&](int64_t k0, int stage) {
    constexpr int kPieces = kDepth / 8;
    for (int i = threadIdx.x; i < 2 * 8 * kTiles * kPieces; i += kThreads) {
      const int piece = i % kPieces, token = i / kPieces % (8 * kTiles);
      const int part = i / (kPieces * 8 * kTiles);
      const int64_t k = k0 + 8 * piece;
      const bool there = token < a.rows && k < a.k;
      const auto* from = static_cast<const uint8_t*>(part == 0 ? a.x.high : a.x.low);
      ptx::copy16_async(stages + stage * stage_bytes(kTiles) +
                            (part * 8 * kTiles + token) * kRowBytes + piece * 16,
                        there ? from + token * row_bytes + k * 2 : from, there ? 16 : 0);
    }
    ptx::copy_commit();
  };

  float acc[kTiles][4] = {};
  Rows next = load(0);
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  request(0, 0);
  int stage = 0;
  for (int64_t k0 = 0; k0 < a.k; k0 += kDepth) {
    const Rows now = next;
    const bool more = k0 + kDepth < a.k;
    if (more) next = load(k0 + kDepth);
    ptx::copy_wait<0>();
    __syncthreads();  // this stage is here, and the other one has been read
    if (more) request(k0 + kDepth, stage ^ 1);
    const uint32_t high = stages + stage * stage_bytes(kTiles) + r * kRowBytes + c * 16;
    const uint32_t low = high + 8 * kTiles * kRowBytes;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const uint4 u = now.upper[j], l = now.lower[j];
      const uint32_t first[4] = {u.x, l.x, u.y, l.y}, second[4] = {u.z, l.z, u.w, l.w};
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const uint4 h = ptx::load16_shared(high + t * 8 * kRowBytes + j * 64);
        const uint4 o = ptx::load16_shared(low + t * 8 * kRowBytes + j * 64);
        mma_halves<type>(acc[t], first, h.x, h.y);
        mma_halves<type>(acc[t], second, h.z, h.w);
        mma_halves<type>(acc[t], first, o.x, o.y);
        mma_halves<type>(acc[t], second, o.z, o.w);
      }
    }
    stage ^= 1;
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t token = t * 8 + 2 * c + i % 2, column = row + (i < 2 ? 0 : 8);
      if (token < a.rows && column < a.n) a.y[token * a.y_stride + column] = acc[t][i];
    }
  }
}

template <Element type>
cudaError_t launch_rows(const HeadArgs& args, const Launch& how) {
  const auto with = [&](auto kernel, int tiles) {
    Launch sized = how;
    sized.shared_bytes = kStages * stage_bytes(tiles);
    return launch_kernel(kernel, sized, args);
  };
  if (args.rows <= 8) return with(head_product<type, 1>, 1);
  if (args.rows <= 16) return with(head_product<type, 2>, 2);
  if (args.rows <= 32) return with(head_product<type, 4>, 4);
  return with(head_product<type, 8>, 8);
}

}  // namespace

cudaError_t launch_w16_head_mma_sm80(const HeadArgs& args, cudaStream_t stream) {
  const bool bf16 = args.x.type == Element::bf16;
  if (args.k % 8 != 0 || (!bf16 && args.x.type != Element::f16)) return cudaErrorInvalidValue;
  const int64_t columns = kWarps * kWarpRows;
  for (int64_t at = 0; at < args.rows; at += kHeadRows) {
    HeadArgs part = args;
    part.rows = args.rows - at < kHeadRows ? args.rows - at : kHeadRows;
    part.x.high = static_cast<uint8_t*>(args.x.high) + at * args.k * 2;
    part.x.low = static_cast<uint8_t*>(args.x.low) + at * args.k * 2;
    part.y += at * args.y_stride;
    const Launch how{.grid = static_cast<unsigned>((args.n + columns - 1) / columns),
                     .threads = kThreads,
                     .stream = stream,
                     .programmatic = args.programmatic};
    const cudaError_t error = bf16 ? launch_rows<Element::bf16>(part, how)
                                   : launch_rows<Element::f16>(part, how);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace nibble::cuda
