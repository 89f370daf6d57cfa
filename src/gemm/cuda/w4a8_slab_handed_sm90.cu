// M <= 16, one launch: rows of x of 16 bits, which the first blocks quantize for all, times packed
// weights, by slab_registers.h or slab_streamed.h. The bits are those of quantize.cu and the
// separate product.
#include "gemm/cuda/fused_product.h"
#include "gemm/cuda/quantize_rows.h"
#include "gemm/cuda/slab_handed.h"
#include "gemm/cuda/slab_registers.h"
#include "gemm/cuda/slab_streamed.h"

namespace nibble::cuda::slab {
namespace {

struct HandedKernel {
  int columns, promoted;
  bool group_scales;
  SlabForm form;
  void (*function)(HandedParams);

  bool fits(const GemmArgs& args, const SlabConfig& config) const {
    return columns == slab_token_columns(args.m) && promoted == args.layout.promoted &&
           group_scales == args.group_scales && form == config.form;
  }
};

constexpr auto all_kernels() {
  std::array<HandedKernel, 36> kernels{};
  int i = 0;
  const auto add = [&]<int columns, int promoted, bool group_scales>() {
    using S = Shape<columns, promoted, group_scales>;
    kernels[i++] = {columns, promoted, group_scales, SlabForm::registers,
                    slab_registers<S, HandedSlice<S>>};
    kernels[i++] = {columns, promoted, group_scales, SlabForm::streamed,
                    slab_streamed<S, HandedSlice<S>>};
  };
  const auto add_depth = [&]<int columns, int promoted>() {
    add.template operator()<columns, promoted, false>();
    add.template operator()<columns, promoted, true>();
  };
  const auto add_columns = [&]<int columns>() {
    add_depth.template operator()<columns, 128>();
    add_depth.template operator()<columns, 64>();
    add_depth.template operator()<columns, 32>();
  };
  add_columns.template operator()<2>();
  add_columns.template operator()<8>();
  add_columns.template operator()<16>();
  return kernels;
}

/// Of x: everything that a kernel takes for granted.
bool taken(const QuantizeArgs& x, const GemmArgs& product, const SlabConfig& config) {
  const PackedLayout& w = product.layout;
  const bool by_group = x.scaling == Scaling::group || x.scaling == Scaling::static_group;
  return config.handed && product.m >= 1 && product.m <= kSlabTokens && x.m == product.m &&
         x.k == w.k && x.padded_k == w.padded_k() && x.symmetric && x.kind == cuda::Codes::int8 &&
         !x.wgmma_order && x.scaling != Scaling::tensor && by_group == product.group_scales &&
         (!by_group || w.group_size == w.promoted) && x.type != Element::f32 && x.x != nullptr &&
         x.codes != nullptr && x.scales != nullptr && x.codes == product.codes &&
         x.scales == product.scales && vector_rows(x.x, x.x_stride, x.k, x.type) &&
         (config.form == SlabForm::streamed || config.k_warps >= w.slices);
}

}  // namespace
}  // namespace nibble::cuda::slab

namespace nibble::cuda {

cudaError_t launch_w4a8_slab_handed_sm90(const QuantizeArgs& x, const GemmArgs& product,
                                         const SlabConfig& config, void* scratch,
                                         cudaStream_t stream) {
  static constexpr auto kKernels = slab::all_kernels();
  static std::array<std::atomic<uint64_t>, kKernels.size()> devices{};
  if (!slab::taken(x, product, config) || scratch == nullptr) return cudaErrorInvalidValue;
  for (size_t i = 0; i < kKernels.size(); ++i) {
    const slab::HandedKernel& kernel = kKernels[i];
    if (!kernel.fits(product, config)) continue;
    const cudaError_t allowed = slab::allow_shared_memory(kernel.function, devices[i]);
    if (allowed != cudaSuccess) return allowed;
    slab::HandedParams params;
    static_cast<slab::Params&>(params) = slab::make_params(product, config);
    params.to = x;
    params.counter = static_cast<uint32_t*>(scratch);
    return slab::launch_blocks(kernel.function, product, config, params.shared.total, stream,
                               params);
  }
  return cudaErrorInvalidValue;
}

}  // namespace nibble::cuda
