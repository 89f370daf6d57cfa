// The best range of a group: a few extreme weights may be cut so that all others are rounded more
// finely. The measure is the group's own contribution to the squared error of the output.
#include <algorithm>
#include <cmath>

#include "awq/rounding.h"

namespace nibble::awq {
namespace {

// Shares of the range that are tried, for both ends alike and then each end by itself.
constexpr float kStep = 0.05f;
constexpr int kSteps = 8;     // down to 0.6 of the range
constexpr int kEndSteps = 2;  // either end one or two steps away from the best of those

}  // namespace

void search_ranges(const PanelMatrix& group_moment, const float* weights, int64_t rows,
                   int64_t stride, const GridOptions& options, Range* out) {
  const int64_t size = group_moment.size();
  std::vector<Range> full(static_cast<size_t>(rows));
  std::vector<std::pair<int, int>> best(static_cast<size_t>(rows), {0, 0});
  std::vector<double> least(static_cast<size_t>(rows), 0.0);
  for (int64_t r = 0; r < rows; ++r) full[size_t(r)] = range_of(weights + r * stride, size);
  const auto cut = [&](int64_t r, std::pair<int, int> steps) {
    const Range range = full[static_cast<size_t>(r)];
    return Range{range.low * (1 - kStep * static_cast<float>(steps.first)),
                 range.high * (1 - kStep * static_cast<float>(steps.second))};
  };

  std::vector<float> errors(static_cast<size_t>(kErrorRows * size));
  // Tries `steps_of(row)` for every row.
  const auto attempt = [&](auto steps_of, bool first) {
    for (int64_t row0 = 0; row0 < rows; row0 += kErrorRows) {
      const int64_t count = std::min(kErrorRows, rows - row0);
      for (int64_t r = 0; r < count; ++r) {
        const Grid grid = grid_for(cut(row0 + r, steps_of(row0 + r)), options);
        const float* weight = weights + (row0 + r) * stride;
        float* const error = errors.data() + r * size;
        for (int64_t i = 0; i < size; ++i) error[i] = grid.rounded(weight[i]) - weight[i];
      }
      double forms[kErrorRows];
      quadratic_forms(group_moment, errors.data(), count, size, forms);
      for (int64_t r = 0; r < count; ++r) {
        const auto at = static_cast<size_t>(row0 + r);
        if (!first && !(forms[r] < least[at])) continue;  // also for NaN
        least[at] = forms[r];
        best[at] = steps_of(row0 + r);
      }
    }
  };
  attempt([](int64_t) { return std::pair(0, 0); }, true);
  for (int step = 1; step <= kSteps; ++step) {
    attempt([&](int64_t) { return std::pair(step, step); }, false);
  }
  if (!options.symmetric) {
    const auto center = best;
    for (int low = -kEndSteps; low <= kEndSteps; ++low) {
      for (int high = -kEndSteps; high <= kEndSteps; ++high) {
        if (low == high) continue;
        attempt(
            [&](int64_t r) {
              const auto [a, b] = center[static_cast<size_t>(r)];
              return std::pair(std::max(a + low, -1), std::max(b + high, -1));
            },
            false);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) out[r] = cut(r, best[static_cast<size_t>(r)]);
}

}  // namespace nibble::awq
