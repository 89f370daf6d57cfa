// Element types of tensors in files and of activations in memory.
#pragma once

#include <cstdint>
#include <cstring>

#include "base/half.h"

namespace nibble {

/// Activation and scale types. Values equal nibble_dtype in include/nibble.h.
enum class Dtype : int { f32 = 0, f16 = 1, bf16 = 2 };

inline int dtype_bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

inline const char* dtype_name(Dtype dtype) {
  switch (dtype) {
    case Dtype::f32: return "f32";
    case Dtype::f16: return "f16";
    case Dtype::bf16: return "bf16";
  }
  return "?";
}

/// Element `index` of an array of `dtype` at `data` (any alignment), exactly as float.
inline float load_as_float(const void* data, int64_t index, Dtype dtype) {
  const auto* bytes = static_cast<const unsigned char*>(data) + index * dtype_bytes(dtype);
  if (dtype == Dtype::f32) {
    float value;
    std::memcpy(&value, bytes, sizeof value);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, bytes, sizeof bits);
  return dtype == Dtype::f16 ? float_from_f16(bits) : float_from_bf16(bits);
}

/// Stores `value` rounded half to even as element `index` of an array of `dtype` at `data`.
inline void store_from_float(void* data, int64_t index, Dtype dtype, float value) {
  auto* bytes = static_cast<unsigned char*>(data) + index * dtype_bytes(dtype);
  if (dtype == Dtype::f32) {
    std::memcpy(bytes, &value, sizeof value);
    return;
  }
  const uint16_t bits = dtype == Dtype::f16 ? f16_from_float(value) : bf16_from_float(value);
  std::memcpy(bytes, &bits, sizeof bits);
}

}  // namespace nibble
