// w4a16 with AVX-512: float activations, codes to float by a 16-entry table lookup that reads only
// the low 4 bits of its index, so no mask is needed after the shift.
#include "gemm/cpu/kernel.h"
#include "gemm/cpu/target.h"

#include <immintrin.h>

#include <cstring>
#include <type_traits>
#include <utility>

NIBBLE_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "gemm/cpu/avx512.h"
#include "gemm/cpu/unroll.h"

namespace nibble {
namespace {

constexpr int64_t kPrefetchBytes = 3072;

/// float(q - z) of k number `i` of a quad; half 0 is the low nibbles. Exact.
template <int i>
inline __m512 weight(__m512i codes, int half, __m512 table, __m512 zeros) {
  const __m512i index =
      half == 0 ? _mm512_srli_epi32(codes, 8 * i) : _mm512_srli_epi32(codes, 8 * i + 4);
  return _mm512_sub_ps(_mm512_permutexvar_ps(index, table), zeros);
}

/// One group: products along it from 0, then acc = fma(products, s, acc).
template <int kRows, int kBlocks>
[[gnu::always_inline]] inline void run_group(const GemmBlock& b, int64_t block, int64_t row,
                                             int64_t group, __m512 (&acc)[kRows][kBlocks][2]) {
  const PackedWeights& w = *b.weights;
  const float* x = b.activations.floats + row * w.k + group * w.group_size;
  const uint8_t* line = w.codes(block) + group * w.quads * kLineBytes;
  const int64_t block_stride = w.block_bytes();
  const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512 zeros[kBlocks][2], products[kRows][kBlocks][2];
  unroll<kBlocks * 2>([&](auto v) NIBBLE_INLINE {
    constexpr int j = v / 2, half = v % 2;
    const uint8_t* from = w.zeros(block + j) + group * kBlockColumns + half * 16;
    zeros[j][half] = _mm512_cvtepi32_ps(load_zeros(from));
    unroll<kRows>([&](auto r) NIBBLE_INLINE { products[r][j][half] = _mm512_setzero_ps(); });
  });
  for (int64_t in_group = 0; in_group < w.group_size; in_group += 4, line += kLineBytes, x += 4) {
    const int64_t left = w.group_size - in_group;  // the padding of a group has no x
    unroll<kBlocks>([&](auto j) NIBBLE_INLINE {
      const uint8_t* from = line + j * block_stride;
      const __m512i codes = _mm512_loadu_si512(from);
      _mm_prefetch(reinterpret_cast<const char*>(from) + kPrefetchBytes, _MM_HINT_T0);
      unroll<4>([&](auto i) NIBBLE_INLINE {
        if (i >= left) return;
        const __m512 low = weight<i>(codes, 0, table, zeros[j][0]);
        const __m512 high = weight<i>(codes, 1, table, zeros[j][1]);
        unroll<kRows>([&](auto r) NIBBLE_INLINE {
          const __m512 value = _mm512_set1_ps(x[r * w.k + i]);
          products[r][j][0] = _mm512_fmadd_ps(value, low, products[r][j][0]);
          products[r][j][1] = _mm512_fmadd_ps(value, high, products[r][j][1]);
        });
      });
    });
  }
  unroll<kBlocks * 2>([&](auto v) NIBBLE_INLINE {
    constexpr int j = v / 2, half = v % 2;
    const __m512 s =
        load_scales(w.scales(block + j) + group * kBlockColumns + half * 16, w.scale_dtype);
    unroll<kRows>([&](auto r) NIBBLE_INLINE {
      acc[r][j][half] = _mm512_fmadd_ps(products[r][j][half], s, acc[r][j][half]);
    });
  });
}

template <int kRows, int kBlocks>
void run_tile(const GemmBlock& b, int64_t block, int64_t row) {
  const PackedWeights& w = *b.weights;
  __m512 acc[kRows][kBlocks][2];
  std::memset(&acc, 0, sizeof acc);
  for (int64_t group = 0; group < w.groups; ++group) run_group(b, block, row, group, acc);
  for (int j = 0; j < kBlocks; ++j) {
    for (int half = 0; half < 2; ++half) {
      const int64_t n0 = (block + j) * kBlockColumns + half * 16;
      for (int r = 0; r < kRows; ++r) {
        __m512 y = acc[r][j][half];
        if (!w.bias.empty()) y = _mm512_add_ps(y, _mm512_loadu_ps(&w.bias[n0]));
        store_floats(b.y, (row + r) * b.y_stride + n0, b.y_dtype, lanes_below(w.n - n0), y);
      }
    }
  }
}

template <int kBlocks>
void run_rows(const GemmBlock& b, int64_t block) {
  int64_t row = 0;
  if constexpr (kBlocks == 1) {
    for (; b.rows - row >= 12; row += 12) run_tile<12, 1>(b, block, row);
    for (; b.rows - row >= 8; row += 8) run_tile<8, 1>(b, block, row);
  }
  for (; b.rows - row >= 4; row += 4) run_tile<4, kBlocks>(b, block, row);
  for (; b.rows - row >= 2; row += 2) run_tile<2, kBlocks>(b, block, row);
  for (; row < b.rows; ++row) run_tile<1, kBlocks>(b, block, row);
}

}  // namespace

void run_w4a16_avx512(const GemmBlock& b) {
  int64_t block = b.block0;
  if (b.rows < 4) {
    for (; b.block1 - block >= 4; block += 4) run_rows<4>(b, block);
  }
  if (b.rows < 8) {
    for (; b.block1 - block >= 2; block += 2) run_rows<2>(b, block);
  }
  for (; block < b.block1; ++block) run_rows<1>(b, block);
}

}  // namespace nibble
NIBBLE_TARGET_END
