// FloatOps with AVX2, FMA and F16C: V16 is two registers.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "gemm/cpu/target.h"
#include "gemm/float_ops.h"

NIBBLE_TARGET_BEGIN("avx2,fma,f16c")
#include "gemm/cpu/unroll.h"

namespace nibble {
namespace {

struct V16 {
  __m256 low, high;
};

// 16 registers: 6 rows of 16 columns are 12 sums; one row of 64 columns is 8.
constexpr int kTileRows = 6;
template <int kRows>
constexpr int kTileVectors = kRows == 1   ? 4
                             : kRows == 2 ? 2
                                          : 1;

inline V16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline V16 broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V16 load(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
inline void store(float* x, V16 v) {
  _mm256_storeu_ps(x, v.low);
  _mm256_storeu_ps(x + 8, v.high);
}
inline V16 fma(V16 a, V16 b, V16 c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline V16 add(V16 a, V16 b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
inline V16 sub(V16 a, V16 b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
inline V16 mul(V16 a, V16 b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
inline V16 div(V16 a, V16 b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
inline V16 maximum(V16 a, V16 b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
inline V16 minimum(V16 a, V16 b) {
  return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
inline V16 round_even(V16 v) {
  return {_mm256_round_ps(v.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(v.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

inline __m256 power_of_two(__m256 n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
inline V16 power_of_two(V16 n) { return {power_of_two(n.low), power_of_two(n.high)}; }

template <Dtype kDtype>
inline __m256 load_eight(const void* panel, int64_t index) {
  if constexpr (kDtype == Dtype::f32) {
    return _mm256_load_ps(static_cast<const float*>(panel) + index);
  } else {
    const auto* from = static_cast<const uint16_t*>(panel) + index;
    const __m128i half = _mm_load_si128(reinterpret_cast<const __m128i*>(from));
    if constexpr (kDtype == Dtype::f16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
}
template <Dtype kDtype>
inline V16 load_panel(const void* panel, int64_t index) {
  return {load_eight<kDtype>(panel, index), load_eight<kDtype>(panel, index + 8)};
}

inline float sum_lanes(V16 v) {
  const __m256 eight = _mm256_add_ps(v.low, v.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

inline float max_lane(V16 v) {
  const __m256 eight = _mm256_max_ps(v.low, v.high);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

#include "gemm/cpu/float_ops_generic.h"

}  // namespace

const FloatOps& float_ops_avx2() {
  static constexpr FloatOps kOps = make_ops("avx2");
  return kOps;
}

}  // namespace nibble
NIBBLE_TARGET_END
