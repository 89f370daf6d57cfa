// w4a8 and w4a4 in portable C++: the path for CPUs without AVX2, and the layout's plainest reader.
#include <algorithm>
#include <cmath>

#include "gemm/cpu/kernel.h"

namespace nibble {
namespace {

/// S of one (row, group) for the 32 columns of a block.
void group_sums(const PackedWeights& w, int64_t block, int64_t group, const int8_t* a,
                int32_t activation_sum, int32_t* sums) {
  for (int64_t c = 0; c < kBlockColumns; ++c) {
    sums[c] = -static_cast<int32_t>(w.zeros(block)[group * kBlockColumns + c]) * activation_sum;
  }
  const uint8_t* lines = w.codes(block) + group * w.quads * kLineBytes;
  for (int64_t quad = 0; quad < w.quads; ++quad, lines += kLineBytes, a += 4) {
    for (int64_t c = 0; c < 16; ++c) {
      for (int64_t i = 0; i < 4; ++i) {
        sums[c] += (lines[4 * c + i] & 15) * a[i];
        sums[16 + c] += (lines[4 * c + i] >> 4) * a[i];
      }
    }
  }
}

void run_row(const GemmBlock& b, int64_t block, int64_t row) {
  const PackedWeights& w = *b.weights;
  const int64_t columns = std::min(kBlockColumns, w.n - block * kBlockColumns);
  float acc[kBlockColumns] = {};
  for (int64_t g = 0; g < w.groups; ++g) {
    int32_t sums[kBlockColumns];
    group_sums(w, block, g, b.activations.codes + (row * w.groups + g) * w.quads * 4,
               b.activations.sums[row * w.groups + g], sums);
    for (int64_t c = 0; c < columns; ++c) {
      const float s = load_as_float(w.scales(block), g * kBlockColumns + c, w.scale_dtype);
      float value = static_cast<float>(sums[c]);
      if (b.group_scales) value *= b.activations.scales[row * w.groups + g];
      acc[c] = std::fma(value, s, acc[c]);
      if (b.partials != nullptr) {
        b.partials[(row * w.groups + g) * w.n + block * kBlockColumns + c] = sums[c];
      }
    }
  }
  for (int64_t c = 0; c < columns; ++c) {
    const int64_t n = block * kBlockColumns + c;
    float y = acc[c];
    if (!b.group_scales) {
      const float t = b.activations.scales[row];
      y = w.bias.empty() ? y * t : std::fma(y, t, w.bias[n]);
    } else if (!w.bias.empty()) {
      y += w.bias[n];
    }
    store_from_float(b.y, row * b.y_stride + n, b.y_dtype, y);
  }
}

}  // namespace

void run_w4a8_scalar(const GemmBlock& b) {
  for (int64_t block = b.block0; block < b.block1; ++block) {
    for (int64_t row = 0; row < b.rows; ++row) run_row(b, block, row);
  }
}

}  // namespace nibble
