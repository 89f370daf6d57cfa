// w4a16_rs_sm90: rs_product.h on f16 or bf16, with float sums. x is first put into the order of
// the products.
#include "gemm/cuda/rs_product.h"

namespace nibble::cuda {
namespace {

template <Element type>
cudaError_t launch(const GemmArgs& args, const void* x, const RsConfig& config, void* scratch,
                   cudaStream_t stream) {
  using Operands = HalfOperands<type>;
  return launch_rs_shape<
      RsShape<Operands, 160, 2, 128, false>, RsShape<Operands, 128, 2, 128, false>,
      RsShape<Operands, 96, 3, 128, false>, RsShape<Operands, 64, 3, 128, false>,
      RsShape<Operands, 64, 2, 128, false>, RsShape<Operands, 64, 1, 128, false>,
      RsShape<Operands, 32, 3, 128, false>, RsShape<Operands, 32, 2, 128, false, 2>,
      RsShape<Operands, 64, 2, 64, false>, RsShape<Operands, 64, 2, 32, false>>(args, x, config,
                                                                                scratch, stream);
}

}  // namespace

cudaError_t launch_w4a16_rs_sm90(const GemmArgs& args, const RsConfig& config, void* scratch,
                                 void* reordered, cudaStream_t stream) {
  const cudaError_t error = launch_reorder(args, reordered, stream);
  if (error != cudaSuccess) return error;
  return args.x_type == Element::f16
             ? launch<Element::f16>(args, reordered, config, scratch, stream)
             : launch<Element::bf16>(args, reordered, config, scratch, stream);
}

}  // namespace nibble::cuda
