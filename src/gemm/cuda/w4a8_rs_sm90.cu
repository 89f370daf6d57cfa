// w4a8_rs_sm90: rs_product.h on int8, with int32 sums.
#include "gemm/cuda/rs_product.h"

namespace nibble::cuda {
namespace {

template <int tokens, int math_groups, int promoted, bool group_scales, int resident = 1>
using Shape = RsShape<Int8Operands, tokens, math_groups, promoted, group_scales, resident>;

}  // namespace

// What fits the registers: short groups want more scales.
cudaError_t launch_w4a8_rs_sm90(const GemmArgs& args, const RsConfig& config, void* scratch,
                                cudaStream_t stream) {
  return launch_rs_shape<
      Shape<160, 2, 128, false>, Shape<128, 2, 128, false>, Shape<96, 3, 128, false>,
      Shape<64, 4, 128, false>, Shape<64, 3, 128, false>, Shape<64, 2, 128, false>,
      Shape<64, 1, 128, false>, Shape<32, 3, 128, false>, Shape<32, 2, 128, false, 2>,
      Shape<96, 3, 128, true>, Shape<64, 3, 128, true>, Shape<64, 2, 128, true>,
      Shape<32, 3, 128, true>, Shape<32, 2, 128, true, 2>, Shape<64, 2, 64, false>,
      Shape<64, 2, 32, false>>(args, args.codes, config, scratch, stream);
}

}  // namespace nibble::cuda
