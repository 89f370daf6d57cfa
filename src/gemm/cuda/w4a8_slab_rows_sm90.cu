// M <= 2, one launch: rows of x, which every block quantizes for itself, times packed weights, by
// slab_registers.h or slab_streamed.h. The bits are those of quantize.cu and the separate product.
#include "gemm/cuda/fused_product.h"
#include "gemm/cuda/quantize_rows.h"
#include "gemm/cuda/slab_made.h"
#include "gemm/cuda/slab_registers.h"
#include "gemm/cuda/slab_streamed.h"

namespace nibble::cuda::slab {
namespace {

struct RowParams : MadeParams {
  QuantizeArgs to;
};

template <Element type, int chunks>
struct GivenRow {
  using Parameters = RowParams;
  static constexpr int kChunks = chunks;

  __device__ __forceinline__ void prepare(const RowParams&) {}
  struct Fetched {
    Raw<type> x[kChunks];
  };
  __device__ __forceinline__ Fetched fetch(const RowParams& p, int row, bool inside) const {
    const auto* from = static_cast<const char*>(p.to.x) + row * p.to.x_stride * element_bytes(type);
    Fetched f;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int chunk = i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
      f.x[i] = load_raw<type>(from, chunk, inside && chunk < static_cast<int>(p.to.k / kChunk));
    }
    return f;
  }
  __device__ __forceinline__ void make(const RowParams&, int, float*, const Fetched& fetched,
                                       Chunk (&x)[kChunks]) const {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) x[i] = values_of<type>(fetched.x[i]);
  }
};

using RowKernel = MadeKernel<RowParams>;

template <Element type, int promoted, bool group_scales, SlabForm form, int chunks>
constexpr RowKernel row_kernel() {
  using S = Shape<2, promoted, group_scales>;
  using Activations = MadeSlice<S, GivenRow<type, chunks>>;
  if constexpr (form == SlabForm::streamed) {
    return {promoted, group_scales, false, form, chunks, type, slab_streamed<S, Activations>};
  } else {
    return {promoted, group_scales, false, form, chunks, type, slab_registers<S, Activations>};
  }
}

constexpr auto all_kernels() {
  std::array<RowKernel, 54> kernels{};
  int i = 0;
  const auto add = [&]<Element type, int promoted, bool group_scales>() {
    kernels[i++] = row_kernel<type, promoted, group_scales, SlabForm::registers, 1>();
    kernels[i++] =
        row_kernel<type, promoted, group_scales, SlabForm::registers, kSlabRegistersChunks>();
    kernels[i++] =
        row_kernel<type, promoted, group_scales, SlabForm::streamed, kSlabStreamedChunks>();
  };
  for_all_products<Element::f32, Element::f16, Element::bf16>(add);
  return kernels;
}

}  // namespace
}  // namespace nibble::cuda::slab

namespace nibble::cuda {

cudaError_t launch_w4a8_slab_rows_sm90(const QuantizeArgs& x, const GemmArgs& product,
                                       const SlabConfig& config, cudaStream_t stream) {
  static constexpr auto kKernels = slab::all_kernels();
  static std::array<std::atomic<uint64_t>, kKernels.size()> devices{};
  if (!slab::made_of(x, product, config) || x.x == nullptr || x.m != product.m ||
      x.k != product.layout.k || !vector_rows(x.x, x.x_stride, x.k, x.type)) {
    return cudaErrorInvalidValue;
  }
  for (size_t i = 0; i < kKernels.size(); ++i) {
    const slab::RowKernel& kernel = kKernels[i];
    if (!kernel.fits(product, config, false, x.type)) continue;
    const cudaError_t allowed = slab::allow_shared_memory(kernel.function, devices[i]);
    if (allowed != cudaSuccess) return allowed;
    const slab::RowParams params{slab::make_made_params(product, config), x};
    return slab::launch_blocks(kernel.function, product, config, params.shared.total, stream,
                               params);
  }
  return cudaErrorInvalidValue;
}

}  // namespace nibble::cuda
