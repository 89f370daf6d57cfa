// w4a8_fp8_rs_sm90 and w4a4_rs_sm90: rs_product.h on e4m3 numbers, with float sums: promotion needs
// no conversion. Each product of 32 k loses what lies 13 bits below its largest addend: of int4
// codes nothing, see w4a8_ss_sm90.cu.
#include "gemm/cuda/rs_product.h"

namespace nibble::cuda {
namespace {

template <int tokens, int math_groups, int promoted, int resident = 1>
using Shape = RsShape<E4m3Operands, tokens, math_groups, promoted, false, resident>;

}  // namespace

cudaError_t launch_w4a8_fp8_rs_sm90(const GemmArgs& args, const RsConfig& config, void* scratch,
                                    cudaStream_t stream) {
  return launch_rs_shape<Shape<192, 2, 128>, Shape<160, 2, 128>, Shape<128, 2, 128>,
                         Shape<96, 3, 128>, Shape<64, 4, 128>, Shape<64, 3, 128>, Shape<64, 2, 128>,
                         Shape<64, 1, 128>, Shape<32, 3, 128>, Shape<32, 2, 128, 2>,
                         Shape<64, 2, 64>, Shape<64, 2, 32>>(args, args.codes, config, scratch,
                                                             stream);
}

}  // namespace nibble::cuda
