// AVX-VNNI: 12 independent chains of the 16 registers there are.
#include <immintrin.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "gemm/cpu/target.h"

NIBBLE_TARGET_BEGIN("avx2,avxvnni")
#include "gemm/cpu/unroll.h"

namespace nibble {
namespace {

// A function of its own: clang takes no captured variable as an operand in a generic lambda.
[[gnu::always_inline]] inline void dot(__m256i& sums, __m256i codes, __m256i x) {
  __asm__ volatile("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(codes), "x"(x));
}

}  // namespace

void run_peak_vnni_ymm(int64_t iterations) {
  constexpr int kChains = 12;
  const __m256i codes = _mm256_set1_epi8(11), x = _mm256_set1_epi8(77);
  __m256i sums[kChains];
  unroll<kChains>([&](auto c) NIBBLE_INLINE { sums[c] = _mm256_setzero_si256(); });
  for (int64_t i = 0; i < iterations; ++i) {
    unroll<kChains>([&](auto c) NIBBLE_INLINE { dot(sums[c], codes, x); });
  }
}

}  // namespace nibble
NIBBLE_TARGET_END
