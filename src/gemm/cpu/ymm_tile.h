// The 256-bit integer kernel, written once over a dot-product policy: w4a8_avx2, w4a4_avx2 and
// w4a8_avxvnni differ only in how u4 x s8 products reach int32. Include inside a target region,
// after avx2.h.
//
// A 64-byte weight line is two half lines. Half line h = 2 * block + i holds columns 8i..8i+7 of
// its block in the low nibbles and 16+8i..16+8i+7 in the high ones: two vectors of 8 columns. A
// register tile is kRows rows x kHalves half lines of one group. Neighbouring half lines form a
// strip, which goes through K group by group with its float accumulators in L1, so that the weights
// arrive from memory at an even pace. Up to 4 rows expand the nibbles in registers; more share
// codes that are expanded once into L1 (ymm_panel).
//
// Policy Dot: kChunkQuads, quads that one accumulator may take before it is drained;
// start(u4 codes, s8 quad) and multiply(accumulator, codes, quad); drain(int32 sums, accumulator).
#pragma once

#include <cstring>

#include "gemm/cpu/avx2.h"
#include "gemm/cpu/kernel.h"
#include "gemm/cpu/unroll.h"

namespace nibble {
namespace {

constexpr int64_t kHalfLineBytes = kLineBytes / 2;
constexpr int64_t kPrefetchBytes = 3072;
constexpr int64_t kStepQuads = 8;    // unrolled
constexpr int64_t kPanelQuads = 64;  // of the largest group that is expanded: 8 KiB
constexpr int64_t kPassRows = 96;    // accumulators of a block: 12 KiB
constexpr int64_t kPanelTileRows = 6;

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

  static __m256i start(__m256i codes, __m256i x) { return _mm256_maddubs_epi16(codes, x); }
  static void multiply(__m256i& pairs, __m256i codes, __m256i x) {
    add_pairs_u8s8(pairs, codes, x);
  }
  static __m256i drain(__m256i sums, __m256i pairs) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

struct CodePair {
  __m256i low, high;
};

inline CodePair expand_half_line(const uint8_t* from) {
  const __m256i low_nibble = _mm256_set1_epi8(15);
  const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return {_mm256_and_si256(codes, low_nibble),
          _mm256_and_si256(_mm256_srli_epi16(codes, 4), low_nibble)};
}

inline void prefetch(const uint8_t* line) {
  _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T0);
}

/// One group of kHalves half lines as they lie in memory.
template <int kHalves>
struct PackedCodes {
  const uint8_t* half[kHalves];

  PackedCodes(const PackedWeights& w, int64_t half_line, int64_t group) {
    for (int j = 0; j < kHalves; ++j) {
      half[j] = w.codes((half_line + j) / 2) + (half_line + j) % 2 * kHalfLineBytes +
                group * w.quads * kLineBytes;
    }
  }
  CodePair load(int j, int quad) const {
    const uint8_t* from = half[j] + quad * kLineBytes;
    prefetch(from + kPrefetchBytes);
    return expand_half_line(from);
  }
  void advance(int64_t quads) {
    for (int j = 0; j < kHalves; ++j) half[j] += quads * kLineBytes;
  }
};

/// One group of one half line, expanded: two vectors a quad.
struct ExpandedCodes {
  const __m256i* pair;

  CodePair load(int, int quad) const {
    return {_mm256_load_si256(pair + 2 * quad), _mm256_load_si256(pair + 2 * quad + 1)};
  }
  void advance(int64_t quads) { pair += 2 * quads; }
};

/// sums += codes * activations over one group.
template <class Dot, int kRows, int kHalves, class Codes>
struct GroupProduct {
  static constexpr int64_t kChunkSteps = Dot::kChunkQuads / kStepQuads;
  static_assert(kChunkSteps >= 1, "one step must not overflow");

  __m256i sums[kRows][kHalves][2];
  __m256i part[kRows][kHalves][2];
  Codes codes;
  const int8_t* a[kRows];

  template <int kQuads, bool kStart>
  [[gnu::always_inline]] void step() {
    unroll<kQuads>([&](auto quad) NIBBLE_INLINE {
      unroll<kHalves>([&](auto j) NIBBLE_INLINE {
        const CodePair pair = codes.load(j, quad);
        unroll<kRows>([&](auto r) NIBBLE_INLINE {
          const __m256i x = broadcast_quad(a[r] + 4 * quad);
          if constexpr (kStart && quad == 0) {
            part[r][j][0] = Dot::start(pair.low, x);
            part[r][j][1] = Dot::start(pair.high, x);
          } else {
            Dot::multiply(part[r][j][0], pair.low, x);
            Dot::multiply(part[r][j][1], pair.high, x);
          }
        });
      });
    });
    codes.advance(kQuads);
    unroll<kRows>([&](auto r) NIBBLE_INLINE { a[r] += 4 * kQuads; });
  }

  [[gnu::always_inline]] void drain() {
    unroll<kRows>([&](auto r) NIBBLE_INLINE {
      unroll<kHalves>([&](auto j) NIBBLE_INLINE {
        sums[r][j][0] = Dot::drain(sums[r][j][0], part[r][j][0]);
        sums[r][j][1] = Dot::drain(sums[r][j][1], part[r][j][1]);
      });
    });
  }

  [[gnu::always_inline]] void run(int64_t quads) {
    while (quads >= kStepQuads) {
      step<kStepQuads, true>();
      quads -= kStepQuads;
      if constexpr (kChunkSteps > 1) {
        for (int64_t i = 1; i < kChunkSteps && quads >= kStepQuads; ++i, quads -= kStepQuads) {
          step<kStepQuads, false>();
        }
      }
      drain();
    }
    for (; quads > 0; --quads) {
      step<1, true>();
      drain();
    }
  }
};

/// kHalves half lines and kRows rows at most, on their way through K group by group.
template <int kHalves, int kMaxRows, bool kGroupScales>
struct YmmStrip {
  static constexpr int kVectors = 2 * kHalves;  // half line j has 2j and 2j + 1

  const GemmBlock& b;
  const PackedWeights& w = *b.weights;
  int64_t half_line;  // first
  int64_t row, rows;
  bool small_sums = w.group_size <= 255;
  __m256 scales[kVectors];  // of the group at hand
  __m256i zeros[kVectors];  // negated
  __m256 acc[kMaxRows][kVectors];

  YmmStrip(const GemmBlock& block, int64_t first_half_line, int64_t first_row, int64_t num_rows)
      : b(block), half_line(first_half_line), row(first_row), rows(num_rows) {
    std::memset(acc, 0, static_cast<size_t>(rows) * sizeof acc[0]);
  }

  void load_group(int64_t group) {
    for (int i = 0; i < kVectors; ++i) {
      const int64_t block = (half_line + i / 2) / 2;
      const int64_t at = group * kBlockColumns + half_line_column(half_line + i / 2, i % 2);
      scales[i] = load_scales(w.scales(block) + at, w.scale_dtype);
      zeros[i] = negative_zeros(load_zeros(w.zeros(block) + at), small_sums);
    }
  }

  /// Rows first_row.. of the strip and half lines first.., one group: integer product, then the
  /// float epilogue (gemm.h). The sums start at -z * sum(a).
  template <class Dot, int kRows, int kTileHalves, class Codes>
  void multiply(const Codes& codes, int64_t group, int first, int64_t first_row) {
    const int64_t a_row_stride = w.groups * w.quads * 4;
    const int64_t at = (row + first_row) * w.groups + group;  // of (rows, groups)
    const int8_t* a = b.activations.codes + at * w.quads * 4;
    const int32_t* a_sums = b.activations.sums + at;
    GroupProduct<Dot, kRows, kTileHalves, Codes> product{{}, {}, codes, {}};
    unroll<kRows>([&](auto r) NIBBLE_INLINE {
      product.a[r] = a + r * a_row_stride;
      const __m256i a_sum = _mm256_set1_epi32(a_sums[r * w.groups]);
      unroll<2 * kTileHalves>([&](auto v) NIBBLE_INLINE {
        product.sums[r][v / 2][v % 2] = zero_correction(zeros[2 * first + v], a_sum, small_sums);
      });
    });
    product.run(w.quads);
    if (b.partials != nullptr) {
      unroll<kRows>([&](auto r) NIBBLE_INLINE {
        unroll<2 * kTileHalves>([&](auto v) NIBBLE_INLINE {
          store_partial(half_line + first + v / 2, v % 2, at + r * w.groups,
                        product.sums[r][v / 2][v % 2]);
        });
      });
    }
    __m256(*to)[kVectors] = acc + first_row;
    unroll<kRows>([&](auto r) NIBBLE_INLINE {
      unroll<2 * kTileHalves>([&](auto v) NIBBLE_INLINE {
        __m256 value = _mm256_cvtepi32_ps(product.sums[r][v / 2][v % 2]);
        if (kGroupScales) {
          value = _mm256_mul_ps(value, _mm256_set1_ps(b.activations.scales[at + r * w.groups]));
        }
        to[r][2 * first + v] = _mm256_fmadd_ps(value, scales[2 * first + v], to[r][2 * first + v]);
      });
    });
  }

  [[gnu::noinline]] void store_partial(int64_t h, int v, int64_t at, __m256i sum) const {
    const int64_t n0 = h / 2 * kBlockColumns + half_line_column(h, v);
    const int64_t count = w.n - n0;
    if (count <= 0) return;
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sum);
    std::memcpy(b.partials + at * w.n + n0, lanes, static_cast<size_t>(count < 8 ? count : 8) * 4);
  }

  void store() const {
    const bool has_bias = !w.bias.empty();
    for (int i = 0; i < kVectors; ++i) {
      const int64_t h = half_line + i / 2;
      const int64_t n0 = h / 2 * kBlockColumns + half_line_column(h, i % 2);
      if (n0 >= w.n) continue;
      const __m256 bias = has_bias ? _mm256_loadu_ps(&w.bias[n0]) : _mm256_setzero_ps();
      for (int64_t r = 0; r < rows; ++r) {
        __m256 y = acc[r][i];
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
};

/// kRows rows by a strip of kHalves half lines, kTileHalves at a time, nibbles expanded in
/// registers.
template <class Dot, bool kGroupScales, int kRows, int kTileHalves, int kHalves>
void run_ymm_strip(const GemmBlock& b, int64_t half_line, int64_t row) {
  YmmStrip<kHalves, kRows, kGroupScales> strip(b, half_line, row, kRows);
  for (int64_t group = 0; group < b.weights->groups; ++group) {
    strip.load_group(group);
    for (int j = 0; j < kHalves; j += kTileHalves) {
      const PackedCodes<kTileHalves> codes(*b.weights, half_line + j, group);
      strip.template multiply<Dot, kRows, kTileHalves>(codes, group, j, 0);
    }
  }
  strip.store();
}

/// All columns of kRows rows: strips of two blocks, and of one where no second is left.
template <class Dot, bool kGroupScales, int kRows, int kTileHalves>
void run_ymm_rows(const GemmBlock& b, int64_t row) {
  int64_t block = b.block0;
  for (; b.block1 - block >= 2; block += 2) {
    run_ymm_strip<Dot, kGroupScales, kRows, kTileHalves, 4>(b, 2 * block, row);
  }
  if (block < b.block1) {
    constexpr int kLast = kTileHalves < 2 ? kTileHalves : 2;
    run_ymm_strip<Dot, kGroupScales, kRows, kLast, 2>(b, 2 * block, row);
  }
}

/// Rows of a block of columns whose codes are expanded once per group. The group after the next is
/// prefetched a few lines a tile: all at once, they hold up the loads of the activations.
template <class Dot, bool kGroupScales>
void run_ymm_panel(const GemmBlock& b, int64_t block, int64_t row, int64_t rows) {
  const PackedWeights& w = *b.weights;
  alignas(32) __m256i panel[2][2 * kPanelQuads];
  YmmStrip<2, kPassRows, kGroupScales> strip(b, 2 * block, row, rows);
  const int64_t tiles = (rows + kPanelTileRows - 1) / kPanelTileRows;
  const int64_t lines_per_tile = (w.quads + 2 * tiles - 1) / (2 * tiles);
  for (int64_t group = 0; group < w.groups; ++group) {
    strip.load_group(group);
    const uint8_t* line = w.codes(block) + group * w.quads * kLineBytes;
    for (int64_t quad = 0; quad < w.quads; ++quad, line += kLineBytes) {
      for (int j = 0; j < 2; ++j) {
        const CodePair pair = expand_half_line(line + j * kHalfLineBytes);
        panel[j][2 * quad] = pair.low;
        panel[j][2 * quad + 1] = pair.high;
      }
    }
    line += w.quads * kLineBytes;
    int64_t first = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t count = rows / tiles + (tile < rows % tiles ? 1 : 0);
      for (int j = 0; j < 2; ++j) {
        for (int64_t i = 0; i < lines_per_tile; ++i, line += kLineBytes) prefetch(line);
        const ExpandedCodes codes{panel[j]};
        switch (count) {
          case 3: strip.template multiply<Dot, 3, 1>(codes, group, j, first); break;
          case 4: strip.template multiply<Dot, 4, 1>(codes, group, j, first); break;
          case 5: strip.template multiply<Dot, 5, 1>(codes, group, j, first); break;
          default: strip.template multiply<Dot, 6, 1>(codes, group, j, first); break;
        }
      }
      first += count;
    }
  }
  strip.store();
}

template <class Dot, bool kGroupScales>
void run_ymm_blocks(const GemmBlock& b) {
  if (b.rows > 4 && b.weights->quads <= kPanelQuads) {
    const int64_t passes = (b.rows + kPassRows - 1) / kPassRows;
    for (int64_t block = b.block0; block < b.block1; ++block) {
      int64_t row = 0;
      for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t count = b.rows / passes + (pass < b.rows % passes ? 1 : 0);
        run_ymm_panel<Dot, kGroupScales>(b, block, row, count);
        row += count;
      }
    }
    return;
  }
  int64_t row = 0;
  for (; b.rows - row >= 4; row += 4) run_ymm_rows<Dot, kGroupScales, 4, 1>(b, row);
  if (b.rows - row == 3) run_ymm_rows<Dot, kGroupScales, 3, 2>(b, row);
  if (b.rows - row == 2) run_ymm_rows<Dot, kGroupScales, 2, 2>(b, row);
  if (b.rows - row == 1) run_ymm_rows<Dot, kGroupScales, 1, 4>(b, row);
}

template <class Dot>
void run_ymm(const GemmBlock& b) {
  b.group_scales ? run_ymm_blocks<Dot, true>(b) : run_ymm_blocks<Dot, false>(b);
}

}  // namespace
}  // namespace nibble
