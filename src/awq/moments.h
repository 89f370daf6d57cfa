// What the inputs of one group of linears look like: mean |x| of every channel and the second
// moment C = mean of x x^T over the calibration tokens. C is all that the searches need: the
// squared error of a linear whose weights are off by D is sum over rows d of d C d^T, exactly, for
// every D. Not here: where the inputs come from (awq/quantize_model.h).
#pragma once

#include <cstdint>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/status.h"
#include "gemm/float_ops.h"

namespace nibble::awq {

/// A square matrix (size, size) of float, as panels (gemm/float_ops.h): panel p holds columns
/// [64 p, 64 p + 64) as (size, 64); columns beyond the size are 0.
class PanelMatrix {
 public:
  PanelMatrix() = default;
  static Result<PanelMatrix> zeroed(int64_t size);
  static uint64_t bytes_for(int64_t size);

  int64_t size() const { return size_; }
  int64_t panels() const { return (size_ + kPanelColumns - 1) / kPanelColumns; }
  float* panel(int64_t index) { return storage_.as<float>() + index * size_ * kPanelColumns; }
  const float* panel(int64_t index) const {
    return storage_.as<float>() + index * size_ * kPanelColumns;
  }
  float& at(int64_t row, int64_t column) {
    return panel(column / kPanelColumns)[row * kPanelColumns + column % kPanelColumns];
  }
  float at(int64_t row, int64_t column) const {
    return panel(column / kPanelColumns)[row * kPanelColumns + column % kPanelColumns];
  }

 private:
  int64_t size_ = 0;
  AlignedBuffer storage_;
};

struct InputStats {
  std::vector<float> mean_abs;  // (k)
  PanelMatrix moment;           // (k, k), symmetric
  int64_t k() const { return moment.size(); }
};

/// Adds up rows. The result has the same bits however the rows are cut into calls and however many
/// threads run.
class MomentAccumulator {
 public:
  static Result<MomentAccumulator> create(int64_t k);
  static uint64_t bytes_for(int64_t k);

  /// x (rows, k) row-major.
  Status add(const float* x, int64_t rows, int threads);
  /// non_finite if a sum is; the accumulator is used up.
  Result<InputStats> finish(int threads);

 private:
  int64_t rows_ = 0;
  std::vector<double> sum_abs_;
  PanelMatrix moment_;  // only elements (row, column) with row <= column, until finish
};

/// Sum over the rows d of `errors` (rows, k), `stride` apart, of d C d^T, for each row to out
/// (rows). For at most kErrorRows rows; runs on the calling thread.
inline constexpr int64_t kErrorRows = 32;
void quadratic_forms(const PanelMatrix& moment, const float* errors, int64_t rows, int64_t stride,
                     double* out);

}  // namespace nibble::awq
