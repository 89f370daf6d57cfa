// The second half of an MLP before its last product: function(gate) * up, quantized or in 16 bits.
#include <algorithm>

#include "gemm/cuda/fused_quantize.h"
#include "gemm/cuda/gate_cluster.h"
#include "gemm/cuda/gate_source.h"
#include "gemm/cuda/launch.h"
#include "gemm/cuda/quantize_rows.h"

namespace nibble::cuda {
namespace {

constexpr int kGateThreads = 256;
constexpr int kGateChunks = 2;  // of a thread

template <Element type, GateFunction function>
__global__ void __launch_bounds__(kGateThreads)
    gate_rows(const __grid_constant__ Gated<type, function> source, void* out, int64_t out_stride) {
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  const int64_t row = blockIdx.y;
  const int chunks = static_cast<int>(source.a.to.k / kChunk);
  const int first =
      static_cast<int>(blockIdx.x) * kGateThreads * kGateChunks + static_cast<int>(threadIdx.x);
  typename Gated<type, function>::Fetched fetched[kGateChunks];
#pragma unroll
  for (int i = 0; i < kGateChunks; ++i)
    fetched[i] = source.fetch(row, first + i * kGateThreads, true);
  auto* y = reinterpret_cast<uint4*>(static_cast<char*>(out) + row * out_stride * 2);
#pragma unroll
  for (int i = 0; i < kGateChunks; ++i) {
    const int chunk = first + i * kGateThreads;
    if (chunk < chunks) y[chunk] = rounded<type>(source.values(fetched[i]));
  }
}

/// Rows are the second dimension of a grid, which has fewer than 2^16.
template <Element type, GateFunction function>
cudaError_t launch_gate_rows(const GateQuantizeArgs& args, void* out, int64_t out_stride,
                             cudaStream_t stream) {
  constexpr int64_t kMostRows = 32768;
  constexpr int kBlockChunks = kGateThreads * kGateChunks;
  Launch how;
  how.threads = kGateThreads;
  how.stream = stream;
  how.programmatic = args.to.programmatic;
  for (int64_t row = 0; row < args.to.m; row += kMostRows) {
    Gated<type, function> part{args};
    part.a.to.x = static_cast<const char*>(args.to.x) + row * args.to.x_stride * 2;
    part.a.up = static_cast<const char*>(args.up) + row * args.up_stride * 2;
    void* to = static_cast<char*>(out) + row * out_stride * 2;
    how.grid = dim3(static_cast<unsigned>((args.to.k / kChunk + kBlockChunks - 1) / kBlockChunks),
                    static_cast<unsigned>(std::min(kMostRows, args.to.m - row)));
    const cudaError_t error = launch_kernel(gate_rows<type, function>, how, part, to, out_stride);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <Element type>
cudaError_t launch(const GateQuantizeArgs& args, void* out, int64_t out_stride,
                   cudaStream_t stream) {
  return args.function == GateFunction::silu
             ? launch_gate_rows<type, GateFunction::silu>(args, out, out_stride, stream)
             : launch_gate_rows<type, GateFunction::gelu_tanh>(args, out, out_stride, stream);
}

template <Element type>
cudaError_t launch(const GateQuantizeArgs& args, cudaStream_t stream) {
  if (args.function == GateFunction::silu) {
    return launch_quantize_rows(Gated<type, GateFunction::silu>{args}, stream);
  }
  return launch_quantize_rows(Gated<type, GateFunction::gelu_tanh>{args}, stream);
}

}  // namespace

cudaError_t launch_gate_quantize(const GateQuantizeArgs& args, cudaStream_t stream) {
  const QuantizeArgs& to = args.to;
  if (to.type == Element::f32 || to.scaling == Scaling::tensor ||
      !vector_rows(to.x, to.x_stride, to.k, to.type) ||
      !vector_rows(args.up, args.up_stride, to.k, to.type)) {
    return cudaErrorInvalidValue;
  }
  const int blocks = gate_cluster_blocks(args);
  if (blocks > 1) return launch_gate_cluster(args, blocks, stream);
  return to.type == Element::f16 ? launch<Element::f16>(args, stream)
                                 : launch<Element::bf16>(args, stream);
}

cudaError_t launch_gate(const GateQuantizeArgs& args, void* out, int64_t out_stride,
                        cudaStream_t stream) {
  const QuantizeArgs& to = args.to;
  if (to.type == Element::f32 || to.m < 1 || !vector_rows(to.x, to.x_stride, to.k, to.type) ||
      !vector_rows(args.up, args.up_stride, to.k, to.type) ||
      !vector_rows(out, out_stride, to.k, to.type)) {
    return cudaErrorInvalidValue;
  }
  return to.type == Element::f16 ? launch<Element::f16>(args, out, out_stride, stream)
                                 : launch<Element::bf16>(args, out, out_stride, stream);
}

}  // namespace nibble::cuda
