// w4a8_ss_sm90, w4a4_ss_sm90 and w4a8_fp8_ss_sm90: ss_product.h on 8-bit operands.
//
// int8: accumulators are int32. e4m3, for w4a4: weights q - z and activations of magnitude up to 8
// are exact in e4m3, and so is their sum over 128 k in the 14 bits that Hopper's fp8 accumulation
// keeps (|S| <= 15 * 8 * 128 < 2^14; not beyond); promotion then needs no conversion. For w4a8-fp8
// the activations are e4m3 bytes, and each product of 32 k loses what lies 13 bits below its
// largest addend.
#include "gemm/cuda/ss_product.h"

namespace nibble::cuda {
namespace {

template <bool kGroupScales>
cudaError_t launch(const GemmArgs& args, const SsConfig& config, void* scratch,
                   cudaStream_t stream) {
  const SsActivations acts = {args.codes, TensorElement::u8, args.layout.padded_k(),
                              args.layout.padded_k()};
  const auto is = [&](bool e4m3, int tokens) {
    return config.e4m3 == e4m3 && config.token_tile == tokens && config.math_groups == 2;
  };
  if (is(false, 192)) {
    return launch_ss_product<SsShape<Int8Products, 192, 2, true, kGroupScales>>(args, acts, config,
                                                                                scratch, stream);
  }
  if (is(true, 192)) {
    return launch_ss_product<SsShape<E4m3Products, 192, 2, false, kGroupScales>>(args, acts, config,
                                                                                 scratch, stream);
  }
  if constexpr (!kGroupScales) {
    if (is(true, 176)) {
      return launch_ss_product<SsShape<E4m3Products, 176, 2, false, false>>(args, acts, config,
                                                                            scratch, stream);
    }
    if (is(true, 128)) {
      return launch_ss_product<SsShape<E4m3Products, 128, 2, false, false>>(args, acts, config,
                                                                            scratch, stream);
    }
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_w4a8_ss_sm90(const GemmArgs& args, const SsConfig& config, void* scratch,
                                cudaStream_t stream) {
  const bool fits = config.image().columns == kKeptImage.columns && args.image != nullptr;
  if (config.expanded && !fits) return cudaErrorInvalidValue;
  const cudaError_t error = launch_expand(args, config, scratch, stream);
  if (error != cudaSuccess) return error;
  return config.group_scales ? launch<true>(args, config, scratch, stream)
                             : launch<false>(args, config, scratch, stream);
}

}  // namespace nibble::cuda
