// Round-to-nearest 4-bit quantization of one dense matrix, as AutoAWQ's pseudo_quantize_tensor
// does it (quantizer.py: s = (max - min) / 15 clamped to 1e-5, z = clamp(-round(min / s), 0, 15),
// q = clamp(round(w / s) + z, 0, 15), groups along K), except that s is first rounded to the type
// it is stored in, so that q and z fit the stored scale. Symmetric: s = max|w| / 7, z = 8.
// Rounding is half to even.
#pragma once

#include "format/linear_format.h"

namespace nibble {

struct RoundToNearestOptions {
  int64_t group_size = 128;  // 128, 64, 32 or -1 (all of K)
  bool symmetric = false;
  Dtype scale_dtype = Dtype::f16;
};

/// `weight` (N, K) row-major of f32, f16 or bf16. Fails with invalid_argument if N % 8 != 0 or the
/// group size does not divide K, non_finite if a weight is NaN or infinite, each naming `name`.
Result<AwqTensors> quantize_round_to_nearest(const std::string& name, const TensorView& weight,
                                             const RoundToNearestOptions& options);

}  // namespace nibble
