// The activation quantizers without anything fused into them. Bits are those of
// gemm/cpu/quantize.cc; rows with a NaN or infinity get the scale NaN and codes 0.
#include <algorithm>

#include "gemm/cuda/quantize_rows.h"

namespace nibble::cuda {
namespace {

constexpr int kRangeThreads = 256;
constexpr int64_t kRangeBlocks = 1024;

template <Element type, bool vector>
struct Plain {
  static constexpr bool kVector = vector;
  // bf16 stays as it was loaded until it is encoded: three blocks of 448 threads instead of two.
  static constexpr int kRegisters = type == Element::bf16 ? 56 : kRowRegisters;
  QuantizeArgs a;

  __host__ __device__ const QuantizeArgs& args() const { return a; }

  __device__ auto fetch(int64_t row, int chunk, bool inside) const {
    const void* from = static_cast<const char*>(a.x) + row * a.x_stride * element_bytes(type);
    const int k = static_cast<int>(a.k);
    if constexpr (vector) {
      return load_raw<type>(from, chunk, inside && chunk * kChunk < k);
    } else {
      return load_elements<type>(from, chunk, k, inside);
    }
  }
  __device__ static Chunk values(const Chunk& c) { return c; }
  __device__ static Chunk values(const Raw<type>& raw) { return values_of<type>(raw); }
};

/// Scaling::tensor: the range of all finite elements. What is not finite spoils its own row only.
template <class Source>
__global__ void __launch_bounds__(kRangeThreads)
    tensor_range(const __grid_constant__ Source source) {
  ptx::grid_wait();
  const QuantizeArgs& a = source.args();
  const int chunks = static_cast<int>((a.k + kChunk - 1) / kChunk);
  Range range;
  for (int64_t row = blockIdx.x; row < a.m; row += gridDim.x) {
    for (int chunk = threadIdx.x; chunk < chunks; chunk += kRangeThreads) {
      Chunk c = source.values(source.fetch(row, chunk, true));
#pragma unroll
      for (float& v : c.v) v = fabsf(v) < __uint_as_float(kInfinityBits) ? v : 0.0f;
      range = widen(range, c, a.symmetric);
    }
  }
  range = block_range(range, a.symmetric);
  if (threadIdx.x == 0) {
    atomicMax(&a.tensor_range[0], range.amax);
    atomicMax(&a.tensor_range[1], range.high);
    atomicMax(&a.tensor_range[2], range.low);
  }
}

template <class Source>
cudaError_t launch(Source source, cudaStream_t stream) {
  if (source.a.scaling == Scaling::tensor) {
    uint32_t* range = source.a.tensor_range;
    const cudaError_t cleared = cudaMemsetAsync(range, 0, 4 * sizeof(uint32_t), stream);
    if (cleared != cudaSuccess) return cleared;
    const dim3 grid(static_cast<unsigned>(std::min(source.a.m, kRangeBlocks)));
    const cudaError_t ranged =
        launch_rows(tensor_range<Source>, grid, kRangeThreads, false, stream, source);
    if (ranged != cudaSuccess) return ranged;
    source.a.programmatic = false;  // it must not overtake tensor_range
  }
  return launch_quantize_rows(source, stream);
}

template <Element type>
cudaError_t launch(const QuantizeArgs& args, cudaStream_t stream) {
  if (vector_rows(args.x, args.x_stride, args.k, type)) {
    return launch(Plain<type, true>{args}, stream);
  }
  return launch(Plain<type, false>{args}, stream);
}

}  // namespace

cudaError_t launch_quantize(const QuantizeArgs& args, cudaStream_t stream) {
  switch (args.type) {
    case Element::f32: return launch<Element::f32>(args, stream);
    case Element::f16: return launch<Element::f16>(args, stream);
    case Element::bf16: return launch<Element::bf16>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace nibble::cuda
