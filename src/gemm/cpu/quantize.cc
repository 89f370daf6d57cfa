#include "gemm/cpu/quantize.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

namespace nibble {
namespace {

const std::byte* element(const void* x, int64_t index, Dtype dtype) {
  return static_cast<const std::byte*>(x) + index * dtype_bytes(dtype);
}

void clear_padding(const RowDestination& to, int64_t group, int64_t group_size) {
  for (int64_t i = group_size; i < to.padded_group; ++i) {
    to.codes[group * to.group_stride + i / 64 * to.step_stride + i % 64] = 0;
  }
}

}  // namespace

Scaling dynamic_scaling(const ElementRange& range, const Problem& problem, float clip) {
  Scaling s;
  if (problem.symmetric) {
    const float limit = symmetric_limit(problem.mode);
    const float amax = std::bit_cast<float>(range.max_abs_bits) * clip;
    if (amax < kSmallestRange) return s;
    s.scale = amax / limit;
    s.encoding = {limit / amax, -limit, limit};
    return s;
  }
  const float low = range.low * clip, high = range.high * clip;
  const float scale = high / 15.0f - low / 15.0f;
  if (scale < kSmallestRange) return s;
  const float inverse = 1.0f / scale;
  const float zero = std::clamp(std::nearbyint(-low * inverse), 0.0f, 15.0f);
  s.scale = scale;
  s.encoding = {inverse, -zero, 15.0f - zero};
  return s;
}

Scaling static_scaling(float scale, const Problem& problem) {
  const float limit = symmetric_limit(problem.mode);
  return {scale, {1.0f / scale, -limit, limit}};
}

ElementRange merge_ranges(const ElementRange& a, const ElementRange& b) {
  return {std::max(a.max_abs_bits, b.max_abs_bits), std::min(a.low, b.low),
          std::max(a.high, b.high)};
}

bool quantize_row(const QuantizerOps& ops, const Problem& problem, const GemmInput& input,
                  const Scaling& tensor_scaling, const void* x, const RowDestination& to) {
  const int64_t size = problem.group_size, groups = problem.k / size;
  const bool by_group = scales_per_group(problem.granularity);
  Scaling scaling = tensor_scaling;
  Problem wide = problem;  // of a group that keeps 8 bits
  wide.mode = Mode::w4a8;
  wide.symmetric = true;
  if (!by_group) {
    const ElementRange range = ops.range(x, problem.x_dtype, problem.k);
    if (range.max_abs_bits >= kInfinityBits) return false;
    if (problem.granularity == Granularity::token) {
      scaling = dynamic_scaling(range, problem, input.clip);
    } else if (problem.granularity == Granularity::static_tensor) {
      scaling = static_scaling(input.static_scales[0], problem);
    }
    to.scales[0] = scaling.scale;
  }
  for (int64_t g = 0; g < groups; ++g) {
    const void* part = element(x, g * size, problem.x_dtype);
    if (by_group) {
      const ElementRange range = ops.range(part, problem.x_dtype, size);
      if (range.max_abs_bits >= kInfinityBits) return false;
      const bool is_wide = problem.mixed_groups && input.wide_groups[g] != 0;
      scaling = is_wide ? dynamic_scaling(range, wide, 1.0f)
                : problem.granularity == Granularity::group
                    ? dynamic_scaling(range, problem, input.clip)
                    : static_scaling(input.static_scales[g], problem);
      to.scales[g] = scaling.scale;
    }
    const int32_t sum = ops.encode(part, problem.x_dtype, size, scaling.encoding,
                                   to.codes + g * to.group_stride, to.step_stride);
    if (to.sums != nullptr) to.sums[g] = sum;
    clear_padding(to, g, size);
  }
  return true;
}

}  // namespace nibble
