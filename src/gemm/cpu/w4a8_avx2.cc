// w4a8 with AVX2: VPMADDUBSW adds pairs of u4 x s8 products to int16. A pair is at most
// 15 * 128 * 2 = 3840 in magnitude, so 8 pairs fit int16 before they are widened to int32.
#include "gemm/cpu/kernel.h"
#include "gemm/cpu/target.h"

#include <immintrin.h>

#include <cstring>
#include <type_traits>
#include <utility>

NIBBLE_TARGET_BEGIN("avx2,fma,f16c")
#include "gemm/cpu/ymm_tile.h"

namespace nibble {
namespace {

struct DotInt8 {
  static constexpr int64_t kChunkQuads = 8;
  static_assert(kChunkQuads * 2 * 15 * 128 <= 32767);

  static void multiply(__m256i& pairs, __m256i codes, __m256i x) {
    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(codes, x));
  }
  static __m256i drain(__m256i sums, __m256i pairs) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

}  // namespace

void run_w4a8_avx2(const GemmBlock& b) { run_ymm<DotInt8>(b); }

}  // namespace nibble
NIBBLE_TARGET_END
