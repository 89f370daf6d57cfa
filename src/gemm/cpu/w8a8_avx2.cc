// w8a8 with AVX2: VPMADDUBSW of |w| (unsigned) and the activation with the sign of w. Both lie in
// -127..127 (int8.h), so a pair of products is at most 2 * 127 * 127 = 32258, which fits 16 bits.
#include <immintrin.h>

#include <type_traits>
#include <utility>

#include "gemm/cpu/target.h"
#include "gemm/int8.h"

NIBBLE_TARGET_BEGIN("avx2,fma,f16c")
#include "gemm/cpu/unroll.h"

namespace nibble {
namespace {

constexpr int64_t kPrefetchBytes = 3072;

/// 32 weights as sign and magnitude.
struct SignedCodes {
  __m256i value, magnitude;

  explicit SignedCodes(const uint8_t* from) {
    const __m256i codes = _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
    value = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));  // stored as w + 128
    magnitude = _mm256_abs_epi8(value);
  }
};

/// sums += w * x, four neighbouring products per int32 lane.
inline __m256i dot(__m256i sums, const SignedCodes& w, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(x, w.value));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

template <int kRows>
void run_tile(const Int8Block& b, int64_t block, int64_t row) {
  const Int8Weights& w = *b.weights;
  const uint8_t* line = w.block(block);
  const int8_t* x = b.codes + row * b.code_stride;
  __m256i acc[kRows][2];
  unroll<kRows>([&](auto r) NIBBLE_INLINE { acc[r][0] = acc[r][1] = _mm256_setzero_si256(); });
  for (int64_t quad = 0; quad < w.quads; ++quad, line += 64, x += 4) {
    _mm_prefetch(reinterpret_cast<const char*>(line) + kPrefetchBytes, _MM_HINT_T0);
    const SignedCodes first(line), second(line + 32);
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
