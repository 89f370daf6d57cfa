// AVX2 has no 8-bit dot product into int32. The more products are summed in int16 before VPMADDWD
// widens them, the faster, and the smaller the codes must be.
#include <immintrin.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "gemm/cpu/target.h"

NIBBLE_TARGET_BEGIN("avx2,fma")
#include "gemm/cpu/unroll.h"

namespace nibble {
namespace {

// Volatile assembly throughout: the compiler would take what does not change out of the loop.
[[gnu::always_inline]] inline __m256i maddubs(__m256i codes, __m256i x) {
  __m256i products;
  __asm__ volatile("vpmaddubsw %2, %1, %0" : "=x"(products) : "x"(codes), "x"(x));
  return products;
}

// Functions of their own: clang takes no captured variable as an operand in a generic lambda.
[[gnu::always_inline]] inline void add_words(__m256i& sums, __m256i more) {
  __asm__ volatile("vpaddw %1, %0, %0" : "+x"(sums) : "x"(more));
}

[[gnu::always_inline]] inline void add_pairs(__m256i& sums, __m256i words, __m256i ones) {
  __m256i wide;
  __asm__ volatile("vpmaddwd %2, %1, %0" : "=x"(wide) : "x"(words), "x"(ones));
  __asm__ volatile("vpaddd %1, %0, %0" : "+x"(sums) : "x"(wide));
}

[[gnu::always_inline]] inline void fma(__m256& sums, __m256 w, __m256 x) {
  __asm__ volatile("vfmadd231ps %2, %1, %0" : "+x"(sums) : "x"(w), "x"(x));
}

/// One iteration: `chains` sums of `depth` products each.
template <int chains, int depth>
[[gnu::always_inline]] inline void run_maddubs(int64_t iterations) {
  const __m256i codes = _mm256_set1_epi8(11), x = _mm256_set1_epi8(77);
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sums[chains];
  unroll<chains>([&](auto c) NIBBLE_INLINE { sums[c] = _mm256_setzero_si256(); });
  for (int64_t i = 0; i < iterations; ++i) {
    unroll<chains>([&](auto c) NIBBLE_INLINE {
      __m256i narrow = maddubs(codes, x);
      unroll<depth - 1>([&](auto) NIBBLE_INLINE { add_words(narrow, maddubs(codes, x)); });
      add_pairs(sums[c], narrow, ones);
    });
  }
}

}  // namespace

void run_peak_maddubs(int64_t iterations) { run_maddubs<8, 1>(iterations); }
void run_peak_maddubs_2(int64_t iterations) { run_maddubs<8, 2>(iterations); }
void run_peak_maddubs_8(int64_t iterations) { run_maddubs<4, 8>(iterations); }

void run_peak_fma_ymm(int64_t iterations) {
  constexpr int kChains = 12;
  const __m256 w = _mm256_set1_ps(1.5f), x = _mm256_set1_ps(0.7f);
  __m256 sums[kChains];
  unroll<kChains>([&](auto c) NIBBLE_INLINE { sums[c] = _mm256_setzero_ps(); });
  for (int64_t i = 0; i < iterations; ++i) {
    unroll<kChains>([&](auto c) NIBBLE_INLINE { fma(sums[c], w, x); });
  }
}

}  // namespace nibble
NIBBLE_TARGET_END
