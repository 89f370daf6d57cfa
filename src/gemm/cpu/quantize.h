// The activation quantizers, composed from one instruction set's QuantizerOps: ranges to scales,
// rows to codes in a kernel's layout. Definitions (rounding is half to even everywhere):
//   symmetric   t = amax / Q, a = round(clamp(x * (Q / amax), -Q, Q)), Q = 127 (int8) or 7 (int4)
//   asymmetric  t = hi / 15 - lo / 15 with lo = min(0, x...), hi = max(0, x...),
//               p = clamp(round(-lo / t), 0, 15), a = round(clamp(x * (1 / t), -p, 15 - p)):
//               the stored code already has its zero point p taken off, so it lies in -15..15
//   static      t given, a = round(clamp(x * (1 / t), -Q, Q))
// clip multiplies amax, lo and hi first. A range below kSmallestRange gives zeros (t = 0): its
// reciprocal would overflow.
#pragma once

#include "gemm/cpu/kernel.h"

namespace nibble {

inline constexpr float kSmallestRange = 0x1p-100f;
inline constexpr uint32_t kInfinityBits = 0x7f800000u;

struct Scaling {
  float scale = 0;  // t
  Encoding encoding;
};

inline float symmetric_limit(Mode mode) { return mode == Mode::w4a4 ? 7.0f : 127.0f; }

Scaling dynamic_scaling(const ElementRange& range, const Problem& problem, float clip);
Scaling static_scaling(float scale, const Problem& problem);

/// Where the codes, scale and sums of one row go.
struct RowDestination {
  int8_t* codes = nullptr;   // of group 0
  int64_t group_stride = 0;  // bytes between groups
  int64_t step_stride = 0;   // bytes between runs of 64 codes of one group
  int64_t padded_group = 0;  // codes per group, padding included; the padding gets zeros
  float* scales = nullptr;   // (1) or (groups)
  int32_t* sums = nullptr;   // (groups) or null
};

/// Quantizes row `x` (k elements). `tensor_scaling` is used by Granularity::tensor only.
/// False if the row has a NaN or infinity; the destination is then unspecified.
bool quantize_row(const QuantizerOps& ops, const Problem& problem, const GemmInput& input,
                  const Scaling& tensor_scaling, const void* x, const RowDestination& to);

/// Range of the elements of both.
ElementRange merge_ranges(const ElementRange& a, const ElementRange& b);

}  // namespace nibble
