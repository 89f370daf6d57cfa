// w4a16 with AVX2 and FMA: float activations, 8 columns at a time.
#include "gemm/cpu/kernel.h"
#include "gemm/cpu/target.h"

#include <immintrin.h>

#include <cstring>
#include <type_traits>
#include <utility>

NIBBLE_TARGET_BEGIN("avx2,fma,f16c")
#include "gemm/cpu/avx2.h"
#include "gemm/cpu/unroll.h"

namespace nibble {
namespace {

constexpr int64_t kHalfLineBytes = kLineBytes / 2;
constexpr int64_t kPrefetchBytes = 3072;

/// The 8 columns of vector v of a line: bytes (v % 2) * 32, low nibbles for v < 2, else high ones.
inline int64_t first_column(int v) { return v % 2 * 8 + v / 2 * 16; }

/// Vectors [v0, v0 + kWidth) of one block for kRows rows.
template <int kRows, int kWidth, int v0>
void run_tile(const GemmBlock& b, int64_t block, int64_t row) {
  const PackedWeights& w = *b.weights;
  const __m256i low_nibble = _mm256_set1_epi32(15);
  __m256 acc[kRows][kWidth];
  std::memset(&acc, 0, sizeof acc);
  for (int64_t g = 0; g < w.groups; ++g) {
    const float* x = b.activations.floats + row * w.k + g * w.group_size;
    const uint8_t* lines = w.codes(block) + g * w.quads * kLineBytes;
    __m256i zeros[kWidth];
    __m256 products[kRows][kWidth];
    unroll<kRows * kWidth>(
        [&](auto i) NIBBLE_INLINE { products[i / kWidth][i % kWidth] = _mm256_setzero_ps(); });
    unroll<kWidth>([&](auto v) NIBBLE_INLINE {
      zeros[v] = load_zeros(w.zeros(block) + g * kBlockColumns + first_column(v0 + v));
    });
    for (int64_t quad = 0; quad < w.quads; ++quad, lines += kLineBytes, x += 4) {
      const int64_t left = w.group_size - quad * 4;  // the padding of a group has no x
      _mm_prefetch(reinterpret_cast<const char*>(lines) + kPrefetchBytes, _MM_HINT_T0);
      unroll<kWidth>([&](auto v) NIBBLE_INLINE {
        const __m256i codes = _mm256_loadu_si256(
            reinterpret_cast<const __m256i*>(lines + (v0 + v) % 2 * kHalfLineBytes));
        unroll<4>([&](auto i) NIBBLE_INLINE {
          if (i >= left) return;
          const int shift = i * 8 + (v0 + v) / 2 * 4;
          const __m256i q = _mm256_and_si256(_mm256_srli_epi32(codes, shift), low_nibble);
          const __m256 weight = _mm256_cvtepi32_ps(_mm256_sub_epi32(q, zeros[v]));
          unroll<kRows>([&](auto r) NIBBLE_INLINE {
            products[r][v] =
                _mm256_fmadd_ps(_mm256_set1_ps(x[r * w.k + i]), weight, products[r][v]);
          });
        });
      });
    }
    unroll<kWidth>([&](auto v) NIBBLE_INLINE {
      const __m256 s =
          load_scales(w.scales(block) + g * kBlockColumns + first_column(v0 + v), w.scale_dtype);
      unroll<kRows>(
          [&](auto r) NIBBLE_INLINE { acc[r][v] = _mm256_fmadd_ps(products[r][v], s, acc[r][v]); });
    });
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
      run_tile<4, 2, 0>(b, block, row);
      run_tile<4, 2, 2>(b, block, row);
    }
    for (; row < b.rows; ++row) run_tile<1, 4, 0>(b, block, row);
  }
}

}  // namespace nibble
NIBBLE_TARGET_END
