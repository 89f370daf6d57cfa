// AVX-512: 16 independent chains, enough for two units of latency 5.
#include <immintrin.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "gemm/cpu/target.h"

NIBBLE_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#include "gemm/cpu/unroll.h"

namespace nibble {
namespace {

constexpr int kChains = 16;

// Volatile assembly throughout: the compiler would take what does not change out of the loop.
// Functions of their own: clang takes no captured variable as an operand in a generic lambda.
[[gnu::always_inline]] inline void dot(__m512i& sums, __m512i codes, __m512i x) {
  __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(x));
}

[[gnu::always_inline]] inline void fma(__m512& sums, __m512 w, __m512 x) {
  __asm__ volatile("vfmadd231ps %2, %1, %0" : "+v"(sums) : "v"(w), "v"(x));
}

}  // namespace

void run_peak_vnni_zmm(int64_t iterations) {
  const __m512i codes = _mm512_set1_epi8(11), x = _mm512_set1_epi8(77);
  __m512i sums[kChains];
  unroll<kChains>([&](auto c) NIBBLE_INLINE { sums[c] = _mm512_setzero_si512(); });
  for (int64_t i = 0; i < iterations; ++i) {
    unroll<kChains>([&](auto c) NIBBLE_INLINE { dot(sums[c], codes, x); });
  }
}

void run_peak_fma_zmm(int64_t iterations) {
  const __m512 w = _mm512_set1_ps(1.5f), x = _mm512_set1_ps(0.7f);
  __m512 sums[kChains];
  unroll<kChains>([&](auto c) NIBBLE_INLINE { sums[c] = _mm512_setzero_ps(); });
  for (int64_t i = 0; i < iterations; ++i) {
    unroll<kChains>([&](auto c) NIBBLE_INLINE { fma(sums[c], w, x); });
  }
}

}  // namespace nibble
NIBBLE_TARGET_END
