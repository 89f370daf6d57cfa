// The activation quantizer in portable C++: the definition that the vector versions must equal.
#include <algorithm>
#include <bit>
#include <cmath>

#include "gemm/cpu/kernel.h"

namespace nibble {
namespace {

ElementRange range(const void* x, Dtype dtype, int64_t count) {
  ElementRange r;
  for (int64_t i = 0; i < count; ++i) {
    const float value = load_as_float(x, i, dtype);
    r.max_abs_bits = std::max(r.max_abs_bits, std::bit_cast<uint32_t>(value) & 0x7fffffffu);
    r.low = std::min(r.low, value);
    r.high = std::max(r.high, value);
  }
  return r;
}

int32_t encode(const void* x, Dtype dtype, int64_t count, const Encoding& encoding, int8_t* out,
               int64_t step_stride) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float scaled = load_as_float(x, i, dtype) * encoding.inverse_scale;
    const float clamped = std::min(std::max(scaled, encoding.low), encoding.high);
    const auto code = static_cast<int32_t>(std::nearbyint(clamped));
    out[i / 64 * step_stride + i % 64] = static_cast<int8_t>(code);
    sum += code;
  }
  return sum;
}

void to_float(const void* x, Dtype dtype, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = load_as_float(x, i, dtype);
}

}  // namespace

const QuantizerOps& quantizer_ops_scalar() {
  static constexpr QuantizerOps ops = {range, encode, to_float};
  return ops;
}

}  // namespace nibble
