// w4a16 with AVX2 and FMA: float activations, 8 columns at a time.
#include "gemm/cpu/kernel.h"
#include "gemm/cpu/target.h"

#include <immintrin.h>

#include <cstring>

NIBBLE_TARGET_BEGIN("avx2,fma,f16c")
#include "gemm/cpu/avx2.h"

namespace nibble {
namespace {

constexpr int64_t kVectors = 4;  // a block is 4 vectors of 8 columns
constexpr int64_t kPrefetchBytes = 3072;

/// The 8 columns of vector v of a line: bytes (v % 2) * 32, low nibbles for v < 2, else high ones.
inline int64_t first_column(int v) { return v % 2 * 8 + v / 2 * 16; }

/// Vectors [v0, v0 + kWidth) of one block for kRows rows.
template <int kRows, int kWidth>
void run_tile(const GemmBlock& b, int64_t block, int v0, int64_t row) {
  const PackedWeights& w = *b.weights;
  const __m256i low_nibble = _mm256_set1_epi32(15);
  __m256 acc[kRows][kWidth];
  std::memset(&acc, 0, sizeof acc);
  for (int64_t g = 0; g < w.groups; ++g) {
    const float* x = b.activations.floats + row * w.k + g * w.group_size;
    const uint8_t* lines = w.codes(block) + g * w.quads * kLineBytes;
    __m256i zeros[kWidth];
    __m256 products[kRows][kWidth];
    std::memset(&products, 0, sizeof products);
    for (int v = 0; v < kWidth; ++v) {
      zeros[v] = load_zeros(w.zeros(block) + g * kBlockColumns + first_column(v0 + v));
    }
    for (int64_t i = 0; i < w.group_size; ++i) {
      const uint8_t* line = lines + i / 4 * kLineBytes;
      _mm_prefetch(reinterpret_cast<const char*>(line) + kPrefetchBytes, _MM_HINT_T0);
      for (int v = 0; v < kWidth; ++v) {
        const auto* from = reinterpret_cast<const __m256i*>(line + (v0 + v) % 2 * 32);
        const __m128i shift = _mm_cvtsi64_si128(i % 4 * 8 + (v0 + v) / 2 * 4);
        const __m256i q =
            _mm256_and_si256(_mm256_srl_epi32(_mm256_loadu_si256(from), shift), low_nibble);
        const __m256 weight = _mm256_cvtepi32_ps(_mm256_sub_epi32(q, zeros[v]));
        for (int r = 0; r < kRows; ++r) {
          products[r][v] =
              _mm256_fmadd_ps(_mm256_set1_ps(x[r * w.k + i]), weight, products[r][v]);
        }
      }
    }
    for (int v = 0; v < kWidth; ++v) {
      const __m256 s =
          load_scales(w.scales(block) + g * kBlockColumns + first_column(v0 + v), w.scale_dtype);
      for (int r = 0; r < kRows; ++r) acc[r][v] = _mm256_fmadd_ps(products[r][v], s, acc[r][v]);
    }
  }
  for (int v = 0; v < kWidth; ++v) {
    const int64_t n0 = block * kBlockColumns + first_column(v0 + v);
    if (n0 >= w.n) continue;
    for (int r = 0; r < kRows; ++r) {
      __m256 y = acc[r][v];
      if (!w.bias.empty()) y = _mm256_add_ps(y, _mm256_loadu_ps(&w.bias[n0]));
      store_floats(b.y, (row + r) * b.y_stride + n0, b.y_dtype, w.n - n0, y);
    }
  }
}

}  // namespace

void run_w4a16_avx2(const GemmBlock& b) {
  for (int64_t block = b.block0; block < b.block1; ++block) {
    int64_t row = 0;
    for (; b.rows - row >= 4; row += 4) {
      for (int v = 0; v < kVectors; v += 2) run_tile<4, 2>(b, block, v, row);
    }
    for (; row < b.rows; ++row) run_tile<1, 4>(b, block, 0, row);
  }
}

}  // namespace nibble
NIBBLE_TARGET_END
