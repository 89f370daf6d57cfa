// Weights as bytes: q - z of one column, as int8 or e4m3. Device code only.
#pragma once

#include <cstdint>

namespace nibble::cuda {

__device__ __forceinline__ uint32_t low_nibbles(uint32_t w) { return w & 0x0f0f0f0fu; }
__device__ __forceinline__ uint32_t high_nibbles(uint32_t w) {
  uint32_t masked;  // masked first: shift and add are then one instruction
  asm("and.b32 %0, %1, 0xf0f0f0f0;" : "=r"(masked) : "r"(w));
  return masked >> 4;
}

/// q - z as int8.
struct Int8Column {
  static constexpr float kUnit = 1;
  uint32_t lift;  // 0x80 - z in each byte

  __device__ __forceinline__ explicit Int8Column(uint32_t zero)
      : lift(0x80808080u - zero * 0x01010101u) {}
  /// Of four codes in bytes. No borrow leaves a byte: 0x80 + q - z is between 0x71 and 0x8f.
  __device__ __forceinline__ uint32_t operator()(uint32_t q) const {
    return (q + lift) ^ 0x80808080u;
  }
};

/// (q - z) / kUnit as e4m3: sign and magnitude, because e4m3 numbers below 2^-5 are their bits
/// times 2^-9, subnormal or not. The weights' scales make up for it.
struct E4m3Column {
  static constexpr float kUnit = 512;
  uint32_t zeros;

  __device__ __forceinline__ explicit E4m3Column(uint32_t zero) : zeros(zero * 0x01010101u) {}
  __device__ __forceinline__ uint32_t operator()(uint32_t q) const {
    const uint32_t lifted = q + (0x80808080u - zeros);  // as above: bit 7 is q >= z
    return __vabsdiffu4(q, zeros) | (~lifted & 0x80808080u);
  }
};

}  // namespace nibble::cuda
