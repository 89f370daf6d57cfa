// w4a8 and w4a4 with the VEX-encoded 256-bit VPDPBUSD of client CPUs without AVX-512.
#include "gemm/cpu/kernel.h"
#include "gemm/cpu/target.h"

#include <immintrin.h>

#include <cstring>
#include <type_traits>
#include <utility>

NIBBLE_TARGET_BEGIN("avx2,fma,f16c,avxvnni")
#include "gemm/cpu/ymm_tile.h"

namespace nibble {
namespace {

struct DotVnni {
  static constexpr int64_t kChunkQuads = int64_t{1} << 30;  // int32 never overflows: check_problem

  static __m256i start(__m256i codes, __m256i x) {
    __m256i sums = _mm256_setzero_si256();
    multiply(sums, codes, x);
    return sums;
  }
  // Inline assembly for the same reason as dot_u8s8 in avx512.h.
  static void multiply(__m256i& sums, __m256i codes, __m256i x) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(codes), "x"(x));
  }
  static __m256i drain(__m256i sums, __m256i part) { return _mm256_add_epi32(sums, part); }
};

}  // namespace

void run_w4a8_avxvnni(const GemmBlock& b) { run_ymm<DotVnni>(b); }

}  // namespace nibble
NIBBLE_TARGET_END
