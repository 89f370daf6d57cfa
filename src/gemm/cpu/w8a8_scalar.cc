// w8a8 in plain C++: the meaning of the other kernels of this name.
#include <algorithm>

#include "gemm/int8.h"

namespace nibble {

void run_w8a8_scalar(const Int8Block& b) {
  const Int8Weights& w = *b.weights;
  for (int64_t block = b.block0; block < b.block1; ++block) {
    for (int64_t c = 0; c < std::min<int64_t>(16, w.n - block * 16); ++c) {
      for (int64_t row = 0; row < b.rows; ++row) {
        const int8_t* x = b.codes + row * b.code_stride;
        int32_t sum = 0;
        for (int64_t i = 0; i < w.quads * 4; ++i) {
          sum += (w.block(block)[i / 4 * 64 + 4 * c + i % 4] - 128) * x[i];
        }
        const int64_t n = block * 16 + c;
        b.y[row * b.y_stride + n] =
            static_cast<float>(sum) * w.scales[static_cast<size_t>(n)] * b.scales[row];
      }
    }
  }
}

}  // namespace nibble
