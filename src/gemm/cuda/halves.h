// Weights as 16-bit floats: q - z, which f16 and bf16 hold exactly, for the products of w4a16.
// Device code only.
//
// Products of 16 k come in pairs: a step of packed.h, 32 k, is two of them. Of lane 4 r + c, whose
// eight k of a step are 8 c .. 8 c + 7, product i (0, 1) takes k 4 i .. 4 i + 3: codes leave a word
// of packed.h as the pairs (0, 2) and (1, 3) of these, so activations are paired like that too.
#pragma once

#include "gemm/cuda/kernels.h"
#include "gemm/cuda/packed.h"
#include "gemm/cuda/ptx.h"

namespace nibble::cuda {

/// Codes of one column to pairs of 16-bit floats. A code is put into the low bits of a number so
/// large that they count ones, and what that is too large is taken off again: no step rounds.
template <Element type>
struct HalfExpander {
  static constexpr bool kF16 = type == Element::f16;
  static constexpr uint32_t kLarge = kF16 ? 0x64006400u : 0x43004300u;  // 1024; 128
  uint32_t low, high;  // minus (1024 + z), minus (64 + z); bf16: both minus (128 + z)

  HalfExpander() = default;
  __device__ __forceinline__ explicit HalfExpander(uint32_t zero) {
    if constexpr (kF16) {
      low = (0xe400u + zero) * 0x10001u;          // ulp 1 at 1024
      high = (0xd400u + (zero << 4)) * 0x10001u;  // ulp 1/16 at 64
    } else {
      low = high = (0xc300u + zero) * 0x10001u;  // ulp 1 at 128
    }
  }

  /// Of the low nibbles of bytes 0 and 2 of w.
  __device__ __forceinline__ uint32_t low_pair(uint32_t w) const {
    return sum(ptx::and_or(w, 0x000f000fu, kLarge), low);
  }
  /// Of the high nibbles of bytes 0 and 2. In f16 they stay where they are, 16 times as large.
  __device__ __forceinline__ uint32_t high_pair(uint32_t w) const {
    if constexpr (kF16) {
      return ptx::fma_f16x2(ptx::and_or(w, 0x00f000f0u, kLarge), 0x2c002c00u, high);  // 1/16
    } else {
      return low_pair(w >> 4);
    }
  }

 private:
  __device__ __forceinline__ static uint32_t sum(uint32_t a, uint32_t b) {
    if constexpr (kF16) return ptx::fma_f16x2(a, 0x3c003c00u, b);
    return ptx::fma_bf16x2(a, 0x3f803f80u, b);
  }
};

/// Operand A of the two products of step 2 h (`odd` false) or 2 h + 1: `codes` are a lane's 16
/// bytes of half h; r, r8 the expanders of its columns.
template <bool odd, Element type>
__device__ __forceinline__ void expand_step(const uint4& codes, const HalfExpander<type>& r,
                                            const HalfExpander<type>& r8, uint32_t (&a)[2][4]) {
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const uint32_t w = words[2 * i] >> (8 * pair), w8 = words[2 * i + 1] >> (8 * pair);
      a[i][2 * pair] = odd ? r.high_pair(w) : r.low_pair(w);
      a[i][2 * pair + 1] = odd ? r8.high_pair(w8) : r8.low_pair(w8);
    }
  }
}

/// Operand B of the two products of a step: a lane's eight activations, in order of k, as pairs
/// (0, 2), (1, 3) of each four.
__device__ __forceinline__ uint4 pair_activations(uint4 x) {
  return {__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.x, x.y, 0x7632),
          __byte_perm(x.z, x.w, 0x5410), __byte_perm(x.z, x.w, 0x7632)};
}

/// Lane c of four has the pairs of its eight k for each place of (i, h), in a word each; afterwards
/// it has all four lanes' pairs of place c. For all lanes of a warp.
__device__ __forceinline__ uint4 transpose_quad(uint4 w, int lane) {
  const bool odd = lane & 1, upper = lane & 2;
  const uint32_t p = __shfl_xor_sync(~0u, odd ? w.x : w.y, 1);
  const uint32_t q = __shfl_xor_sync(~0u, odd ? w.z : w.w, 1);
  const uint4 v = odd ? make_uint4(p, w.y, q, w.w) : make_uint4(w.x, p, w.z, q);
  const uint32_t r = __shfl_xor_sync(~0u, upper ? v.x : v.z, 2);
  const uint32_t s = __shfl_xor_sync(~0u, upper ? v.y : v.w, 2);
  return upper ? make_uint4(r, s, v.z, v.w) : make_uint4(v.x, v.y, r, s);
}

template <Element type>
__device__ __forceinline__ void mma_halves(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                           uint32_t b1) {
  if constexpr (type == Element::f16) {
    ptx::mma_f16(d, a, b0, b1);
  } else {
    ptx::mma_bf16(d, a, b0, b1);
  }
}

}  // namespace nibble::cuda
