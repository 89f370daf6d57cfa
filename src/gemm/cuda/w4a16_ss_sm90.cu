// w4a16_ss_sm90: ss_product.h on f16 or bf16, x where it is and weights q - z, which are exact in
// either. Float sums of 128 k by tensor cores, as in w4a16_rs_sm90.cu.
#include "gemm/cuda/ss_product.h"

namespace nibble::cuda {
namespace {

template <Element type>
cudaError_t launch(const GemmArgs& args, const SsConfig& config, void* scratch,
                   cudaStream_t stream) {
  const SsActivations acts = {args.x,
                              type == Element::f16 ? TensorElement::f16 : TensorElement::bf16,
                              args.x_columns, args.x_stride};
  return launch_ss_product<SsShape<HalfProducts<type>, 128, 3, false, false>>(args, acts, config,
                                                                              scratch, stream);
}

}  // namespace

cudaError_t launch_w4a16_ss_sm90(const GemmArgs& args, const SsConfig& config, void* scratch,
                                 cudaStream_t stream) {
  if (!config.halves || config.token_tile != 128 || config.math_groups != 3) {
    return cudaErrorInvalidValue;
  }
  const cudaError_t error = launch_expand(args, config, scratch, stream);
  if (error != cudaSuccess) return error;
  return args.x_type == Element::f16 ? launch<Element::f16>(args, config, scratch, stream)
                                     : launch<Element::bf16>(args, config, scratch, stream);
}

}  // namespace nibble::cuda
