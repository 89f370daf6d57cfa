#include "oracle_check.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

namespace nibble {
namespace {

std::vector<float> row_as_float(const FinishedRun& run, int64_t row) {
  const Problem& p = run.problem;
  std::vector<float> x(static_cast<size_t>(p.k));
  for (int64_t i = 0; i < p.k; ++i) {
    x[i] = load_as_float(run.input.x, row * run.input.x_stride + i, p.x_dtype);
  }
  return x;
}

std::string compare_outputs(const FinishedRun& run, int64_t row,
                            const std::vector<float>& expected) {
  const int64_t n = run.problem.n;
  for (int64_t i = 0; i < n; ++i) {
    const float found = run.y[row * n + i];
    if (std::memcmp(&found, &expected[i], sizeof found) == 0) continue;
    return fmt::format("y of row {}, column {} is {}, the oracle says {}", row, i, found,
                       expected[i]);
  }
  return "";
}

}  // namespace

std::string first_difference(const FinishedRun& run, const ref::Weights& weights, const float* bias,
                             int64_t num_rows) {
  const Problem& p = run.problem;
  const int64_t count = std::min(num_rows, p.m);
  const bool quantized = p.mode != Mode::w4a16;
  const ref::Activations a = quantized ? ref::quantize(p, run.input) : ref::Activations{};
  const int64_t scales_per_row = scales_per_group(p.granularity) ? weights.groups : 1;
  Problem one_row = p;
  one_row.m = 1;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = count == 1 ? 0 : i * (p.m - 1) / (count - 1);
    std::vector<float> expected;
    if (quantized) {
      const std::vector<int32_t> sums = ref::partial_sums(weights, &a.codes[row * p.k], 1);
      const auto size = static_cast<int64_t>(sums.size());
      const int32_t* found = run.partials == nullptr ? nullptr : run.partials + row * size;
      if (found != nullptr && !std::equal(sums.begin(), sums.end(), found)) {
        const auto at = std::mismatch(sums.begin(), sums.end(), found).first - sums.begin();
        return fmt::format("S of row {}, group {}, column {} is {}, the oracle says {}", row,
                           at / p.n, at % p.n, found[at], sums[at]);
      }
      expected = ref::epilogue(one_row, weights, sums, &a.scales[row * scales_per_row], bias);
    } else {
      expected = ref::multiply_w4a16(weights, row_as_float(run, row).data(), 1, bias);
    }
    if (std::string text = compare_outputs(run, row, expected); !text.empty()) return text;
  }
  return "";
}

}  // namespace nibble
