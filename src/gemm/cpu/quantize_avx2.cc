// The activation quantizer in AVX2: same bits as quantize_scalar.cc, 8 elements at a time.
#include "gemm/cpu/kernel.h"
#include "gemm/cpu/target.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>

NIBBLE_TARGET_BEGIN("avx2,fma,f16c")
#include "gemm/cpu/avx2.h"

namespace nibble {
namespace {

__m256 load(const void* x, int64_t i, Dtype dtype, int64_t count) {
  return count - i >= 8 ? load_floats(x, i, dtype) : load_floats_partial(x, i, dtype, count - i);
}

ElementRange range(const void* x, Dtype dtype, int64_t count) {
  const __m256i magnitude_mask = _mm256_set1_epi32(0x7fffffff);
  __m256i max_abs = _mm256_setzero_si256();
  __m256 low = _mm256_setzero_ps(), high = _mm256_setzero_ps();
  for (int64_t i = 0; i < count; i += 8) {
    const __m256 v = load(x, i, dtype, count);
    // As unsigned integers magnitudes order like the floats, with NaN above infinity.
    max_abs = _mm256_max_epu32(max_abs, _mm256_and_si256(_mm256_castps_si256(v), magnitude_mask));
    low = _mm256_min_ps(low, v);
    high = _mm256_max_ps(high, v);
  }
  alignas(32) uint32_t abs_lanes[8];
  alignas(32) float low_lanes[8], high_lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(abs_lanes), max_abs);
  _mm256_store_ps(low_lanes, low);
  _mm256_store_ps(high_lanes, high);
  ElementRange r;
  for (int i = 0; i < 8; ++i) {
    r.max_abs_bits = r.max_abs_bits > abs_lanes[i] ? r.max_abs_bits : abs_lanes[i];
    r.low = r.low < low_lanes[i] ? r.low : low_lanes[i];
    r.high = r.high > high_lanes[i] ? r.high : high_lanes[i];
  }
  return r;
}

int32_t encode(const void* x, Dtype dtype, int64_t count, const Encoding& encoding, int8_t* out,
               int64_t step_stride) {
  const __m256 inverse = _mm256_set1_ps(encoding.inverse_scale);
  const __m256 low = _mm256_set1_ps(encoding.low), high = _mm256_set1_ps(encoding.high);
  // byte 0 of each int32 lane to the bottom of its 128-bit half
  const __m256i gather = _mm256_set1_epi32(0x0c080400);
  __m256i sum = _mm256_setzero_si256();
  for (int64_t i = 0; i < count; i += 8) {
    const __m256 scaled = _mm256_mul_ps(load(x, i, dtype, count), inverse);
    const __m256 clamped = _mm256_min_ps(_mm256_max_ps(scaled, low), high);
    const __m256i code = _mm256_cvtps_epi32(clamped);  // zero past the end: 0 lies in [low, high]
    sum = _mm256_add_epi32(sum, code);
    const __m256i bytes = _mm256_shuffle_epi8(code, gather);
    const uint64_t packed =
        static_cast<uint32_t>(_mm_cvtsi128_si32(_mm256_castsi256_si128(bytes))) |
        static_cast<uint64_t>(
            static_cast<uint32_t>(_mm_cvtsi128_si32(_mm256_extracti128_si256(bytes, 1))))
            << 32;
    const auto left = static_cast<size_t>(count - i < 8 ? count - i : 8);
    std::memcpy(out + i / 64 * step_stride + i % 64, &packed, left);
  }
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sum);
  int32_t total = 0;
  for (const int32_t lane : lanes) total += lane;
  return total;
}

void to_float(const void* x, Dtype dtype, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += 8) {
    store_floats(out, i, Dtype::f32, count - i, load(x, i, dtype, count));
  }
}

}  // namespace

const QuantizerOps& quantizer_ops_avx2() {
  static constexpr QuantizerOps ops = {range, encode, to_float};
  return ops;
}

}  // namespace nibble
NIBBLE_TARGET_END
