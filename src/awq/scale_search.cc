// Candidates are compared on a sample of rows; the winner must then beat "no scaling" on all rows.
#include "awq/scale_search.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/thread_pool.h"

namespace nibble::awq {
namespace {

int64_t total_rows(std::span<const SearchLinear> linears) {
  int64_t rows = 0;
  for (const SearchLinear& linear : linears) rows += linear.n;
  return rows;
}

const float* row_of(std::span<const SearchLinear> linears, int64_t row, int64_t k) {
  for (const SearchLinear& linear : linears) {
    if (row < linear.n) return linear.weight + row * k;
    row -= linear.n;
  }
  return nullptr;
}

/// Mean over all rows of |w| / (largest |w| of its group): AutoAWQ's w_mean.
std::vector<double> mean_relative_weight(std::span<const SearchLinear> linears, int64_t k,
                                         int64_t group_size) {
  std::vector<double> sums(static_cast<size_t>(k), 0.0);
  for (const SearchLinear& linear : linears) {
    for (int64_t row = 0; row < linear.n; ++row) {
      const float* weight = linear.weight + row * k;
      for (int64_t k0 = 0; k0 < k; k0 += group_size) {
        float largest = 0;
        for (int64_t i = k0; i < k0 + group_size; ++i) {
          largest = std::max(largest, std::abs(weight[i]));
        }
        const float factor = 1.0f / (largest + 1e-6f);
        for (int64_t i = k0; i < k0 + group_size; ++i) {
          sums[static_cast<size_t>(i)] += std::abs(weight[i]) * factor;
        }
      }
    }
  }
  const auto rows = static_cast<double>(total_rows(linears));
  for (double& sum : sums) sum /= rows;
  return sums;
}

/// Replaces every value by the mean of its class.
void average_classes(std::span<const int64_t> classes, std::vector<double>& values) {
  if (classes.empty()) return;
  const auto count = static_cast<size_t>(*std::max_element(classes.begin(), classes.end()) + 1);
  std::vector<double> sums(count, 0.0), counts(count, 0.0);
  for (size_t i = 0; i < values.size(); ++i) {
    sums[static_cast<size_t>(classes[i])] += values[i];
    counts[static_cast<size_t>(classes[i])] += 1;
  }
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = sums[static_cast<size_t>(classes[i])] / counts[static_cast<size_t>(classes[i])];
  }
}

/// mean|x|^r / mean|w|^(1-r), so that the largest times the smallest is 1.
std::vector<float> candidate(const std::vector<double>& x_mean, const std::vector<double>& w_mean,
                             double ratio) {
  std::vector<double> scales(x_mean.size());
  double low = INFINITY, high = 0;
  for (size_t i = 0; i < scales.size(); ++i) {
    const double scale = std::pow(x_mean[i], ratio) / (std::pow(w_mean[i], 1 - ratio) + 1e-4);
    scales[i] = std::max(scale, 1e-4);
    low = std::min(low, scales[i]);
    high = std::max(high, scales[i]);
  }
  const double middle = std::sqrt(low * high);
  std::vector<float> result(scales.size());
  for (size_t i = 0; i < scales.size(); ++i) {
    const auto scale = static_cast<float>(scales[i] / middle);
    result[i] = std::isfinite(scale) && scale > 0 ? scale : 1.0f;
  }
  return result;
}

}  // namespace

double rounding_error(std::span<const SearchLinear> linears, const InputStats& stats,
                      std::span<const float> scales, const GridOptions& grid, int64_t first,
                      int64_t step, int threads) {
  const int64_t k = stats.k();
  const int64_t rows = (total_rows(linears) - first + step - 1) / step;
  const int64_t blocks = (rows + kErrorRows - 1) / kErrorRows;
  std::vector<double> sums(static_cast<size_t>(blocks), 0.0);
  std::vector<float> inverse(scales.size());
  for (size_t i = 0; i < scales.size(); ++i) inverse[i] = 1.0f / scales[i];
  parallel_for(threads, blocks, [&](int64_t block) {
    const int64_t row0 = block * kErrorRows, count = std::min(kErrorRows, rows - row0);
    std::vector<float> errors(static_cast<size_t>(count * k)), scaled(static_cast<size_t>(k));
    for (int64_t r = 0; r < count; ++r) {
      const float* weight = row_of(linears, first + (row0 + r) * step, k);
      float* const error = errors.data() + r * k;
      for (int64_t i = 0; i < k; ++i) scaled[static_cast<size_t>(i)] = weight[i] * scales[i];
      for (int64_t k0 = 0; k0 < k; k0 += grid.group_size) {
        const float* values = scaled.data() + k0;
        const Grid g = grid_for(range_of(values, grid.group_size), grid);
        for (int64_t i = 0; i < grid.group_size; ++i) {
          error[k0 + i] = (g.rounded(values[i]) - values[i]) * inverse[static_cast<size_t>(k0 + i)];
        }
      }
    }
    double forms[kErrorRows];
    quadratic_forms(stats.moment, errors.data(), count, k, forms);
    for (int64_t r = 0; r < count; ++r) sums[static_cast<size_t>(block)] += forms[r];
  });
  // In order of the blocks: the same for any number of threads.
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

double output_energy(const SearchLinear& linear, const InputStats& stats, int threads) {
  const int64_t k = stats.k(), blocks = (linear.n + kErrorRows - 1) / kErrorRows;
  std::vector<double> sums(static_cast<size_t>(blocks), 0.0);
  parallel_for(threads, blocks, [&](int64_t block) {
    const int64_t row0 = block * kErrorRows, count = std::min(kErrorRows, linear.n - row0);
    double forms[kErrorRows];
    quadratic_forms(stats.moment, linear.weight + row0 * k, count, k, forms);
    for (int64_t r = 0; r < count; ++r) sums[static_cast<size_t>(block)] += forms[r];
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

ScaleChoice search_scales(std::span<const SearchLinear> linears, const InputStats& stats,
                          const ScaleSearchOptions& options) {
  const int64_t k = stats.k(), rows = total_rows(linears);
  const auto error_of = [&](std::span<const float> scales, int64_t first, int64_t step) {
    return rounding_error(linears, stats, scales, options.grid, first, step, options.threads);
  };
  ScaleChoice choice;
  choice.ratio = -1;
  choice.scales.assign(static_cast<size_t>(k), 1.0f);
  choice.plain_error = choice.error = error_of(choice.scales, 0, 1);

  std::vector<double> x_mean(stats.mean_abs.begin(), stats.mean_abs.end());
  std::vector<double> w_mean = mean_relative_weight(linears, k, options.grid.group_size);
  average_classes(options.classes, x_mean);
  average_classes(options.classes, w_mean);
  const int64_t sample = options.sample_rows > 0 ? options.sample_rows : rows;
  const int64_t step = std::max<int64_t>(1, rows / sample), first = (step - 1) / 2;
  double best = error_of(choice.scales, first, step), best_ratio = -1;
  for (int i = 0; i <= options.ratios; ++i) {
    const double ratio = static_cast<double>(i) / options.ratios;
    const double error = error_of(candidate(x_mean, w_mean, ratio), first, step);
    if (error < best) {  // false for NaN
      best = error;
      best_ratio = ratio;
    }
  }
  if (best_ratio < 0) return choice;
  std::vector<float> scales = candidate(x_mean, w_mean, best_ratio);
  const double error = error_of(scales, 0, 1);
  if (!(error < choice.error)) return choice;
  choice.ratio = best_ratio;
  choice.error = error;
  choice.scales = std::move(scales);
  return choice;
}

}  // namespace nibble::awq
