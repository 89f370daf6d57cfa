// Rows of the embedding table to the residual stream.
#include "gemm/cuda/launch.h"
#include "gemm/cuda/quantize_rows.h"
#include "model/cuda/kernels.h"

namespace nibble::cuda {
namespace {

constexpr int kThreads = 256;

template <Element type>
__global__ void __launch_bounds__(kThreads) gather_rows(const __grid_constant__ EmbeddingArgs a) {
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  const int chunks = static_cast<int>(a.width / kChunk);
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row = index / chunks;
  const int chunk = static_cast<int>(index - row * chunks);
  if (row >= a.rows) return;
  const int token = a.tokens[row];
  const bool known = token >= 0 && token < a.vocab;
  const auto* from =
      static_cast<const char*>(a.table) + int64_t{token} * a.width * element_bytes(type);
  const Chunk c = values_of<type>(load_raw<type>(from, chunk, known));
  float v[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    v[i] = known ? c.v[i] * a.scale : __uint_as_float(0x7fc00000u);
  }
  auto* to = reinterpret_cast<float4*>(a.hidden + row * a.width) + 2 * chunk;
  to[0] = {v[0], v[1], v[2], v[3]};
  to[1] = {v[4], v[5], v[6], v[7]};
}

}  // namespace

cudaError_t launch_embedding(const EmbeddingArgs& args, cudaStream_t stream) {
  if (args.rows < 1 || args.vocab < 1 || args.table == nullptr || args.tokens == nullptr ||
      args.hidden == nullptr || !vector_rows(args.table, args.width, args.width, args.type) ||
      !vector_rows(args.hidden, args.width, args.width, Element::f32)) {
    return cudaErrorInvalidValue;
  }
  Launch how;
  how.grid =
      dim3(static_cast<unsigned>((args.rows * (args.width / kChunk) + kThreads - 1) / kThreads));
  how.threads = kThreads;
  how.stream = stream;
  how.programmatic = args.programmatic;
  switch (args.type) {
    case Element::f32: return launch_kernel(gather_rows<Element::f32>, how, args);
    case Element::f16: return launch_kernel(gather_rows<Element::f16>, how, args);
    case Element::bf16: return launch_kernel(gather_rows<Element::bf16>, how, args);
  }
  return cudaErrorInvalidValue;
}

}  // namespace nibble::cuda
