// wgmma on f16 and bf16 with weights as A in registers, tokens in shared memory as B, float sums:
//
//   D[64][N] (+)= A[64][16] * B[N][16]^T
//
// A: four words as of mma.m16n8k16. B and D as in wgmma.h, rows of 128 bytes being 64 k: the next
// 16 k are 2 more in the descriptor.
#pragma once

#include <cstdint>

#include "gemm/cuda/kernels.h"

namespace nibble::cuda {

#define NIBBLE_C(i) "+f"(c[i])
#define NIBBLE_C8(i)                                                               \
  NIBBLE_C(i), NIBBLE_C(i + 1), NIBBLE_C(i + 2), NIBBLE_C(i + 3), NIBBLE_C(i + 4), \
      NIBBLE_C(i + 5), NIBBLE_C(i + 6), NIBBLE_C(i + 7)

#define NIBBLE_WGMMA_32(types)                                                    \
  asm volatile(                                                                   \
      "{ .reg .pred p; setp.ne.b32 p, %21, 0;"                                    \
      " wgmma.mma_async.sync.aligned.m64n32k16.f32." types                        \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, " \
      "{%16, %17, %18, %19}, %20, p, 1, 1, 0; }"                                  \
      : NIBBLE_C8(0), NIBBLE_C8(8)                                                \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}))

#define NIBBLE_WGMMA_64(types)                                                            \
  asm volatile(                                                                           \
      "{ .reg .pred p; setp.ne.b32 p, %37, 0;"                                            \
      " wgmma.mma_async.sync.aligned.m64n64k16.f32." types                                \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " \
      "{%32, %33, %34, %35}, %36, p, 1, 1, 0; }"                                          \
      : NIBBLE_C8(0), NIBBLE_C8(8), NIBBLE_C8(16), NIBBLE_C8(24)                          \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}))

#define NIBBLE_WGMMA_128(types)                                                                 \
  asm volatile(                                                                                 \
      "{ .reg .pred p; setp.ne.b32 p, %69, 0;"                                                  \
      " wgmma.mma_async.sync.aligned.m64n128k16.f32." types                                     \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "        \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "        \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "       \
      "{%64, %65, %66, %67}, %68, p, 1, 1, 0; }"                                                \
      : NIBBLE_C8(0), NIBBLE_C8(8), NIBBLE_C8(16), NIBBLE_C8(24), NIBBLE_C8(32), NIBBLE_C8(40), \
        NIBBLE_C8(48), NIBBLE_C8(56)                                                            \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}))

/// keep = false overwrites the accumulators.
template <Element type>
__device__ __forceinline__ void wgmma_halves(float (&c)[16], const uint32_t (&a)[4], uint64_t b,
                                             bool keep) {
  if constexpr (type == Element::f16) {
    NIBBLE_WGMMA_32("f16.f16");
  } else {
    NIBBLE_WGMMA_32("bf16.bf16");
  }
}
template <Element type>
__device__ __forceinline__ void wgmma_halves(float (&c)[32], const uint32_t (&a)[4], uint64_t b,
                                             bool keep) {
  if constexpr (type == Element::f16) {
    NIBBLE_WGMMA_64("f16.f16");
  } else {
    NIBBLE_WGMMA_64("bf16.bf16");
  }
}
template <Element type>
__device__ __forceinline__ void wgmma_halves(float (&c)[64], const uint32_t (&a)[4], uint64_t b,
                                             bool keep) {
  if constexpr (type == Element::f16) {
    NIBBLE_WGMMA_128("f16.f16");
  } else {
    NIBBLE_WGMMA_128("bf16.bf16");
  }
}
#undef NIBBLE_WGMMA_128
#undef NIBBLE_WGMMA_64
#undef NIBBLE_WGMMA_32
#undef NIBBLE_C8
#undef NIBBLE_C

}  // namespace nibble::cuda
