// w4a4 with AVX2: as w4a8_avx2, but int4 activations lie in -15..15 (asymmetric ones with their
// zero point taken off), so a pair of products is at most 450 and a whole group of 128 or 256 fits
// int16.
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

struct DotInt4 {
  static constexpr int64_t kChunkQuads = 64;
  static_assert(kChunkQuads * 2 * 15 * 15 <= 32767);

  static void multiply(__m256i& pairs, __m256i codes, __m256i x) {
    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(codes, x));
  }
  static __m256i drain(__m256i sums, __m256i pairs) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

}  // namespace

void run_w4a4_avx2(const GemmBlock& b) { run_ymm<DotInt4>(b); }

}  // namespace nibble
NIBBLE_TARGET_END
