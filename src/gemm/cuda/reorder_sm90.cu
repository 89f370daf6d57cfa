// x of 16 bits in the order in which wgmma meets the k of weights in registers (halves.h): of each
// 32 k, place 16 i + 8 h + 2 c + e holds k 8 c + 4 i + h + 2 e. At memory speed; k past K are
// zeros.
#include "gemm/cuda/halves.h"
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
  const uint4 y = transpose_quad(pair_activations(x), threadIdx.x);
  if (i < p.count) p.to[i] = y;
}

}  // namespace

cudaError_t launch_reorder(const GemmArgs& args, void* to, cudaStream_t stream) {
  ReorderParams p = {};
  p.x = static_cast<const uint8_t*>(args.x);
  p.row_bytes = args.x_stride * 2;
  p.chunks = static_cast<int>(args.x_columns / 8);
  p.row_chunks = static_cast<int>(args.layout.padded_k() / 8);
  p.count = args.m * p.row_chunks;
  p.to = static_cast<uint4*>(to);
  const dim3 grid(static_cast<unsigned>((p.count + kThreads - 1) / kThreads));
  return launch_kernel(
      reorder, {.grid = grid, .threads = kThreads, .stream = stream, .programmatic = true}, p);
}

}  // namespace nibble::cuda
