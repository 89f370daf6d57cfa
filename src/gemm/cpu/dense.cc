#include "gemm/dense.h"

#include <algorithm>
#include <cstring>

#include "base/cpu_features.h"
#include "base/thread_pool.h"

namespace nibble {
namespace {

// Rows of x that meet one panel before the next panel: x stays in L2 beside it.
constexpr int64_t kBlockRows = 96;

/// Row-major (64 rows of W at n0, k) -> panel (k, 64), in squares that stay in L1.
template <class Element>
void transpose_panel(const std::byte* weight, int64_t n0, int64_t columns, int64_t k, Element* to) {
  constexpr int64_t kSquare = 64;
  for (int64_t k0 = 0; k0 < k; k0 += kSquare) {
    const int64_t k1 = std::min(k, k0 + kSquare);
    for (int64_t c = 0; c < columns; ++c) {
      const std::byte* row = weight + (n0 + c) * k * static_cast<int64_t>(sizeof(Element));
      for (int64_t i = k0; i < k1; ++i) {
        std::memcpy(&to[i * kPanelColumns + c], row + i * static_cast<int64_t>(sizeof(Element)),
                    sizeof(Element));
      }
    }
  }
}

/// The columns of the last panel that exist, through a buffer that has room for all 64.
void partial_panel(PanelProduct product, int64_t columns, float* y, int64_t y_stride) {
  alignas(64) float buffer[kBlockRows * kPanelColumns];
  product.c = buffer;
  product.c_stride = kPanelColumns;
  float_ops().panel_product(product);
  for (int64_t row = 0; row < product.rows; ++row) {
    std::copy_n(buffer + row * kPanelColumns, columns, y + row * y_stride);
  }
}

}  // namespace

Result<DenseWeights> pack_dense(int64_t n, int64_t k, const void* weight, Dtype dtype,
                                const void* bias, Dtype bias_dtype, int threads) {
  DenseWeights w;
  w.k = k;
  w.n = n;
  w.dtype = dtype;
  Result<AlignedBuffer> storage = AlignedBuffer::zeroed(
      static_cast<size_t>(w.panels() * kPanelColumns * k * dtype_bytes(dtype)));
  if (!storage.ok()) return storage.status();
  w.storage = std::move(*storage);
  if (bias != nullptr) {
    w.bias.assign(static_cast<size_t>(w.panels() * kPanelColumns), 0.0f);
    for (int64_t i = 0; i < n; ++i) w.bias[i] = load_as_float(bias, i, bias_dtype);
  }
  const auto* from = static_cast<const std::byte*>(weight);
  parallel_for(threads > 0 ? threads : available_cpus(), w.panels(), [&](int64_t index) {
    const int64_t n0 = index * kPanelColumns, columns = std::min(kPanelColumns, n - n0);
    std::byte* to = w.storage.data() + index * k * kPanelColumns * dtype_bytes(dtype);
    if (dtype == Dtype::f32) {
      transpose_panel(from, n0, columns, k, reinterpret_cast<uint32_t*>(to));
    } else {
      transpose_panel(from, n0, columns, k, reinterpret_cast<uint16_t*>(to));
    }
  });
  return w;
}

void run_dense(const DenseWeights& w, int64_t m, const float* x, int64_t x_stride, float* y,
               int64_t y_stride, int threads) {
  const FloatOps& ops = float_ops();
  const int64_t blocks = (m + kBlockRows - 1) / kBlockRows;
  // With few rows a task should still be a few panels long.
  const int64_t run = std::clamp<int64_t>(w.panels() / (8 * std::max(1, threads)), 1, 8);
  const int64_t runs = (w.panels() + run - 1) / run;
  parallel_for(threads, runs * blocks, [&](int64_t task) {
    const int64_t row0 = task / runs * kBlockRows, rows = std::min(kBlockRows, m - row0);
    const int64_t first = task % runs * run, last = std::min(first + run, w.panels());
    for (int64_t index = first; index < last; ++index) {
      const int64_t n0 = index * kPanelColumns, columns = std::min(kPanelColumns, w.n - n0);
      float* to = y + row0 * y_stride + n0;
      const PanelProduct product{
          x + row0 * x_stride, x_stride, w.panel(index), w.dtype, rows, w.k, to, y_stride, true};
      if (columns == kPanelColumns) {
        ops.panel_product(product);
      } else {
        partial_panel(product, columns, to, y_stride);
      }
      if (w.bias.empty()) continue;
      for (int64_t row = 0; row < rows; ++row) ops.add(to + row * y_stride, &w.bias[n0], columns);
    }
  });
}

std::string dense_kernel_name() { return std::string("dense_") + float_ops().name; }

}  // namespace nibble
