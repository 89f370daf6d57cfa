// mma.sync on 4-bit operands: one instruction on 8.0 to 8.9, emulated with int8 from 9.0 on.
// Source: PTX ISA, "Matrix Fragments for mma.m16n8k64". Device code only.
#pragma once

#include <cstdint>

namespace nibble::cuda::ptx {

/// d += A * B, A (16 x 64) u4, B (64 x 8) s4. With lane = 4 r + c: a.x holds row r, k 8 c .. 8 c +
/// 7 from the lowest nibble on; a.y row r + 8; a.z row r, k 32 + 8 c ..; a.w row r + 8; b0, b1
/// column r, the same k; d row r, columns 2 c and 2 c + 1, then row r + 8.
__device__ __forceinline__ void mma_u4s4(int (&d)[4], uint4 a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k64.row.col.s32.u4.s4.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

/// The same with B of u4.
__device__ __forceinline__ void mma_u4u4(int (&d)[4], uint4 a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k64.row.col.s32.u4.u4.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

}  // namespace nibble::cuda::ptx
