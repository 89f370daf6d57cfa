// w8a8 with AVX2. VPMADDUBSW adds two products in 16 bits, where 255 * 127 * 2 does not fit: the
// unsigned code goes in as (code >> 1) and its low bit, 2 * high + low put together in 32 bits.
#include <immintrin.h>

#include <type_traits>
#include <utility>

#include "gemm/cpu/target.h"
#include "gemm/int8.h"

NIBBLE_TARGET_BEGIN("avx2,fma,f16c")
#include "gemm/cpu/unroll.h"

namespace nibble {
namespace {

/// sums += u8 codes * s8 x, four neighbouring products per int32 lane.
inline __m256i dot(__m256i sums, __m256i codes, __m256i x) {
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(codes, 1), _mm256_set1_epi8(0x7f));
  const __m256i low = _mm256_and_si256(codes, _mm256_set1_epi8(1));
  const __m256i twice = _mm256_madd_epi16(_mm256_maddubs_epi16(high, x), _mm256_set1_epi16(2));
  const __m256i once = _mm256_madd_epi16(_mm256_maddubs_epi16(low, x), _mm256_set1_epi16(1));
  return _mm256_add_epi32(sums, _mm256_add_epi32(twice, once));
}

template <int kRows>
void run_tile(const Int8Block& b, int64_t block, int64_t row) {
  const Int8Weights& w = *b.weights;
  const uint8_t* line = w.block(block);
  const int8_t* x = b.codes + row * b.code_stride;
  __m256i acc[kRows][2];
  unroll<kRows>([&](auto r) NIBBLE_INLINE {
    acc[r][0] = acc[r][1] = _mm256_set1_epi32(-128 * b.sums[row + r]);
  });
  for (int64_t quad = 0; quad < w.quads; ++quad, line += 64, x += 4) {
    const __m256i first = _mm256_load_si256(reinterpret_cast<const __m256i*>(line));
    const __m256i second = _mm256_load_si256(reinterpret_cast<const __m256i*>(line + 32));
    unroll<kRows>([&](auto r) NIBBLE_INLINE {
      int32_t four;
      __builtin_memcpy(&four, x + r * b.code_stride, 4);
      const __m256i value = _mm256_set1_epi32(four);
      acc[r][0] = dot(acc[r][0], first, value);
      acc[r][1] = dot(acc[r][1], second, value);
    });
  }
  for (int half = 0; half < 2; ++half) {
    const int64_t n0 = block * 16 + half * 8;
    const __m256 scales = _mm256_loadu_ps(&w.scales[static_cast<size_t>(n0)]);
    for (int r = 0; r < kRows; ++r) {
      alignas(32) float out[8];
      const __m256 sum = _mm256_mul_ps(_mm256_cvtepi32_ps(acc[r][half]), scales);
      _mm256_store_ps(out, _mm256_mul_ps(sum, _mm256_set1_ps(b.scales[row + r])));
      for (int64_t c = 0; c < 8 && n0 + c < w.n; ++c) {
        b.y[(row + r) * b.y_stride + n0 + c] = out[c];
      }
    }
  }
}

}  // namespace

void run_w8a8_avx2(const Int8Block& b) {
  for (int64_t block = b.block0; block < b.block1; ++block) {
    int64_t row = 0;
    for (; b.rows - row >= 4; row += 4) run_tile<4>(b, block, row);
    for (; b.rows - row >= 2; row += 2) run_tile<2>(b, block, row);
    for (; row < b.rows; ++row) run_tile<1>(b, block, row);
  }
}

}  // namespace nibble
NIBBLE_TARGET_END
