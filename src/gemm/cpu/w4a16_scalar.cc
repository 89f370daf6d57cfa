// w4a16 in portable C++: float activations, weights dequantized one at a time.
#include <algorithm>
#include <cmath>

#include "gemm/cpu/kernel.h"

namespace nibble {
namespace {

void run_row(const GemmBlock& b, int64_t block, int64_t row) {
  const PackedWeights& w = *b.weights;
  const float* x = b.activations.floats + row * w.k;
  const int64_t columns = std::min(kBlockColumns, w.n - block * kBlockColumns);
  for (int64_t c = 0; c < columns; ++c) {
    const int64_t shift = c < 16 ? 0 : 4;
    float acc = 0;
    for (int64_t g = 0; g < w.groups; ++g) {
      const uint8_t* codes = w.codes(block) + g * w.quads * kLineBytes + 4 * (c % 16);
      const int zero = w.zeros(block)[g * kBlockColumns + c];
      float p = 0;
      for (int64_t i = 0; i < w.group_size; ++i) {
        const int q = (codes[i / 4 * kLineBytes + i % 4] >> shift) & 15;
        p = std::fma(x[g * w.group_size + i], static_cast<float>(q - zero), p);
      }
      acc = std::fma(p, load_as_float(w.scales(block), g * kBlockColumns + c, w.scale_dtype), acc);
    }
    const int64_t n = block * kBlockColumns + c;
    if (!w.bias.empty()) acc += w.bias[n];
    store_from_float(b.y, row * b.y_stride + n, b.y_dtype, acc);
  }
}

}  // namespace

void run_w4a16_scalar(const GemmBlock& b) {
  for (int64_t block = b.block0; block < b.block1; ++block) {
    for (int64_t row = 0; row < b.rows; ++row) run_row(b, block, row);
  }
}

}  // namespace nibble
