// The arithmetic of drawing a token from a row of logits: integers, but for one power of two in
// plain float multiplications and additions, so the CPU and every GPU draw the same token from the
// same logits, in whatever order they add.
//
// A token's weight is 2^36 * exp((logit - largest) / temperature), rounded down: what is less
// likely than 2^-36 of the likeliest is not drawn. A row has fewer than 2^19 - 128 tokens, so that
// the sum of all weights, and sums of their halves (up to 2^18) over a 32nd of a row in 32 bits, do
// not overflow.
#pragma once

#include <bit>
#include <cstdint>

#include "base/host_device.h"

namespace nibble::sampling {

inline constexpr int kWeightBits = 36;
inline constexpr int64_t kMostTokens = (int64_t{1} << 19) - 128;

/// SamplerOptions as kernels read them. 24 bytes.
struct Rule {
  float factor = 0;               // log2(e) / temperature; 0: the largest logit
  int32_t top_k = 0;              // 0: all
  uint64_t top_p = ~uint64_t{0};  // of 2^64; all ones: all
  uint64_t seed = 0;
};

/// Larger for larger floats; the same for both zeros. Not for NaN.
NIBBLE_HOST_DEVICE inline uint32_t key_of(float logit) {
  const float v = logit + 0.0f;
#ifdef __CUDA_ARCH__
  const uint32_t bits = __float_as_uint(v);
#else
  const auto bits = std::bit_cast<uint32_t>(v);
#endif
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

/// A logit with this key.
NIBBLE_HOST_DEVICE inline float logit_of(uint32_t key) {
  const uint32_t bits = (key & 0x80000000u) != 0 ? key ^ 0x80000000u : ~key;
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}

NIBBLE_HOST_DEVICE inline uint64_t weight_of(float logit, float largest, float factor) {
  const float t = (logit - largest) * factor;  // <= 0
  if (!(t > -kWeightBits - 1.0f)) return 0;
  int whole = static_cast<int>(t);
  whole -= t < static_cast<float>(whole) ? 1 : 0;
  const float x = t - static_cast<float>(whole) - 0.5f;
  // Taylor's series of 2^(x + 1/2), |x| <= 1/2: off by 2e-7.
  float power = 2.1783882e-4f;
  power = power * x + 1.8856499e-3f;
  power = power * x + 1.3602089e-2f;
  power = power * x + 7.8494663e-2f;
  power = power * x + 3.3973158e-1f;
  power = power * x + 9.8025814e-1f;
  power = power * x + 1.4142135f;
  const auto fraction = static_cast<uint64_t>(power * 0x1p23f);
  const int shift = whole + kWeightBits - 23;
  return shift >= 0 ? fraction << shift : fraction >> -shift;
}

/// The sum that the likeliest tokens have to reach, of a total that is not 0.
NIBBLE_HOST_DEVICE inline uint64_t needed_of(uint64_t total, uint64_t top_p) {
  const uint64_t needed = multiply_high(total, top_p) + 1;
  return needed < total ? needed : total;
}

/// A number below `kept` for the token that gets this position: the generator SplitMix64 (Steele,
/// Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014), whose state is a
/// counter, from which the draw at any position follows.
NIBBLE_HOST_DEVICE inline uint64_t draw_below(uint64_t kept, uint64_t seed, int64_t position) {
  uint64_t z = seed + (static_cast<uint64_t>(position) + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return multiply_high(kept, z ^ (z >> 31));
}

/// Tokens that may be drawn: those with a larger key, and the first `ties` with this one.
struct Cut {
  uint32_t key = 0;
  uint32_t ties = 0;
};

}  // namespace nibble::sampling
