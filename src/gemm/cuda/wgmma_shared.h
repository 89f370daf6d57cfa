// wgmma with weights as A and tokens as B, both in shared memory as wgmma_operand() of wgmma.h
// says: instructions of sm_90a that have no function in CUDA C++. Source: PTX ISA, "wgmma".
//
//   D[64][N] (+)= A[64][k] * B[N][k]^T      k: 32 bytes of each row of 128; N: twice the sums
//
// Accumulators lie as wgmma.h says; keep = false overwrites them. The next k are 2 more in both
// descriptors.
#pragma once

#include <cstdint>

#include "gemm/cuda/kernels.h"
#include "gemm/cuda/wgmma_operands.h"

namespace nibble::cuda {

#define NIBBLE_INT(element) "+r"(element)
#define NIBBLE_FLOAT(element) "+f"(element)
// count: of sums, twice: as digits for the lists, and in keep, a, b as the operands that follow.
// shape, types: "m64n..k.." and those of D, A and B; rest: factors and, of 16 bits, layouts.
#define NIBBLE_WGMMA(count, a_operand, b_operand, keep_operand, shape, types, element, rest) \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " keep_operand                                \
               ", 0;"                                                                        \
               " wgmma.mma_async.sync.aligned." shape "." types " {" NIBBLE_N##count         \
               "}, " a_operand ", " b_operand ", p" rest "; }"                               \
               : NIBBLE_C##count(element)                                                    \
               : "l"(a), "l"(b), "r"(int{keep}))
#define NIBBLE_WGMMA_48(...) NIBBLE_WGMMA(48, "%48", "%49", "%50", __VA_ARGS__)
#define NIBBLE_WGMMA_64(...) NIBBLE_WGMMA(64, "%64", "%65", "%66", __VA_ARGS__)
#define NIBBLE_WGMMA_88(...) NIBBLE_WGMMA(88, "%88", "%89", "%90", __VA_ARGS__)
#define NIBBLE_WGMMA_96(...) NIBBLE_WGMMA(96, "%96", "%97", "%98", __VA_ARGS__)

// What a kernel multiplies: the type of the sums, and how many stages of 128 bytes 128 k take.

struct Int8Products {
  using Sum = int;
  static constexpr int kSpan = 1;
  __device__ __forceinline__ static void multiply(int (&c)[48], uint64_t a, uint64_t b, bool keep) {
    NIBBLE_WGMMA_48("m64n96k32", "s32.s8.s8", NIBBLE_INT, "");
  }
};

struct E4m3Products {
  using Sum = float;
  static constexpr int kSpan = 1;
  __device__ __forceinline__ static void multiply(float (&c)[64], uint64_t a, uint64_t b,
                                                  bool keep) {
    NIBBLE_WGMMA_64("m64n128k32", "f32.e4m3.e4m3", NIBBLE_FLOAT, ", 1, 1");
  }
  __device__ __forceinline__ static void multiply(float (&c)[88], uint64_t a, uint64_t b,
                                                  bool keep) {
    NIBBLE_WGMMA_88("m64n176k32", "f32.e4m3.e4m3", NIBBLE_FLOAT, ", 1, 1");
  }
  __device__ __forceinline__ static void multiply(float (&c)[96], uint64_t a, uint64_t b,
                                                  bool keep) {
    NIBBLE_WGMMA_96("m64n192k32", "f32.e4m3.e4m3", NIBBLE_FLOAT, ", 1, 1");
  }
};

/// f16 or bf16.
template <Element type>
struct HalfProducts {
  using Sum = float;
  static constexpr int kSpan = 2;
  __device__ __forceinline__ static void multiply(float (&c)[64], uint64_t a, uint64_t b,
                                                  bool keep) {
    if constexpr (type == Element::f16) {
      NIBBLE_WGMMA_64("m64n128k16", "f32.f16.f16", NIBBLE_FLOAT, ", 1, 1, 0, 0");
    } else {
      NIBBLE_WGMMA_64("m64n128k16", "f32.bf16.bf16", NIBBLE_FLOAT, ", 1, 1, 0, 0");
    }
  }
};
#undef NIBBLE_WGMMA_96
#undef NIBBLE_WGMMA_88
#undef NIBBLE_WGMMA_64
#undef NIBBLE_WGMMA_48
#undef NIBBLE_WGMMA
#undef NIBBLE_FLOAT
#undef NIBBLE_INT

}  // namespace nibble::cuda
