// FloatOps with AVX-512: V16 is one register.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "gemm/cpu/target.h"
#include "gemm/float_ops.h"

NIBBLE_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "gemm/cpu/unroll.h"

namespace nibble {
namespace {

using V16 = __m512;

constexpr int kTileRows = 6;
template <int kRows>
constexpr int kTileVectors = 4;

inline V16 zero() { return _mm512_setzero_ps(); }
inline V16 broadcast(float x) { return _mm512_set1_ps(x); }
inline V16 load(const float* x) { return _mm512_loadu_ps(x); }
inline void store(float* x, V16 v) { _mm512_storeu_ps(x, v); }
inline V16 fma(V16 a, V16 b, V16 c) { return _mm512_fmadd_ps(a, b, c); }
inline V16 add(V16 a, V16 b) { return _mm512_add_ps(a, b); }
inline V16 sub(V16 a, V16 b) { return _mm512_sub_ps(a, b); }
inline V16 mul(V16 a, V16 b) { return _mm512_mul_ps(a, b); }
inline V16 div(V16 a, V16 b) { return _mm512_div_ps(a, b); }
inline V16 maximum(V16 a, V16 b) { return _mm512_max_ps(a, b); }
inline V16 minimum(V16 a, V16 b) { return _mm512_min_ps(a, b); }
inline V16 round_even(V16 v) { return _mm512_roundscale_ps(v, 0); }

inline V16 power_of_two(V16 n) {
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
}

template <Dtype kDtype>
inline V16 load_panel(const void* panel, int64_t index) {
  if constexpr (kDtype == Dtype::f32) {
    return _mm512_load_ps(static_cast<const float*>(panel) + index);
  } else {
    const auto* from = static_cast<const uint16_t*>(panel) + index;
    const __m256i half = _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
    if constexpr (kDtype == Dtype::f16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
}

inline float sum_lanes(V16 v) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

inline float max_lane(V16 v) { return _mm512_reduce_max_ps(v); }

#include "gemm/cpu/float_ops_generic.h"

}  // namespace

const FloatOps& float_ops_avx512() {
  static constexpr FloatOps kOps = make_ops("avx512");
  return kOps;
}

}  // namespace nibble
NIBBLE_TARGET_END
