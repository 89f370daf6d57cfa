// A Cholesky factorization from the last column to the first, C = R R^T with R upper triangular,
// one panel of 64 columns at a time; F is R with its columns divided by the diagonal.
#include "awq/feedback.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/thread_pool.h"

namespace nibble::awq {
namespace {

constexpr int64_t kTaskRows = 64;

/// The diagonal block of panel `index`, columns [k0, k0 + columns): R of it in place. False if a
/// pivot is not positive.
bool factor_block(float* block, int64_t columns) {
  for (int64_t j = columns - 1; j >= 0; --j) {
    double pivot = block[j * kPanelColumns + j];
    for (int64_t l = j + 1; l < columns; ++l) {
      pivot -= double{block[j * kPanelColumns + l]} * block[j * kPanelColumns + l];
    }
    if (!(pivot > 0)) return false;
    const double diagonal = std::sqrt(pivot);
    block[j * kPanelColumns + j] = static_cast<float>(diagonal);
    for (int64_t i = 0; i < j; ++i) {
      double sum = block[i * kPanelColumns + j];
      for (int64_t l = j + 1; l < columns; ++l) {
        sum -= double{block[i * kPanelColumns + l]} * block[j * kPanelColumns + l];
      }
      block[i * kPanelColumns + j] = static_cast<float>(sum / diagonal);
    }
  }
  return true;
}

/// Rows above the diagonal block: solves x B^T = row in place, B the factored block.
void solve_row(const float* block, int64_t columns, float* row) {
  for (int64_t j = columns - 1; j >= 0; --j) {
    float sum = row[j];
    for (int64_t l = j + 1; l < columns; ++l) sum -= row[l] * block[j * kPanelColumns + l];
    row[j] = sum / block[j * kPanelColumns + j];
  }
}

/// R of `matrix` in place, upper triangle. False if it is not positive definite.
bool factor(PanelMatrix& matrix, int threads) {
  const int64_t k = matrix.size();
  // The part of a panel's rows that lies right of it, transposed: (columns to the right, 64).
  std::vector<float> storage(static_cast<size_t>(k * kPanelColumns) + 16);
  float* right = storage.data();
  while (reinterpret_cast<uintptr_t>(right) % kCacheLineBytes != 0) ++right;
  for (int64_t index = matrix.panels() - 1; index >= 0; --index) {
    const int64_t k0 = index * kPanelColumns, columns = std::min(kPanelColumns, k - k0);
    const int64_t next = k0 + columns;
    for (int64_t l = next; l < k; ++l) {
      for (int64_t c = 0; c < kPanelColumns; ++c) {
        right[(l - next) * kPanelColumns + c] = c < columns ? -matrix.at(k0 + c, l) : 0.0f;
      }
    }
    float* const panel = matrix.panel(index);
    const int64_t tasks = (next + kTaskRows - 1) / kTaskRows;
    parallel_for(threads, tasks, [&](int64_t task) {
      const int64_t row0 = task * kTaskRows;
      PanelProduct product;
      product.rows = std::min(kTaskRows, next - row0);
      product.c = panel + row0 * kPanelColumns;
      product.c_stride = kPanelColumns;
      for (int64_t from = index + 1; from < matrix.panels(); ++from) {
        product.a = matrix.panel(from) + row0 * kPanelColumns;
        product.a_stride = kPanelColumns;
        product.depth = std::min(kPanelColumns, k - from * kPanelColumns);
        product.panel = right + (from * kPanelColumns - next) * kPanelColumns;
        float_ops().panel_product(product);
      }
    });
    float* const block = panel + k0 * kPanelColumns;
    if (!factor_block(block, columns)) return false;
    parallel_for(threads, (k0 + kTaskRows - 1) / kTaskRows, [&](int64_t task) {
      const int64_t last = std::min(k0, (task + 1) * kTaskRows);
      for (int64_t row = task * kTaskRows; row < last; ++row) {
        solve_row(block, columns, panel + row * kPanelColumns);
      }
    });
  }
  return true;
}

}  // namespace

Result<PanelMatrix> feedback_matrix(const PanelMatrix& moment, double damping, int threads) {
  const int64_t k = moment.size();
  double trace = 0;
  for (int64_t i = 0; i < k; ++i) trace += moment.at(i, i);
  for (double share = damping;; share *= 10) {
    Result<PanelMatrix> matrix = PanelMatrix::zeroed(k);
    if (!matrix.ok()) return matrix.status();
    // A slot without any input at all still needs a positive diagonal.
    const double added = std::max(share * trace / static_cast<double>(k), 1e-30);
    parallel_for(threads, moment.panels(), [&](int64_t panel) {
      std::copy_n(moment.panel(panel), k * kPanelColumns, matrix->panel(panel));
    });
    for (int64_t i = 0; i < k; ++i) {
      matrix->at(i, i) = static_cast<float>(double{matrix->at(i, i)} + added);
    }
    if (!factor(*matrix, threads)) continue;
    parallel_for(threads, matrix->panels(), [&](int64_t panel) {
      const int64_t k0 = panel * kPanelColumns, columns = std::min(kPanelColumns, k - k0);
      for (int64_t column = k0; column < k0 + columns; ++column) {
        const float inverse = 1.0f / matrix->at(column, column);
        for (int64_t row = 0; row < column; ++row) matrix->at(row, column) *= inverse;
        for (int64_t row = column; row < k0 + columns; ++row) matrix->at(row, column) = 0;
      }
    });
    return matrix;
  }
}

}  // namespace nibble::awq
