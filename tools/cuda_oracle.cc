#include "cuda_oracle.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "gemm/cuda/plan.h"

namespace nibble {

namespace {

/// What y of one column should be, and the sum of magnitudes that its error is relative to.
struct Exact {
  double value = 0, magnitude = 0;
};

/// Groups are cut into what is promoted at once: their parts may cancel.
Exact from_codes(const ref::Weights& w, int64_t c, const ref::Activations& a, bool by_group,
                 int64_t depth) {
  Exact y;
  for (int64_t k = 0; k < w.k; k += depth) {
    const int64_t g = k / w.group_size, end = std::min(k + depth, w.k);
    const int zero = w.zeros[c * w.groups + g];
    int64_t sum = 0;
    for (int64_t i = k; i < end; ++i) sum += (w.codes[c * w.k + i] - zero) * a.codes[i];
    const double t = a.scales[by_group ? g : 0];
    const double term = t * static_cast<double>(sum) * w.scales[c * w.groups + g];
    y.value += term;
    y.magnitude += std::fabs(term);
  }
  return y;
}

Exact from_floats(const ref::Weights& w, int64_t c, const void* x, Dtype dtype) {
  Exact y;
  for (int64_t k = 0; k < w.k; ++k) {
    const int64_t g = c * w.groups + k / w.group_size;
    const double term = static_cast<double>(load_as_float(x, k, dtype)) *
                        (w.codes[c * w.k + k] - w.zeros[g]) * w.scales[g];
    y.value += term;
    y.magnitude += std::fabs(term);
  }
  return y;
}

}  // namespace

std::string compare_cuda_row(const cuda::Plan& plan, const ref::Weights& weights, const void* x,
                             const void* y, const std::vector<int64_t>& columns, const float* bias,
                             int64_t row) {
  Problem p = plan.problem;
  p.m = 1;
  const bool floats = p.mode == Mode::w4a16;
  const ref::Activations a =
      floats ? ref::Activations{} : ref::quantize(p, {.x = x, .x_stride = p.k});
  // docs/cuda.md: a rounding for each promoted group and each slice, and a few at the end
  const int64_t depth = cuda::promoted_depth(p.group_size);
  const int64_t promoted = plan.padded_k / depth;
  const bool is_ss = plan.family == cuda::KernelFamily::ss;
  const int64_t slice = is_ss ? cuda::kBlockDepth : cuda::kSlabDepth;  // the least depth of a part
  const int64_t steps =
      promoted + plan.padded_k / slice + 4 + (floats ? cuda::kHalfSumRoundings : 0);
  const double last = p.y_dtype == Dtype::f32   ? 0x1p-24
                      : p.y_dtype == Dtype::f16 ? 0x1p-11
                                                : 0x1p-8;
  for (int64_t c = 0; c < weights.n; ++c) {
    const int64_t column = columns.empty() ? c : columns[c];
    Exact exact = floats ? from_floats(weights, c, x, p.x_dtype)
                         : from_codes(weights, c, a, scales_per_group(p.granularity), depth);
    if (bias != nullptr) {
      exact.value += bias[column];
      exact.magnitude += std::fabs(bias[column]);
    }
    const double found = load_as_float(y, column, p.y_dtype);
    const double bound = static_cast<double>(steps) * 0x1.01p-24 * exact.magnitude +
                         last * 1.01 * std::fabs(exact.value) + 0x1p-24;
    if (!(std::fabs(found - exact.value) <= bound)) {
      return fmt::format("y of row {}, column {} is {}, the oracle says {} within {:.2g}", row,
                         column, found, exact.value, bound);
    }
  }
  return "";
}

}  // namespace nibble
