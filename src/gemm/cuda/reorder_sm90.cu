// x of 16 bits in the order in which wgmma meets the k of weights in registers (halves.h): of each
// 32 k, place 16 i + 8 h + 2 c + e holds k 8 c + 4 i + h + 2 e. At memory speed; k past K are
// zeros.
#include "gemm/cuda/kernels.h"
#include "gemm/cuda/launch.h"
#include "gemm/cuda/ptx.h"

namespace nibble::cuda {
namespace {

constexpr int kThreads = 256;

struct ReorderParams {
  const uint8_t* x;
  int64_t row_bytes;
  int chunks, row_chunks;  // of 8 elements: in a row of x; in a row of what is made
  int64_t count;           // of all rows
  uint4* to;
};

/// Lane c of four has the pairs of its eight k for each place of (i, h), in a word each; afterwards
/// it has all four lanes' pairs of place c.
__device__ __forceinline__ uint4 transpose_quad(uint4 w, int lane) {
  const bool odd = lane & 1, upper = lane & 2;
  const uint32_t p = __shfl_xor_sync(~0u, odd ? w.x : w.y, 1);
  const uint32_t q = __shfl_xor_sync(~0u, odd ? w.z : w.w, 1);
  const uint4 v = odd ? make_uint4(p, w.y, q, w.w) : make_uint4(w.x, p, w.z, q);
  const uint32_t r = __shfl_xor_sync(~0u, upper ? v.x : v.z, 2);
  const uint32_t s = __shfl_xor_sync(~0u, upper ? v.y : v.w, 2);
  return upper ? make_uint4(r, s, v.z, v.w) : make_uint4(v.x, v.y, r, s);
}

__global__ void __launch_bounds__(kThreads) reorder(const __grid_constant__ ReorderParams p) {
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row = i / p.row_chunks;
  const int chunk = static_cast<int>(i - row * p.row_chunks);
  uint4 x = make_uint4(0, 0, 0, 0);
  if (i < p.count && chunk < p.chunks) {
    x = ptx::load16(p.x + row * p.row_bytes + int64_t{chunk} * 16);
  }
  const uint4 pairs = {__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.x, x.y, 0x7632),
                       __byte_perm(x.z, x.w, 0x5410), __byte_perm(x.z, x.w, 0x7632)};
  const uint4 y = transpose_quad(pairs, threadIdx.x);
  if (i < p.count) p.to[i] = y;
}

}  // namespace

cudaError_t launch_reorder(const GemmArgs& args, void* to, cudaStream_t stream) {
  ReorderParams p = {};
  p.x = static_cast<const uint8_t*>(args.x);
  p.row_bytes = args.x_stride * 2;
  p.chunks = static_cast<int>(args.layout.k / 8);
  p.row_chunks = static_cast<int>(args.layout.padded_k() / 8);
  p.count = args.m * p.row_chunks;
  p.to = static_cast<uint4*>(to);
  const dim3 grid(static_cast<unsigned>((p.count + kThreads - 1) / kThreads));
  return launch_kernel(
      reorder, {.grid = grid, .threads = kThreads, .stream = stream, .programmatic = true}, p);
}

}  // namespace nibble::cuda
