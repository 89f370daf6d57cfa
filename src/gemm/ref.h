// The oracle: slow, obvious, and right by inspection. It reads weights as they lie in the file and
// shares no code with the kernels or their packing; only unpack_codes / zeros / scales are common.
// Ships in the library, because `nibble verify` checks the real kernels against it.
#pragma once

#include <cstdint>
#include <vector>

#include "format/quant_matrix.h"
#include "gemm/gemm.h"

namespace nibble::ref {

/// One weight matrix, unpacked: codes and zeros as bytes, scales as float.
struct Weights {
  int64_t k = 0, n = 0, group_size = 0, groups = 0;
  std::vector<uint8_t> codes;  // (n, k)
  std::vector<uint8_t> zeros;  // (n, groups)
  std::vector<float> scales;   // (n, groups)
};
Weights unpack(const QuantMatrix& matrix);

/// The nearest e4m3 number, half to even; |x| <= 448.
float round_to_e4m3(float x);

struct Activations {
  std::vector<int8_t> codes;  // (m, k), zero points taken off; not of w4a8-fp8
  std::vector<float> scales;  // (m) or (m, groups)
  std::vector<int32_t> sums;  // (m, groups)
  std::vector<float> values = {};  // w4a8-fp8, instead of codes: (m, k), e4m3 numbers
};
/// The quantizer of gemm/cpu/quantize.h by definition. x has no NaN or infinity.
Activations quantize(const Problem& problem, const GemmInput& input);

/// All S, (m, groups, n): sum over the group of (q - z) * a, in int64 and checked to fit int32.
std::vector<int32_t> partial_sums(const Weights& weights, const int8_t* codes, int64_t m);

/// The float epilogue of gemm.h on given partial sums, before rounding to y's type: (m, n).
/// bias: (n) or null.
std::vector<float> epilogue(const Problem& problem, const Weights& weights,
                            const std::vector<int32_t>& partials, const float* scales,
                            const float* bias);

/// w4a16 as gemm.h defines it, before rounding to y's type: (m, n). x (m, k) row-major.
std::vector<float> multiply_w4a16(const Weights& weights, const float* x, int64_t m,
                                  const float* bias);

/// x * W + bias in double from the exact (q - z) * s: (m, n). x (m, k) row-major.
std::vector<double> multiply_fp64(const Weights& weights, const float* x, int64_t m,
                                  const float* bias);

}  // namespace nibble::ref
