#include "cuda_oracle.h"

#include <fmt/format.h>

#include <cmath>

namespace nibble {

std::string compare_cuda_row(const cuda::Plan& plan, const ref::Weights& weights, const void* x,
                             const void* y, const std::vector<int64_t>& columns, const float* bias,
                             int64_t row) {
  Problem p = plan.problem;
  p.m = 1;
  const ref::Activations a = ref::quantize(p, {.x = x, .x_stride = p.k});
  const std::vector<int32_t> sums = ref::partial_sums(weights, a.codes.data(), 1);
  const bool by_group = scales_per_group(p.granularity);
  // docs/cuda.md: a rounding for each promoted group and each slice, and a few at the end
  const int64_t promoted = plan.padded_k / cuda::promoted_depth(p.group_size);
  const auto steps = static_cast<double>(promoted + plan.padded_k / cuda::kSlabDepth + 4);
  const double last = p.y_dtype == Dtype::f32   ? 0x1p-24
                      : p.y_dtype == Dtype::f16 ? 0x1p-11
                                                : 0x1p-9;
  for (int64_t c = 0; c < weights.n; ++c) {
    const int64_t column = columns.empty() ? c : columns[c];
    double exact = bias != nullptr ? static_cast<double>(bias[column]) : 0.0;
    double magnitude = std::fabs(exact);
    for (int64_t g = 0; g < weights.groups; ++g) {
      const double t = a.scales[by_group ? g : 0];
      const double term = t * sums[g * weights.n + c] * weights.scales[c * weights.groups + g];
      exact += term;
      magnitude += std::fabs(term);
    }
    const double found = load_as_float(y, column, p.y_dtype);
    const double bound = steps * 0x1.01p-24 * magnitude + last * 1.01 * std::fabs(exact) + 0x1p-24;
    if (!(std::fabs(found - exact) <= bound)) {
      return fmt::format("y of row {}, column {} is {}, the oracle says {} within {:.2g}", row,
                         column, found, exact, bound);
    }
  }
  return "";
}

}  // namespace nibble
