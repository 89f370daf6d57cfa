// w8a8 with AVX-512 VNNI: VPDPBUSD of weights + 128 (unsigned) and activations (signed); 128 times
// the sum of the activations is taken off the integer sum.
#include <immintrin.h>

#include <type_traits>
#include <utility>

#include "gemm/cpu/target.h"
#include "gemm/int8.h"

NIBBLE_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#include "gemm/cpu/avx512.h"
#include "gemm/cpu/unroll.h"

namespace nibble {
namespace {

constexpr int64_t kPrefetchBytes = 2048;

template <int kRows, int kBlocks>
void run_tile(const Int8Block& b, int64_t block, int64_t row) {
  const Int8Weights& w = *b.weights;
  const int64_t block_stride = w.quads * 64;
  const uint8_t* line = w.block(block);
  const int8_t* x = b.codes + row * b.code_stride;
  __m512i acc[kRows][kBlocks];
  unroll<kRows * kBlocks>([&](auto i) NIBBLE_INLINE {
    constexpr int r = i / kBlocks, j = i % kBlocks;
    acc[r][j] = _mm512_set1_epi32(-128 * b.sums[row + r]);
  });
  for (int64_t quad = 0; quad < w.quads; ++quad, line += 64, x += 4) {
    __m512i codes[kBlocks];
    unroll<kBlocks>([&](auto j) NIBBLE_INLINE {
      codes[j] = _mm512_load_si512(line + j * block_stride);
      _mm_prefetch(reinterpret_cast<const char*>(line + j * block_stride) + kPrefetchBytes,
                   _MM_HINT_T0);
    });
    unroll<kRows>([&](auto r) NIBBLE_INLINE {
      int32_t four;
      __builtin_memcpy(&four, x + r * b.code_stride, 4);
      const __m512i value = _mm512_set1_epi32(four);
      unroll<kBlocks>([&](auto j) NIBBLE_INLINE { dot_u8s8(acc[r][j], codes[j], value); });
    });
  }
  unroll<kBlocks>([&](auto j) NIBBLE_INLINE {
    const int64_t n0 = (block + j) * 16;
    const __m512 scales = _mm512_loadu_ps(&w.scales[static_cast<size_t>(n0)]);
    unroll<kRows>([&](auto r) NIBBLE_INLINE {
      const __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[r][j]), scales);
      _mm512_mask_storeu_ps(b.y + (row + r) * b.y_stride + n0, lanes_below(w.n - n0),
                            _mm512_mul_ps(sum, _mm512_set1_ps(b.scales[row + r])));
    });
  });
}

template <int kBlocks>
void run_rows(const Int8Block& b, int64_t block) {
  int64_t row = 0;
  for (; b.rows - row >= 8; row += 8) run_tile<8, kBlocks>(b, block, row);
  for (; b.rows - row >= 4; row += 4) run_tile<4, kBlocks>(b, block, row);
  for (; b.rows - row >= 2; row += 2) run_tile<2, kBlocks>(b, block, row);
  for (; row < b.rows; ++row) run_tile<1, kBlocks>(b, block, row);
}

}  // namespace

void run_w8a8_avx512vnni(const Int8Block& b) {
  int64_t block = b.block0;
  if (b.rows < 8) {
    for (; b.block1 - block >= 4; block += 4) run_rows<4>(b, block);
  }
  for (; b.block1 - block >= 2; block += 2) run_rows<2>(b, block);
  for (; block < b.block1; ++block) run_rows<1>(b, block);
}

}  // namespace nibble
NIBBLE_TARGET_END
