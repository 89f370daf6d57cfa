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

/// y from x as it is multiplied, (k), times t.
Exact from_floats(const ref::Weights& w, int64_t c, const std::vector<float>& x, double t) {
  Exact y;
  for (int64_t k = 0; k < w.k; ++k) {
    const int64_t g = c * w.groups + k / w.group_size;
    const double term =
        t * x[k] * (w.codes[c * w.k + k] - w.zeros[g]) * static_cast<double>(w.scales[g]);
    y.value += term;
    y.magnitude += std::fabs(term);
  }
  return y;
}

/// What fp8 products may lose: of each 32 k, 13 bits below the largest addend, the running sum
/// included, for each of the 33 addends. Sums are promoted every group of at most 128 k.
double fp8_error(const ref::Weights& w, int64_t c, const std::vector<float>& x, double t) {
  double error = 0, sum = 0;
  for (int64_t k = 0; k < w.k; k += 32) {
    if (k % cuda::promoted_depth(w.group_size) == 0) sum = 0;
    const int64_t g = c * w.groups + k / w.group_size;
    double largest = std::fabs(sum);
    for (int64_t i = k; i < std::min(k + 32, w.k); ++i) {
      const double term = static_cast<double>(x[i]) * (w.codes[c * w.k + i] - w.zeros[g]);
      sum += term;
      largest = std::max(largest, std::fabs(term));
    }
    error += 33 * 0x1p-13 * largest * t * std::fabs(static_cast<double>(w.scales[g]));
  }
  return error;
}

/// x (k) as floats, or what quantizing it makes of it.
std::vector<float> multiplied_floats(const Problem& p, const void* x, const ref::Activations& a) {
  if (p.mode == Mode::w4a8_fp8) return a.values;
  std::vector<float> values;
  for (int64_t k = 0; k < p.k; ++k) values.push_back(load_as_float(x, k, p.x_dtype));
  return values;
}

}  // namespace

std::string compare_cuda_row(const cuda::Plan& plan, const ref::Weights& weights, const void* x,
                             const void* y, const std::vector<int64_t>& columns, const float* bias,
                             int64_t row) {
  Problem p = plan.problem;
  p.m = 1;
  const bool floats = p.mode == Mode::w4a16 || p.mode == Mode::w4a8_fp8;
  ref::Activations a;
  if (p.mode == Mode::w4a16) {
    a.scales = {1.0f};
  } else {
    a = ref::quantize(p, {.x = x, .x_stride = p.k});
  }
  const std::vector<float> values = floats ? multiplied_floats(p, x, a) : std::vector<float>{};
  // docs/cuda.md: a rounding for each promoted group and each slice, and a few at the end
  const int64_t depth = cuda::promoted_depth(p.group_size);
  const int64_t promoted = plan.padded_k / depth;
  const bool is_ss = plan.family == cuda::KernelFamily::ss;
  const int64_t slice = is_ss ? cuda::kBlockDepth : cuda::kSlabDepth;  // the least depth of a part
  const bool halves = cuda::multiplies_halves(plan);
  const int64_t steps =
      promoted + plan.padded_k / slice + 4 + (halves ? cuda::kHalfSumRoundings : 0);
  const double last = p.y_dtype == Dtype::f32   ? 0x1p-24
                      : p.y_dtype == Dtype::f16 ? 0x1p-11
                                                : 0x1p-8;
  for (int64_t c = 0; c < weights.n; ++c) {
    const int64_t column = columns.empty() ? c : columns[c];
    Exact exact = floats ? from_floats(weights, c, values, a.scales[0])
                         : from_codes(weights, c, a, scales_per_group(p.granularity), depth);
    if (bias != nullptr) {
      exact.value += bias[column];
      exact.magnitude += std::fabs(bias[column]);
    }
    const double found = load_as_float(y, column, p.y_dtype);
    const double fp8 = floats && !halves ? fp8_error(weights, c, values, a.scales[0]) : 0.0;
    const double bound = static_cast<double>(steps) * 0x1.01p-24 * exact.magnitude + 1.01 * fp8 +
                         last * 1.01 * std::fabs(exact.value) + 0x1p-24;
    if (!(std::fabs(found - exact.value) <= bound)) {
      return fmt::format("y of row {}, column {} is {}, the oracle says {} within {:.2g}", row,
                         column, found, exact.value, bound);
    }
  }
  return "";
}

}  // namespace nibble
