// Products of panels (gemm/float_ops.h) do all the work; only the upper triangle is added up.
#include "awq/moments.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/thread_pool.h"

namespace nibble::awq {
namespace {

constexpr int64_t kBlockRows = 256;  // tokens whose transpose is kept at once

}  // namespace

uint64_t PanelMatrix::bytes_for(int64_t size) {
  const auto padded =
      static_cast<uint64_t>((size + kPanelColumns - 1) / kPanelColumns * kPanelColumns);
  return padded * static_cast<uint64_t>(size) * sizeof(float);
}

Result<PanelMatrix> PanelMatrix::zeroed(int64_t size) {
  Result<AlignedBuffer> storage = AlignedBuffer::zeroed(bytes_for(size));
  if (!storage.ok()) return storage.status();
  PanelMatrix matrix;
  matrix.size_ = size;
  matrix.storage_ = std::move(*storage);
  return matrix;
}

Result<MomentAccumulator> MomentAccumulator::create(int64_t k) {
  Result<PanelMatrix> moment = PanelMatrix::zeroed(k);
  if (!moment.ok()) return moment.status();
  MomentAccumulator accumulator;
  accumulator.sum_abs_.assign(static_cast<size_t>(k), 0.0);
  accumulator.moment_ = std::move(*moment);
  return accumulator;
}

uint64_t MomentAccumulator::bytes_for(int64_t k) {
  const auto padded = static_cast<uint64_t>(k + kPanelColumns);
  return PanelMatrix::bytes_for(k) + 2 * padded * kBlockRows * sizeof(float);
}

Status MomentAccumulator::add(const float* x, int64_t rows, int threads) {
  const int64_t k = moment_.size(), panels = moment_.panels();
  // x of a block of rows, transposed (k, kBlockRows), and as panels (rows, 64).
  Result<AlignedBuffer> left =
      AlignedBuffer::zeroed(static_cast<size_t>(k * kBlockRows) * sizeof(float));
  Result<AlignedBuffer> right = AlignedBuffer::zeroed(
      static_cast<size_t>(panels * kPanelColumns * kBlockRows) * sizeof(float));
  if (!left.ok()) return left.status();
  if (!right.ok()) return right.status();
  float* const transposed = left->as<float>();
  float* const packed = right->as<float>();
  for (int64_t row0 = 0; row0 < rows; row0 += kBlockRows) {
    const int64_t count = std::min(kBlockRows, rows - row0);
    parallel_for(threads, panels, [&](int64_t panel) {
      const int64_t k0 = panel * kPanelColumns, columns = std::min(kPanelColumns, k - k0);
      float* const to = packed + panel * kPanelColumns * kBlockRows;
      for (int64_t row = 0; row < count; ++row) {
        const float* from = x + (row0 + row) * k + k0;
        for (int64_t c = 0; c < columns; ++c) {
          to[row * kPanelColumns + c] = from[c];
          transposed[(k0 + c) * kBlockRows + row] = from[c];
          sum_abs_[static_cast<size_t>(k0 + c)] += std::abs(from[c]);
        }
      }
    });
    parallel_for(threads, panels, [&](int64_t index) {
      const int64_t panel = panels - 1 - index;  // the tallest first
      PanelProduct product;
      product.a = transposed;
      product.a_stride = kBlockRows;
      product.panel = packed + panel * kPanelColumns * kBlockRows;
      product.rows = std::min(k, (panel + 1) * kPanelColumns);
      product.depth = count;
      product.c = moment_.panel(panel);
      product.c_stride = kPanelColumns;
      float_ops().panel_product(product);
    });
  }
  rows_ += rows;
  return {};
}

Result<InputStats> MomentAccumulator::finish(int threads) {
  const int64_t k = moment_.size();
  const auto scale = static_cast<float>(1 / static_cast<double>(std::max<int64_t>(rows_, 1)));
  InputStats stats;
  for (const double sum : sum_abs_) stats.mean_abs.push_back(static_cast<float>(sum * scale));
  parallel_for(threads, moment_.panels(), [&](int64_t panel) {
    const int64_t first = panel * kPanelColumns, last = std::min(k, first + kPanelColumns);
    for (int64_t row = 0; row < last; ++row) {
      for (int64_t column = std::max(first, row); column < last; ++column) {
        moment_.at(row, column) *= scale;
      }
    }
  });
  parallel_for(threads, moment_.panels(), [&](int64_t panel) {  // mirrors; reads row < column only
    const int64_t first = panel * kPanelColumns, last = std::min(k, first + kPanelColumns);
    for (int64_t column = first; column < last; ++column) {
      for (int64_t row = column + 1; row < k; ++row) {
        moment_.at(row, column) = moment_.at(column, row);
      }
    }
  });
  for (int64_t i = 0; i < k; ++i) {  // finite diagonals bound all else
    if (std::isfinite(moment_.at(i, i))) continue;
    return Status(Code::non_finite,
                  fmt::format("NaN or infinity in input channel {} on the calibration text", i));
  }
  stats.moment = std::move(moment_);
  return stats;
}

void quadratic_forms(const PanelMatrix& moment, const float* errors, int64_t rows, int64_t stride,
                     double* out) {
  alignas(64) float products[kErrorRows * kPanelColumns];
  std::fill_n(out, rows, 0.0);
  for (int64_t panel = 0; panel < moment.panels(); ++panel) {
    PanelProduct product;
    product.a = errors;
    product.a_stride = stride;
    product.panel = moment.panel(panel);
    product.rows = rows;
    product.depth = moment.size();
    product.c = products;
    product.c_stride = kPanelColumns;
    product.start_from_zero = true;
    float_ops().panel_product(product);
    const int64_t k0 = panel * kPanelColumns;
    const int64_t columns = std::min(kPanelColumns, moment.size() - k0);
    for (int64_t row = 0; row < rows; ++row) {
      double sum = 0;
      for (int64_t c = 0; c < columns; ++c) {
        sum += double{errors[row * stride + k0 + c]} * products[row * kPanelColumns + c];
      }
      out[row] += sum;
    }
  }
}

}  // namespace nibble::awq
