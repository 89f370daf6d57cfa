// The 4-bit grid of one group of one output channel: its scale, as stored, and zero point; and
// choosing it from the group's range. The formulas are those of format/round_to_nearest.h.
// Not here: which range is best (awq/clip_search.h), rounding a matrix (awq/rounding.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "base/dtype.h"

namespace nibble::awq {

/// How codes are stored: the choices of the user that every search must respect.
struct GridOptions {
  int64_t group_size = 128;  // 1..K
  bool symmetric = false;    // zero point 8, not one a group
  Dtype scale_dtype = Dtype::f16;
};

struct Grid {
  float scale = 1;  // exactly representable in scale_dtype
  float zero = 0;   // an integer, 0..15

  float code(float value) const {
    return std::clamp(round_even(std::clamp(value / scale, -64.0f, 64.0f)) + zero, 0.0f, 15.0f);
  }
  float value(float code) const { return (code - zero) * scale; }
  float rounded(float x) const { return value(code(x)); }

  /// Half to even for |x| < 2^22.
  static float round_even(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }
};

struct Range {
  float low = 0, high = 0;
};

inline Range range_of(const float* values, int64_t count) {
  Range range{values[0], values[0]};
  for (int64_t i = 1; i < count; ++i) {
    range.low = std::min(range.low, values[i]);
    range.high = std::max(range.high, values[i]);
  }
  return range;
}

/// The grid that spans `range`. The scale is not finite if scale_dtype cannot hold it.
inline Grid grid_for(Range range, const GridOptions& options) {
  constexpr float kSmallestRange = 1e-5f;  // AutoAWQ's clamp; keeps the scale from rounding to 0
  const float extent = options.symmetric ? std::max(std::abs(range.low), std::abs(range.high))
                                         : range.high - range.low;
  const float exact = std::max(extent, kSmallestRange) / (options.symmetric ? 7.0f : 15.0f);
  Grid grid;
  grid.scale = options.scale_dtype == Dtype::bf16 ? float_from_bf16(bf16_from_float(exact))
                                                  : float_from_f16(f16_from_float(exact));
  grid.zero = 8;
  if (!options.symmetric) {
    const float low = std::clamp(range.low / grid.scale, -64.0f, 64.0f);
    grid.zero = std::clamp(-Grid::round_even(low), 0.0f, 15.0f);
  }
  return grid;
}

}  // namespace nibble::awq
