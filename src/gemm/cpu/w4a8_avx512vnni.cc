// w4a8 and w4a4 with 512-bit VPDPBUSD: decode and small batches, and every batch on AVX-512 CPUs
// without AMX. One register tile is kRows rows x kBlocks blocks of 32 columns; a weight line is
// loaded and split into nibbles once for all its rows. Zero points are taken off the integer sums:
// S = sum(q * a) - z * sum(a).
#include "gemm/cpu/kernel.h"
#include "gemm/cpu/target.h"

#include <immintrin.h>

#include <cstring>
#include <type_traits>
#include <utility>

NIBBLE_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#include "gemm/cpu/avx512.h"
#include "gemm/cpu/unroll.h"

namespace nibble {
namespace {

// Software prefetch distance into the weight stream: the hardware prefetcher stops at 4 KiB pages.
constexpr int64_t kPrefetchBytes = 3072;

inline __m512i broadcast_quad(const int8_t* codes) {
  int32_t quad;
  std::memcpy(&quad, codes, sizeof quad);
  return _mm512_set1_epi32(quad);
}

/// sums = codes * activations over one group.
template <int kRows, int kBlocks>
[[gnu::always_inline]] inline void multiply_group(const GemmBlock& b, int64_t block, int64_t row,
                                                  int64_t group,
                                                  __m512i (&sums)[kRows][kBlocks][2]) {
  const PackedWeights& w = *b.weights;
  const int64_t a_row_stride = w.groups * w.quads * 4;
  const int8_t* a = b.activations.codes + (row * w.groups + group) * w.quads * 4;
  const uint8_t* line = w.codes(block) + group * w.quads * kLineBytes;
  const int64_t block_stride = w.block_bytes();
  const __m512i low_nibble = _mm512_set1_epi8(15);
  unroll<kRows>([&](auto r) NIBBLE_INLINE {
    unroll<kBlocks>([&](auto i)
                        NIBBLE_INLINE { sums[r][i][0] = sums[r][i][1] = _mm512_setzero_si512(); });
  });
  for (int64_t quad = 0; quad < w.quads; ++quad, line += kLineBytes, a += 4) {
    __m512i low[kBlocks], high[kBlocks];
    unroll<kBlocks>([&](auto i) NIBBLE_INLINE {
      const uint8_t* from = line + i * block_stride;
      const __m512i codes = _mm512_loadu_si512(from);
      _mm_prefetch(reinterpret_cast<const char*>(from) + kPrefetchBytes, _MM_HINT_T0);
      low[i] = _mm512_and_si512(codes, low_nibble);
      high[i] = _mm512_and_si512(_mm512_srli_epi16(codes, 4), low_nibble);
    });
    unroll<kRows>([&](auto r) NIBBLE_INLINE {
      const __m512i x = broadcast_quad(a + r * a_row_stride);
      unroll<kBlocks>([&](auto i) NIBBLE_INLINE {
        dot_u8s8(sums[r][i][0], low[i], x);
        dot_u8s8(sums[r][i][1], high[i], x);
      });
    });
  }
}

inline void store_partials(const GemmBlock& b, int64_t block, int64_t half, int64_t row,
                           int64_t group, __m512i sums) {
  const int64_t n0 = block * kBlockColumns + half * 16;
  int32_t* to = b.partials + (row * b.weights->groups + group) * b.weights->n + n0;
  _mm512_mask_storeu_epi32(to, lanes_below(b.weights->n - n0), sums);
}

/// The float epilogue of one group: see gemm.h.
template <bool kGroupScales, int kRows, int kBlocks>
[[gnu::always_inline]] inline void accumulate_group(const GemmBlock& b, int64_t block, int64_t row,
                                                    int64_t group,
                                                    const __m512i (&sums)[kRows][kBlocks][2],
                                                    __m512 (&acc)[kRows][kBlocks][2]) {
  const PackedWeights& w = *b.weights;
  const bool small_sums = w.group_size <= 255;
  unroll<kBlocks * 2>([&](auto v) NIBBLE_INLINE {
    constexpr int i = v / 2, half = v % 2;
    const int64_t column = group * kBlockColumns + half * 16;
    const __m512 s = load_scales(w.scales(block + i) + column, w.scale_dtype);
    const __m512i z = load_zeros(w.zeros(block + i) + column);
    unroll<kRows>([&](auto r) NIBBLE_INLINE {
      const int64_t at = (row + r) * w.groups + group;
      const __m512i correction = zero_correction(z, b.activations.sums[at], small_sums);
      const __m512i sum = _mm512_sub_epi32(sums[r][i][half], correction);
      if (b.partials != nullptr) store_partials(b, block + i, half, row + r, group, sum);
      __m512 value = _mm512_cvtepi32_ps(sum);
      if (kGroupScales) value = _mm512_mul_ps(value, _mm512_set1_ps(b.activations.scales[at]));
      acc[r][i][half] = _mm512_fmadd_ps(value, s, acc[r][i][half]);
    });
  });
}

template <bool kGroupScales>
inline void store_row(const GemmBlock& b, int64_t block, int64_t half, int64_t row, __m512 acc) {
  const PackedWeights& w = *b.weights;
  const int64_t n0 = block * kBlockColumns + half * 16;
  const __m512 bias = w.bias.empty() ? _mm512_setzero_ps() : _mm512_loadu_ps(&w.bias[n0]);
  if (!kGroupScales) {
    const __m512 t = _mm512_set1_ps(b.activations.scales[row]);
    acc = w.bias.empty() ? _mm512_mul_ps(acc, t) : _mm512_fmadd_ps(acc, t, bias);
  } else if (!w.bias.empty()) {
    acc = _mm512_add_ps(acc, bias);
  }
  store_floats(b.y, row * b.y_stride + n0, b.y_dtype, lanes_below(w.n - n0), acc);
}

template <int kRows, int kBlocks, bool kGroupScales>
void run_tile(const GemmBlock& b, int64_t block, int64_t row) {
  __m512 acc[kRows][kBlocks][2];
  std::memset(&acc, 0, sizeof acc);
  for (int64_t group = 0; group < b.weights->groups; ++group) {
    __m512i sums[kRows][kBlocks][2];
    multiply_group(b, block, row, group, sums);
    accumulate_group<kGroupScales>(b, block, row, group, sums, acc);
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kBlocks; ++i) {
      store_row<kGroupScales>(b, block + i, 0, row + r, acc[r][i][0]);
      store_row<kGroupScales>(b, block + i, 1, row + r, acc[r][i][1]);
    }
  }
}

/// All rows of `kBlocks` blocks: the largest register tiles first.
template <int kBlocks, bool kGroupScales>
void run_rows(const GemmBlock& b, int64_t block) {
  int64_t row = 0;
  if constexpr (kBlocks == 1) {
    for (; b.rows - row >= 12 && b.rows - row != 16; row += 12) {
      run_tile<12, 1, kGroupScales>(b, block, row);
    }
    for (; b.rows - row >= 8; row += 8) run_tile<8, 1, kGroupScales>(b, block, row);
  }
  for (; b.rows - row >= 4; row += 4) run_tile<4, kBlocks, kGroupScales>(b, block, row);
  for (; b.rows - row >= 2; row += 2) run_tile<2, kBlocks, kGroupScales>(b, block, row);
  for (; row < b.rows; ++row) run_tile<1, kBlocks, kGroupScales>(b, block, row);
}

template <bool kGroupScales>
void run_blocks(const GemmBlock& b) {
  int64_t block = b.block0;
  if (b.rows < 4) {
    for (; b.block1 - block >= 4; block += 4) run_rows<4, kGroupScales>(b, block);
  }
  if (b.rows < 8) {
    for (; b.block1 - block >= 2; block += 2) run_rows<2, kGroupScales>(b, block);
  }
  for (; block < b.block1; ++block) run_rows<1, kGroupScales>(b, block);
}

}  // namespace

void run_w4a8_avx512vnni(const GemmBlock& b) {
  b.group_scales ? run_blocks<true>(b) : run_blocks<false>(b);
}

}  // namespace nibble
NIBBLE_TARGET_END
