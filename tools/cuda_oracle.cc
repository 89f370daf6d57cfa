#include "cuda_oracle.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace nibble {

std::string compare_cuda_row(const cuda::Plan& plan, const ref::Weights& weights, const void* x,
                             const void* y, const std::vector<int64_t>& columns, const float* bias,
                             int64_t row) {
  Problem p = plan.problem;
  p.m = 1;
  const ref::Activations a = ref::quantize(p, {.x = x, .x_stride = p.k});
  const bool by_group = scales_per_group(p.granularity);
  // docs/cuda.md: a rounding for each promoted group and each slice, and a few at the end
  const int64_t depth = cuda::promoted_depth(p.group_size);
  const int64_t promoted = plan.padded_k / depth;
  const bool is_ss = plan.family == cuda::KernelFamily::ss;
  const int64_t slice = is_ss ? cuda::kBlockDepth : cuda::kSlabDepth;  // the least depth of a part
  const auto steps = static_cast<double>(promoted + plan.padded_k / slice + 4);
  const double last = p.y_dtype == Dtype::f32   ? 0x1p-24
                      : p.y_dtype == Dtype::f16 ? 0x1p-11
                                                : 0x1p-8;
  for (int64_t c = 0; c < weights.n; ++c) {
    const int64_t column = columns.empty() ? c : columns[c];
    double exact = bias != nullptr ? static_cast<double>(bias[column]) : 0.0;
    double magnitude = std::fabs(exact);
    for (int64_t k = 0; k < weights.k; k += depth) {  // a group's parts may cancel
      const int64_t g = k / weights.group_size, end = std::min(k + depth, weights.k);
      const int zero = weights.zeros[c * weights.groups + g];
      int64_t sum = 0;
      for (int64_t i = k; i < end; ++i) {
        sum += (weights.codes[c * weights.k + i] - zero) * a.codes[i];
      }
      const double t = a.scales[by_group ? g : 0];
      const double term = t * static_cast<double>(sum) * weights.scales[c * weights.groups + g];
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
