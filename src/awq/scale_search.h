// AWQ's search: per input channel a factor s that the weights are multiplied with before rounding
// and the activations divided by, so that channels with large activations are rounded more finely.
// Candidates are mean|x|^r / mean|w|^(1-r), as AutoAWQ has them, and no scaling at all; the measure
// is the exact squared error of the linears' outputs (awq/moments.h).
// Not here: where the division of the activations goes (awq/fold.h).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "awq/grid.h"
#include "awq/moments.h"

namespace nibble::awq {

/// One of the linears that share the input. weight (n, k) row-major.
struct SearchLinear {
  const float* weight = nullptr;
  int64_t n = 0;
};

struct ScaleSearchOptions {
  GridOptions grid;
  int ratios = 20;            // steps of r from 0 to 1
  int64_t sample_rows = 256;  // output channels on which candidates are compared; 0: all
  /// Channels whose scales must be equal, one class number for each channel; empty: all free.
  std::span<const int64_t> classes;
  int threads = 1;
};

struct ScaleChoice {
  std::vector<float> scales;  // (k), positive; geometric mean of the extremes is 1
  double ratio = 0;           // r; -1: no scaling was best, all scales are 1
  double error = 0;           // of all rows, with these scales
  double plain_error = 0;     // without scaling; never below `error`
};

ScaleChoice search_scales(std::span<const SearchLinear> linears, const InputStats& stats,
                          const ScaleSearchOptions& options);

/// Sum over all rows of d C d^T, where d is what rounding to nearest does to a row of weights
/// scaled by `scales` (k). Rows `first`, first + step, ... of the linears one after the other.
double rounding_error(std::span<const SearchLinear> linears, const InputStats& stats,
                      std::span<const float> scales, const GridOptions& grid, int64_t first,
                      int64_t step, int threads);

/// Sum over all rows w of w C w^T: what rounding errors are compared with.
double output_energy(const SearchLinear& linear, const InputStats& stats, int threads);

}  // namespace nibble::awq
