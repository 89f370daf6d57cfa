// Named wrappers over the AVX-512 intrinsics that the kernels share. Include after system headers;
// every includer compiles its own internal copy inside a target region (see target.h).
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "gemm/cpu/packed_weights.h"

namespace nibble {
namespace {

/// 16 elements of x as float; `mask` selects those in bounds, the rest are zero.
inline __m512 load_floats(const void* x, int64_t index, Dtype dtype, __mmask16 mask) {
  if (dtype == Dtype::f32) {
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(x) + index);
  }
  const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x) + index);
  if (dtype == Dtype::f16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/// 16 scales as float: exact for both types, subnormals included.
inline __m512 load_scales(const uint16_t* scales, Dtype dtype) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales));
  if (dtype == Dtype::f16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/// 16 zero points as int32.
inline __m512i load_zeros(const uint8_t* zeros) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros)));
}

/// Rounds half to even to bf16, NaNs quieted. Not VCVTNEPS2BF16: that flushes subnormals.
inline __m256i to_bf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}

/// Stores the elements that `mask` selects, rounded once to dtype.
inline void store_floats(void* y, int64_t index, Dtype dtype, __mmask16 mask, __m512 v) {
  if (dtype == Dtype::f32) {
    _mm512_mask_storeu_ps(static_cast<float*>(y) + index, mask, v);
    return;
  }
  const __m256i half = dtype == Dtype::f16
                           ? _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                           : to_bf16(v);
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + index, mask, half);
}

/// z * sum exactly. When |sum| < 2^15 (group_size <= 255) one VPMADDWD does it: z has a zero high
/// half, so only the low halves meet.
inline __m512i zero_correction(__m512i zeros, int32_t sum, bool small_sums) {
  const __m512i s = _mm512_set1_epi32(sum);
  return small_sums ? _mm512_madd_epi16(zeros, s) : _mm512_mullo_epi32(zeros, s);
}

/// sums += u8 codes * s8 x, four neighbouring products per int32 lane. Inline assembly: around the
/// intrinsic g++ 12 copies and spills the accumulators, which halves the speed of a large tile.
inline void dot_u8s8(__m512i& sums, __m512i codes, __m512i x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(x));
}

inline __mmask16 lanes_below(int64_t count) {  // mask of the first min(count, 16) lanes
  return count >= 16 ? __mmask16(0xffff) : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1);
}

}  // namespace
}  // namespace nibble
