// wgmma of 16-bit elements with float sums, for attention; the rest is in wgmma.h. Source: PTX ISA,
// "wgmma". Instructions of sm_90a that have no function in CUDA C++.
//
//   D[64][N] (+)= A[64][16] * B[16][N]
//
// Thread 4 r + c of warp w holds D rows 16 w + r and 16 w + r + 8; sum 4 j + 2 h + i is row
// 16 w + r + 8 h, column 8 j + 2 c + i. A in registers: four words as of mma.m16n8k16.
//
// Shared memory operands lie in slices of 64 elements: rows of 128 bytes with the 128-byte swizzle
// (16-byte piece p of row t at p ^ (t % 8)), 8 rows = 1024 bytes, the slice 1024-byte aligned.
#pragma once

#include <cstdint>

namespace nibble::cuda {

/// Rows are rows of A or columns of B, and k runs along them: the next 16 k are 32 bytes further.
__device__ __forceinline__ uint64_t wgmma16_along_k(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kRowGroupStride = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kRowGroupStride | uint64_t{1} << 16 | address >> 4;
}
/// Rows are k, and the columns of B run along them, 64 to a slice, slices slice_bytes apart: the
/// next 16 k are 2048 bytes further.
__device__ __forceinline__ uint64_t wgmma16_across_k(uint32_t address, int slice_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kRowGroupStride = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kRowGroupStride | static_cast<uint64_t>(slice_bytes >> 4) << 16 |
         address >> 4;
}

// One overload per shape that a kernel uses; keep = false overwrites the sums. The asm text is
// written once per shape; NIBBLE_TYPE is the element type.
#define NIBBLE_C(i) "+f"(c[i])

/// A and B in shared memory, both along k.
template <bool bf16>
__device__ __forceinline__ void wgmma16(float (&c)[32], uint64_t a, uint64_t b, bool keep) {
#define NIBBLE_WGMMA(type) \
  asm volatile( \
      "{ .reg .pred p; setp.ne.b32 p, %34, 0;" \
      " wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, " \
      "%8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, " \
      "%24, %25, %26, %27, %28, %29, %30, %31" \
      "}, %32, %33, p, 1, 1, 0, 0; }" \
      : \
        NIBBLE_C(0), NIBBLE_C(1), NIBBLE_C(2), NIBBLE_C(3), \
        NIBBLE_C(4), NIBBLE_C(5), NIBBLE_C(6), NIBBLE_C(7), \
        NIBBLE_C(8), NIBBLE_C(9), NIBBLE_C(10), NIBBLE_C(11), \
        NIBBLE_C(12), NIBBLE_C(13), NIBBLE_C(14), NIBBLE_C(15), \
        NIBBLE_C(16), NIBBLE_C(17), NIBBLE_C(18), NIBBLE_C(19), \
        NIBBLE_C(20), NIBBLE_C(21), NIBBLE_C(22), NIBBLE_C(23), \
        NIBBLE_C(24), NIBBLE_C(25), NIBBLE_C(26), NIBBLE_C(27), \
        NIBBLE_C(28), NIBBLE_C(29), NIBBLE_C(30), NIBBLE_C(31) \
      : "l"(a), "l"(b), "r"(int{keep}))
  if constexpr (bf16) {
    NIBBLE_WGMMA("bf16");
  } else {
    NIBBLE_WGMMA("f16");
  }
#undef NIBBLE_WGMMA
}

/// A and B in shared memory, both along k.
template <bool bf16>
__device__ __forceinline__ void wgmma16(float (&c)[64], uint64_t a, uint64_t b, bool keep) {
#define NIBBLE_WGMMA(type) \
  asm volatile( \
      "{ .reg .pred p; setp.ne.b32 p, %66, 0;" \
      " wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, " \
      "%8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, " \
      "%24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, " \
      "%40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, " \
      "%56, %57, %58, %59, %60, %61, %62, %63" \
      "}, %64, %65, p, 1, 1, 0, 0; }" \
      : \
        NIBBLE_C(0), NIBBLE_C(1), NIBBLE_C(2), NIBBLE_C(3), \
        NIBBLE_C(4), NIBBLE_C(5), NIBBLE_C(6), NIBBLE_C(7), \
        NIBBLE_C(8), NIBBLE_C(9), NIBBLE_C(10), NIBBLE_C(11), \
        NIBBLE_C(12), NIBBLE_C(13), NIBBLE_C(14), NIBBLE_C(15), \
        NIBBLE_C(16), NIBBLE_C(17), NIBBLE_C(18), NIBBLE_C(19), \
        NIBBLE_C(20), NIBBLE_C(21), NIBBLE_C(22), NIBBLE_C(23), \
        NIBBLE_C(24), NIBBLE_C(25), NIBBLE_C(26), NIBBLE_C(27), \
        NIBBLE_C(28), NIBBLE_C(29), NIBBLE_C(30), NIBBLE_C(31), \
        NIBBLE_C(32), NIBBLE_C(33), NIBBLE_C(34), NIBBLE_C(35), \
        NIBBLE_C(36), NIBBLE_C(37), NIBBLE_C(38), NIBBLE_C(39), \
        NIBBLE_C(40), NIBBLE_C(41), NIBBLE_C(42), NIBBLE_C(43), \
        NIBBLE_C(44), NIBBLE_C(45), NIBBLE_C(46), NIBBLE_C(47), \
        NIBBLE_C(48), NIBBLE_C(49), NIBBLE_C(50), NIBBLE_C(51), \
        NIBBLE_C(52), NIBBLE_C(53), NIBBLE_C(54), NIBBLE_C(55), \
        NIBBLE_C(56), NIBBLE_C(57), NIBBLE_C(58), NIBBLE_C(59), \
        NIBBLE_C(60), NIBBLE_C(61), NIBBLE_C(62), NIBBLE_C(63) \
      : "l"(a), "l"(b), "r"(int{keep}))
  if constexpr (bf16) {
    NIBBLE_WGMMA("bf16");
  } else {
    NIBBLE_WGMMA("f16");
  }
#undef NIBBLE_WGMMA
}

/// A in registers, B in shared memory across k.
template <bool bf16>
__device__ __forceinline__ void wgmma16(float (&c)[32], const uint32_t (&a)[4], uint64_t b,
                                        bool keep) {
#define NIBBLE_WGMMA(type) \
  asm volatile( \
      "{ .reg .pred p; setp.ne.b32 p, %37, 0;" \
      " wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, " \
      "%8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, " \
      "%24, %25, %26, %27, %28, %29, %30, %31" \
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1; }" \
      : \
        NIBBLE_C(0), NIBBLE_C(1), NIBBLE_C(2), NIBBLE_C(3), \
        NIBBLE_C(4), NIBBLE_C(5), NIBBLE_C(6), NIBBLE_C(7), \
        NIBBLE_C(8), NIBBLE_C(9), NIBBLE_C(10), NIBBLE_C(11), \
        NIBBLE_C(12), NIBBLE_C(13), NIBBLE_C(14), NIBBLE_C(15), \
        NIBBLE_C(16), NIBBLE_C(17), NIBBLE_C(18), NIBBLE_C(19), \
        NIBBLE_C(20), NIBBLE_C(21), NIBBLE_C(22), NIBBLE_C(23), \
        NIBBLE_C(24), NIBBLE_C(25), NIBBLE_C(26), NIBBLE_C(27), \
        NIBBLE_C(28), NIBBLE_C(29), NIBBLE_C(30), NIBBLE_C(31) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}))
  if constexpr (bf16) {
    NIBBLE_WGMMA("bf16");
  } else {
    NIBBLE_WGMMA("f16");
  }
#undef NIBBLE_WGMMA
}

/// A in registers, B in shared memory across k.
template <bool bf16>
__device__ __forceinline__ void wgmma16(float (&c)[64], const uint32_t (&a)[4], uint64_t b,
                                        bool keep) {
#define NIBBLE_WGMMA(type) \
  asm volatile( \
      "{ .reg .pred p; setp.ne.b32 p, %69, 0;" \
      " wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, " \
      "%8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, " \
      "%24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, " \
      "%40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, " \
      "%56, %57, %58, %59, %60, %61, %62, %63" \
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1; }" \
      : \
        NIBBLE_C(0), NIBBLE_C(1), NIBBLE_C(2), NIBBLE_C(3), \
        NIBBLE_C(4), NIBBLE_C(5), NIBBLE_C(6), NIBBLE_C(7), \
        NIBBLE_C(8), NIBBLE_C(9), NIBBLE_C(10), NIBBLE_C(11), \
        NIBBLE_C(12), NIBBLE_C(13), NIBBLE_C(14), NIBBLE_C(15), \
        NIBBLE_C(16), NIBBLE_C(17), NIBBLE_C(18), NIBBLE_C(19), \
        NIBBLE_C(20), NIBBLE_C(21), NIBBLE_C(22), NIBBLE_C(23), \
        NIBBLE_C(24), NIBBLE_C(25), NIBBLE_C(26), NIBBLE_C(27), \
        NIBBLE_C(28), NIBBLE_C(29), NIBBLE_C(30), NIBBLE_C(31), \
        NIBBLE_C(32), NIBBLE_C(33), NIBBLE_C(34), NIBBLE_C(35), \
        NIBBLE_C(36), NIBBLE_C(37), NIBBLE_C(38), NIBBLE_C(39), \
        NIBBLE_C(40), NIBBLE_C(41), NIBBLE_C(42), NIBBLE_C(43), \
        NIBBLE_C(44), NIBBLE_C(45), NIBBLE_C(46), NIBBLE_C(47), \
        NIBBLE_C(48), NIBBLE_C(49), NIBBLE_C(50), NIBBLE_C(51), \
        NIBBLE_C(52), NIBBLE_C(53), NIBBLE_C(54), NIBBLE_C(55), \
        NIBBLE_C(56), NIBBLE_C(57), NIBBLE_C(58), NIBBLE_C(59), \
        NIBBLE_C(60), NIBBLE_C(61), NIBBLE_C(62), NIBBLE_C(63) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}))
  if constexpr (bf16) {
    NIBBLE_WGMMA("bf16");
  } else {
    NIBBLE_WGMMA("f16");
  }
#undef NIBBLE_WGMMA
}

/// A in registers, B in shared memory across k.
template <bool bf16>
__device__ __forceinline__ void wgmma16(float (&c)[96], const uint32_t (&a)[4], uint64_t b,
                                        bool keep) {
#define NIBBLE_WGMMA(type) \
  asm volatile( \
      "{ .reg .pred p; setp.ne.b32 p, %101, 0;" \
      " wgmma.mma_async.sync.aligned.m64n192k16.f32." type "." type " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, " \
      "%8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, " \
      "%24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, " \
      "%40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, " \
      "%56, %57, %58, %59, %60, %61, %62, %63, " \
      "%64, %65, %66, %67, %68, %69, %70, %71, " \
      "%72, %73, %74, %75, %76, %77, %78, %79, " \
      "%80, %81, %82, %83, %84, %85, %86, %87, " \
      "%88, %89, %90, %91, %92, %93, %94, %95" \
      "}, {%96, %97, %98, %99}, %100, p, 1, 1, 1; }" \
      : \
        NIBBLE_C(0), NIBBLE_C(1), NIBBLE_C(2), NIBBLE_C(3), \
        NIBBLE_C(4), NIBBLE_C(5), NIBBLE_C(6), NIBBLE_C(7), \
        NIBBLE_C(8), NIBBLE_C(9), NIBBLE_C(10), NIBBLE_C(11), \
        NIBBLE_C(12), NIBBLE_C(13), NIBBLE_C(14), NIBBLE_C(15), \
        NIBBLE_C(16), NIBBLE_C(17), NIBBLE_C(18), NIBBLE_C(19), \
        NIBBLE_C(20), NIBBLE_C(21), NIBBLE_C(22), NIBBLE_C(23), \
        NIBBLE_C(24), NIBBLE_C(25), NIBBLE_C(26), NIBBLE_C(27), \
        NIBBLE_C(28), NIBBLE_C(29), NIBBLE_C(30), NIBBLE_C(31), \
        NIBBLE_C(32), NIBBLE_C(33), NIBBLE_C(34), NIBBLE_C(35), \
        NIBBLE_C(36), NIBBLE_C(37), NIBBLE_C(38), NIBBLE_C(39), \
        NIBBLE_C(40), NIBBLE_C(41), NIBBLE_C(42), NIBBLE_C(43), \
        NIBBLE_C(44), NIBBLE_C(45), NIBBLE_C(46), NIBBLE_C(47), \
        NIBBLE_C(48), NIBBLE_C(49), NIBBLE_C(50), NIBBLE_C(51), \
        NIBBLE_C(52), NIBBLE_C(53), NIBBLE_C(54), NIBBLE_C(55), \
        NIBBLE_C(56), NIBBLE_C(57), NIBBLE_C(58), NIBBLE_C(59), \
        NIBBLE_C(60), NIBBLE_C(61), NIBBLE_C(62), NIBBLE_C(63), \
        NIBBLE_C(64), NIBBLE_C(65), NIBBLE_C(66), NIBBLE_C(67), \
        NIBBLE_C(68), NIBBLE_C(69), NIBBLE_C(70), NIBBLE_C(71), \
        NIBBLE_C(72), NIBBLE_C(73), NIBBLE_C(74), NIBBLE_C(75), \
        NIBBLE_C(76), NIBBLE_C(77), NIBBLE_C(78), NIBBLE_C(79), \
        NIBBLE_C(80), NIBBLE_C(81), NIBBLE_C(82), NIBBLE_C(83), \
        NIBBLE_C(84), NIBBLE_C(85), NIBBLE_C(86), NIBBLE_C(87), \
        NIBBLE_C(88), NIBBLE_C(89), NIBBLE_C(90), NIBBLE_C(91), \
        NIBBLE_C(92), NIBBLE_C(93), NIBBLE_C(94), NIBBLE_C(95) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}))
  if constexpr (bf16) {
    NIBBLE_WGMMA("bf16");
  } else {
    NIBBLE_WGMMA("f16");
  }
#undef NIBBLE_WGMMA
}

/// A in registers, B in shared memory across k.
template <bool bf16>
__device__ __forceinline__ void wgmma16(float (&c)[128], const uint32_t (&a)[4], uint64_t b,
                                        bool keep) {
#define NIBBLE_WGMMA(type) \
  asm volatile( \
      "{ .reg .pred p; setp.ne.b32 p, %133, 0;" \
      " wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, " \
      "%8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, " \
      "%24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, " \
      "%40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, " \
      "%56, %57, %58, %59, %60, %61, %62, %63, " \
      "%64, %65, %66, %67, %68, %69, %70, %71, " \
      "%72, %73, %74, %75, %76, %77, %78, %79, " \
      "%80, %81, %82, %83, %84, %85, %86, %87, " \
      "%88, %89, %90, %91, %92, %93, %94, %95, " \
      "%96, %97, %98, %99, %100, %101, %102, %103, " \
      "%104, %105, %106, %107, %108, %109, %110, %111, " \
      "%112, %113, %114, %115, %116, %117, %118, %119, " \
      "%120, %121, %122, %123, %124, %125, %126, %127" \
      "}, {%128, %129, %130, %131}, %132, p, 1, 1, 1; }" \
      : \
        NIBBLE_C(0), NIBBLE_C(1), NIBBLE_C(2), NIBBLE_C(3), \
        NIBBLE_C(4), NIBBLE_C(5), NIBBLE_C(6), NIBBLE_C(7), \
        NIBBLE_C(8), NIBBLE_C(9), NIBBLE_C(10), NIBBLE_C(11), \
        NIBBLE_C(12), NIBBLE_C(13), NIBBLE_C(14), NIBBLE_C(15), \
        NIBBLE_C(16), NIBBLE_C(17), NIBBLE_C(18), NIBBLE_C(19), \
        NIBBLE_C(20), NIBBLE_C(21), NIBBLE_C(22), NIBBLE_C(23), \
        NIBBLE_C(24), NIBBLE_C(25), NIBBLE_C(26), NIBBLE_C(27), \
        NIBBLE_C(28), NIBBLE_C(29), NIBBLE_C(30), NIBBLE_C(31), \
        NIBBLE_C(32), NIBBLE_C(33), NIBBLE_C(34), NIBBLE_C(35), \
        NIBBLE_C(36), NIBBLE_C(37), NIBBLE_C(38), NIBBLE_C(39), \
        NIBBLE_C(40), NIBBLE_C(41), NIBBLE_C(42), NIBBLE_C(43), \
        NIBBLE_C(44), NIBBLE_C(45), NIBBLE_C(46), NIBBLE_C(47), \
        NIBBLE_C(48), NIBBLE_C(49), NIBBLE_C(50), NIBBLE_C(51), \
        NIBBLE_C(52), NIBBLE_C(53), NIBBLE_C(54), NIBBLE_C(55), \
        NIBBLE_C(56), NIBBLE_C(57), NIBBLE_C(58), NIBBLE_C(59), \
        NIBBLE_C(60), NIBBLE_C(61), NIBBLE_C(62), NIBBLE_C(63), \
        NIBBLE_C(64), NIBBLE_C(65), NIBBLE_C(66), NIBBLE_C(67), \
        NIBBLE_C(68), NIBBLE_C(69), NIBBLE_C(70), NIBBLE_C(71), \
        NIBBLE_C(72), NIBBLE_C(73), NIBBLE_C(74), NIBBLE_C(75), \
        NIBBLE_C(76), NIBBLE_C(77), NIBBLE_C(78), NIBBLE_C(79), \
        NIBBLE_C(80), NIBBLE_C(81), NIBBLE_C(82), NIBBLE_C(83), \
        NIBBLE_C(84), NIBBLE_C(85), NIBBLE_C(86), NIBBLE_C(87), \
        NIBBLE_C(88), NIBBLE_C(89), NIBBLE_C(90), NIBBLE_C(91), \
        NIBBLE_C(92), NIBBLE_C(93), NIBBLE_C(94), NIBBLE_C(95), \
        NIBBLE_C(96), NIBBLE_C(97), NIBBLE_C(98), NIBBLE_C(99), \
        NIBBLE_C(100), NIBBLE_C(101), NIBBLE_C(102), NIBBLE_C(103), \
        NIBBLE_C(104), NIBBLE_C(105), NIBBLE_C(106), NIBBLE_C(107), \
        NIBBLE_C(108), NIBBLE_C(109), NIBBLE_C(110), NIBBLE_C(111), \
        NIBBLE_C(112), NIBBLE_C(113), NIBBLE_C(114), NIBBLE_C(115), \
        NIBBLE_C(116), NIBBLE_C(117), NIBBLE_C(118), NIBBLE_C(119), \
        NIBBLE_C(120), NIBBLE_C(121), NIBBLE_C(122), NIBBLE_C(123), \
        NIBBLE_C(124), NIBBLE_C(125), NIBBLE_C(126), NIBBLE_C(127) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{keep}))
  if constexpr (bf16) {
    NIBBLE_WGMMA("bf16");
  } else {
    NIBBLE_WGMMA("f16");
  }
#undef NIBBLE_WGMMA
}
#undef NIBBLE_C

}  // namespace nibble::cuda
