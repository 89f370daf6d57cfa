// Named wrappers over the AVX2 + FMA + F16C intrinsics that the kernels share. Include after system
// headers; every includer compiles its own internal copy inside a target region (see target.h).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "gemm/cpu/packed_weights.h"

namespace nibble {
namespace {

inline __m256 floats_from_half(__m128i half, Dtype dtype) {
  if (dtype == Dtype::f16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/// 8 elements of x as float.
inline __m256 load_floats(const void* x, int64_t index, Dtype dtype) {
  if (dtype == Dtype::f32) return _mm256_loadu_ps(static_cast<const float*>(x) + index);
  const auto* half = static_cast<const uint16_t*>(x) + index;
  return floats_from_half(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half)), dtype);
}

/// The first `count` < 8 elements, the rest zero.
inline __m256 load_floats_partial(const void* x, int64_t index, Dtype dtype, int64_t count) {
  alignas(32) unsigned char bytes[32] = {};
  std::memcpy(bytes, static_cast<const unsigned char*>(x) + index * dtype_bytes(dtype),
              static_cast<size_t>(count * dtype_bytes(dtype)));
  return load_floats(bytes, 0, dtype);
}

/// 8 scales as float: exact for both types, subnormals included.
inline __m256 load_scales(const uint16_t* scales, Dtype dtype) {
  return floats_from_half(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)), dtype);
}

/// 8 zero points as int32.
inline __m256i load_zeros(const uint8_t* zeros) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros)));
}

/// Rounds half to even to bf16, NaNs quieted.
inline __m128i to_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  return _mm256_castsi256_si128(packed);
}

/// Stores the first min(count, 8) elements, rounded once to dtype.
inline void store_floats(void* y, int64_t index, Dtype dtype, int64_t count, __m256 v) {
  auto* to = static_cast<unsigned char*>(y) + index * dtype_bytes(dtype);
  if (dtype == Dtype::f32) {
    if (count >= 8) return _mm256_storeu_ps(reinterpret_cast<float*>(to), v);
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, v);
    std::memcpy(to, lanes, static_cast<size_t>(count) * 4);
    return;
  }
  const __m128i half = dtype == Dtype::f16
                           ? _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                           : to_bf16(v);
  if (count >= 8) return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), half);
  alignas(16) uint16_t lanes[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(lanes), half);
  std::memcpy(to, lanes, static_cast<size_t>(count) * 2);
}

/// pairs += u8 codes * s8 x, neighbouring products summed, in int16: the caller sees to the range.
/// Inline assembly, because g++ knows that integer addition is associative: it turns a chain of
/// sums into a tree whose leaves it spills (docs/notes.md).
inline void add_pairs_u8s8(__m256i& pairs, __m256i codes, __m256i x) {
  __m256i products;
  __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
          : "+x"(pairs), "=&x"(products)
          : "x"(codes), "x"(x));
}

/// Zero points for zero_correction: -z, of which VPMADDWD is to see the low half only.
inline __m256i negative_zeros(__m256i zeros, bool small_sums) {
  const __m256i negative = _mm256_sub_epi32(_mm256_setzero_si256(), zeros);
  return small_sums ? _mm256_and_si256(negative, _mm256_set1_epi32(0xffff)) : negative;
}

/// -z * sum exactly. When |sum| < 2^15 (group_size <= 255) one VPMADDWD does it.
inline __m256i zero_correction(__m256i negative_zeros, __m256i sum, bool small_sums) {
  return small_sums ? _mm256_madd_epi16(negative_zeros, sum)
                    : _mm256_mullo_epi32(negative_zeros, sum);
}

}  // namespace
}  // namespace nibble
