// The activation quantizer in AVX-512: same bits as quantize_scalar.cc, 16 elements at a time.
#include "gemm/cpu/kernel.h"
#include "gemm/cpu/target.h"

#include <immintrin.h>

#include <algorithm>

NIBBLE_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "gemm/cpu/avx512.h"

namespace nibble {
namespace {

ElementRange range(const void* x, Dtype dtype, int64_t count) {
  const __m512i magnitude_mask = _mm512_set1_epi32(0x7fffffff);
  __m512i max_abs = _mm512_setzero_si512();
  __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 v = load_floats(x, i, dtype, lanes_below(count - i));
    // As unsigned integers magnitudes order like the floats, with NaN above infinity.
    max_abs = _mm512_max_epu32(max_abs, _mm512_and_si512(_mm512_castps_si512(v), magnitude_mask));
    low = _mm512_min_ps(low, v);
    high = _mm512_max_ps(high, v);
  }
  return {_mm512_reduce_max_epu32(max_abs), _mm512_reduce_min_ps(low), _mm512_reduce_max_ps(high)};
}

int32_t encode(const void* x, Dtype dtype, int64_t count, const Encoding& encoding, int8_t* out,
               int64_t step_stride) {
  const __m512 inverse = _mm512_set1_ps(encoding.inverse_scale);
  const __m512 low = _mm512_set1_ps(encoding.low), high = _mm512_set1_ps(encoding.high);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = lanes_below(count - i);
    const __m512 scaled = _mm512_mul_ps(load_floats(x, i, dtype, mask), inverse);
    const __m512 clamped = _mm512_min_ps(_mm512_max_ps(scaled, low), high);
    const __m512i code = _mm512_maskz_cvtps_epi32(mask, clamped);
    sum = _mm512_add_epi32(sum, code);
    _mm_mask_storeu_epi8(out + i / 64 * step_stride + i % 64, mask, _mm512_cvtepi32_epi8(code));
  }
  return _mm512_reduce_add_epi32(sum);
}

void to_float(const void* x, Dtype dtype, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = lanes_below(count - i);
    _mm512_mask_storeu_ps(out + i, mask, load_floats(x, i, dtype, mask));
  }
}

}  // namespace

const QuantizerOps& quantizer_ops_avx512() {
  static constexpr QuantizerOps ops = {range, encode, to_float};
  return ops;
}

}  // namespace nibble
NIBBLE_TARGET_END
