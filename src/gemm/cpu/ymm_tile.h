// The 256-bit integer kernel, written once over a dot-product policy: w4a8_avx2, w4a4_avx2 and
// w4a8_avxvnni differ only in how u4 x s8 products reach int32. Include inside a target region,
// after avx2.h.
//
// A 64-byte weight line is two half lines. Half line h = 2 * block + i holds columns 8i..8i+7 of
// its block in the low nibbles and 16+8i..16+8i+7 in the high ones. A register tile is kRows rows x
// kHalves consecutive half lines, two 8-column vectors each.
//
// Policy Dot: kChunkQuads, quads that one accumulator may take before it is drained;
// multiply(accumulator, u4 codes, s8 quad); drain(int32 sums, accumulator).
#pragma once

#include <cstring>

#include "gemm/cpu/avx2.h"
#include "gemm/cpu/kernel.h"
#include "gemm/cpu/unroll.h"

namespace nibble {
namespace {

constexpr int64_t kHalfLineBytes = kLineBytes / 2;
constexpr int64_t kPrefetchBytes = 3072;

/// First column, within its block, of vector v (0: low nibbles, 1: high) of half line h.
inline int64_t half_line_column(int64_t h, int v) { return h % 2 * 8 + v * 16; }

inline __m256i broadcast_quad(const int8_t* codes) {
  int32_t quad;
  std::memcpy(&quad, codes, sizeof quad);
  return _mm256_set1_epi32(quad);
}

/// Policy with VPMADDUBSW: pairs of u4 x s8 products summed in int16 for as long as activations of
/// up to kMaxAbs cannot overflow it, then widened by VPMADDWD.
template <int kMaxAbs>
struct DotInt16 {
  static constexpr int64_t kChunkQuads = 32767 / (2 * 15 * kMaxAbs);

  static void multiply(__m256i& pairs, __m256i codes, __m256i x) {
    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(codes, x));
  }
  static __m256i drain(__m256i sums, __m256i pairs) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

template <class Dot, int kRows, int kHalves>
struct YmmTile {
  __m256i sums[kRows][kHalves][2];
  __m256 acc[kRows][kHalves][2];

  /// sums += codes * activations over quads [quad0, quad1) of one group.
  [[gnu::always_inline]] void multiply_chunk(const GemmBlock& b, int64_t half_line, int64_t row,
                                             int64_t group, int64_t quad0, int64_t quad1) {
    const PackedWeights& w = *b.weights;
    const int64_t a_row_stride = w.groups * w.quads * 4;
    const int8_t* a = b.activations.codes + ((row * w.groups + group) * w.quads + quad0) * 4;
    const uint8_t* line[kHalves];
    for (int j = 0; j < kHalves; ++j) {
      line[j] = w.codes((half_line + j) / 2) + (half_line + j) % 2 * kHalfLineBytes +
                (group * w.quads + quad0) * kLineBytes;
    }
    const __m256i low_nibble = _mm256_set1_epi8(15);
    __m256i part[kRows][kHalves][2];
    unroll<kRows>([&](auto r) NIBBLE_INLINE {
      unroll<kHalves>(
          [&](auto j) NIBBLE_INLINE { part[r][j][0] = part[r][j][1] = _mm256_setzero_si256(); });
    });
    for (int64_t quad = quad0; quad < quad1; ++quad, a += 4) {
      unroll<kHalves>([&](auto j) NIBBLE_INLINE {
        const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line[j]));
        _mm_prefetch(reinterpret_cast<const char*>(line[j]) + kPrefetchBytes, _MM_HINT_T0);
        line[j] += kLineBytes;
        const __m256i low = _mm256_and_si256(codes, low_nibble);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(codes, 4), low_nibble);
        unroll<kRows>([&](auto r) NIBBLE_INLINE {
          const __m256i x = broadcast_quad(a + r * a_row_stride);
          Dot::multiply(part[r][j][0], low, x);
          Dot::multiply(part[r][j][1], high, x);
        });
      });
    }
    unroll<kRows>([&](auto r) NIBBLE_INLINE {
      unroll<kHalves>([&](auto j) NIBBLE_INLINE {
        sums[r][j][0] = Dot::drain(sums[r][j][0], part[r][j][0]);
        sums[r][j][1] = Dot::drain(sums[r][j][1], part[r][j][1]);
      });
    });
  }

  /// The float epilogue of one group: see gemm.h.
  template <bool kGroupScales>
  void accumulate_group(const GemmBlock& b, int64_t half_line, int64_t row, int64_t group) {
    const PackedWeights& w = *b.weights;
    const bool small_sums = w.group_size <= 255;
    for (int j = 0; j < kHalves; ++j) {
      const int64_t block = (half_line + j) / 2;
      for (int v = 0; v < 2; ++v) {
        const int64_t in_block = half_line_column(half_line + j, v);
        const __m256 s =
            load_scales(w.scales(block) + group * kBlockColumns + in_block, w.scale_dtype);
        const __m256i z = load_zeros(w.zeros(block) + group * kBlockColumns + in_block);
        for (int r = 0; r < kRows; ++r) {
          const int64_t at = (row + r) * w.groups + group;
          const __m256i sum = _mm256_sub_epi32(
              sums[r][j][v], zero_correction(z, b.activations.sums[at], small_sums));
          if (b.partials != nullptr) store_partial(b, block, in_block, at, sum);
          __m256 value = _mm256_cvtepi32_ps(sum);
          if (kGroupScales) value = _mm256_mul_ps(value, _mm256_set1_ps(b.activations.scales[at]));
          acc[r][j][v] = _mm256_fmadd_ps(value, s, acc[r][j][v]);
        }
      }
    }
  }

  static void store_partial(const GemmBlock& b, int64_t block, int64_t in_block, int64_t at,
                            __m256i sum) {
    const int64_t n0 = block * kBlockColumns + in_block;
    const int64_t count = b.weights->n - n0;
    if (count <= 0) return;
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sum);
    std::memcpy(b.partials + at * b.weights->n + n0, lanes,
                static_cast<size_t>(count < 8 ? count : 8) * 4);
  }

  template <bool kGroupScales>
  void store(const GemmBlock& b, int64_t half_line, int64_t row) const {
    const PackedWeights& w = *b.weights;
    for (int j = 0; j < kHalves; ++j) {
      for (int v = 0; v < 2; ++v) {
        const int64_t n0 = (half_line + j) / 2 * kBlockColumns + half_line_column(half_line + j, v);
        if (n0 >= w.n) continue;
        const bool has_bias = !w.bias.empty();
        const __m256 bias = has_bias ? _mm256_loadu_ps(&w.bias[n0]) : _mm256_setzero_ps();
        for (int r = 0; r < kRows; ++r) {
          __m256 y = acc[r][j][v];
          if (!kGroupScales) {
            const __m256 t = _mm256_set1_ps(b.activations.scales[row + r]);
            y = has_bias ? _mm256_fmadd_ps(y, t, bias) : _mm256_mul_ps(y, t);
          } else if (has_bias) {
            y = _mm256_add_ps(y, bias);
          }
          store_floats(b.y, (row + r) * b.y_stride + n0, b.y_dtype, w.n - n0, y);
        }
      }
    }
  }
};

template <class Dot, int kRows, int kHalves, bool kGroupScales>
void run_ymm_tile(const GemmBlock& b, int64_t half_line, int64_t row) {
  YmmTile<Dot, kRows, kHalves> tile;
  std::memset(&tile.acc, 0, sizeof tile.acc);
  const int64_t quads = b.weights->quads;
  for (int64_t group = 0; group < b.weights->groups; ++group) {
    std::memset(&tile.sums, 0, sizeof tile.sums);
    for (int64_t quad = 0; quad < quads; quad += Dot::kChunkQuads) {
      const int64_t end = quad + Dot::kChunkQuads < quads ? quad + Dot::kChunkQuads : quads;
      tile.multiply_chunk(b, half_line, row, group, quad, end);
    }
    tile.template accumulate_group<kGroupScales>(b, half_line, row, group);
  }
  tile.template store<kGroupScales>(b, half_line, row);
}

/// All half lines of the block range for kRows rows from `row`, kHalves at a time.
template <class Dot, int kRows, int kHalves, bool kGroupScales>
int64_t run_ymm_half_lines(const GemmBlock& b, int64_t half_line, int64_t row) {
  for (; 2 * b.block1 - half_line >= kHalves; half_line += kHalves) {
    run_ymm_tile<Dot, kRows, kHalves, kGroupScales>(b, half_line, row);
  }
  return half_line;
}

template <class Dot, bool kGroupScales>
void run_ymm_blocks(const GemmBlock& b) {
  for (int64_t half_line = 2 * b.block0; half_line < 2 * b.block1; ++half_line) {
    for (int64_t row = 0; b.rows - row >= 4; row += 4) {
      run_ymm_tile<Dot, 4, 1, kGroupScales>(b, half_line, row);
    }
  }
  int64_t row = b.rows / 4 * 4;
  if (b.rows - row >= 2) {
    run_ymm_half_lines<Dot, 2, 2, kGroupScales>(b, 2 * b.block0, row);
    row += 2;
  }
  if (row < b.rows) {
    const int64_t rest = run_ymm_half_lines<Dot, 1, 4, kGroupScales>(b, 2 * b.block0, row);
    run_ymm_half_lines<Dot, 1, 2, kGroupScales>(b, rest, row);
  }
}

template <class Dot>
void run_ymm(const GemmBlock& b) {
  b.group_scales ? run_ymm_blocks<Dot, true>(b) : run_ymm_blocks<Dot, false>(b);
}

}  // namespace
}  // namespace nibble
