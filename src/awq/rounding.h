// From float weights to 4-bit codes under a second moment: the range of every group by search, and
// rounding to nearest or with error feedback. The result is an ordinary AWQ layer either way.
// Not here: scales (awq/scale_search.h); plain round-to-nearest without any input statistics
// (format/round_to_nearest.h).
#pragma once

#include <string>
#include <vector>

#include "awq/grid.h"
#include "awq/moments.h"
#include "format/quant_matrix.h"

namespace nibble::awq {

enum class Rounding : int { nearest = 0, compensated = 1 };

struct RoundingOptions {
  GridOptions grid;
  bool clip = true;  // search the range of each group; otherwise from its smallest to its largest
  Rounding rounding = Rounding::compensated;
  int threads = 1;
};

/// What rounding needs to know about the inputs of a linear, made once for all that share them.
class RoundingContext {
 public:
  /// `moment` (k, k) of the inputs as the rounded weights meet them; it must outlive the context.
  static Result<RoundingContext> create(const PanelMatrix& moment, const RoundingOptions& options);
  /// Bytes it takes at most.
  static uint64_t bytes_for(int64_t k, const RoundingOptions& options);

  const PanelMatrix& moment() const { return *moment_; }
  const PanelMatrix* feedback() const { return feedback_.size() > 0 ? &feedback_ : nullptr; }
  const PanelMatrix& group_moment(int64_t group) const {
    return whole_ ? *moment_ : group_moments_[static_cast<size_t>(group)];
  }
  const RoundingOptions& options() const { return options_; }

 private:
  RoundingOptions options_;
  const PanelMatrix* moment_ = nullptr;
  bool whole_ = false;  // one group: its moment is the whole one
  std::vector<PanelMatrix> group_moments_;
  PanelMatrix feedback_;
};

struct RoundedLinear {
  AwqTensors tensors;
  double signal = 0, noise = 0;  // mean squared output, and what of it is error
};

/// weight (n, k) row-major. Fails with non_finite, or invalid_argument if a scale is beyond the
/// range of its type, naming `name` and the place.
Result<RoundedLinear> round_linear(const std::string& name, const float* weight, int64_t n,
                                   const RoundingContext& context);

/// The ranges of one group for `rows` rows of weights, `stride` apart: of all ranges that are
/// tried, the full one among them, the one with the least error under the group's own moment (g,
/// g).
void search_ranges(const PanelMatrix& group_moment, const float* weights, int64_t rows,
                   int64_t stride, const GridOptions& options, Range* out);

}  // namespace nibble::awq
