// w4a8 and w4a4 with AMX-INT8 tiles: prefill and batches.
//
// One step is 64 k of one group; a panel is up to two steps of one group and 32 columns. Its codes
// are expanded once to signed bytes q - z (exact: -15..15) and stay in four tiles, B, while every
// 16 rows of the block of activations pass by:
//
//                     step 0   step 1              B of columns 0..15: tmm4, tmm5
//   A (16 rows)       tmm2     tmm3                B of columns 16..31: tmm6, tmm7
//   C (16 x 16)       tmm0 for columns 0..15, tmm1 for columns 16..31
//
// C goes to memory once a group is complete, where AVX-512 scales it into float accumulators. The
// stages overlap because none waits for the one before it in program order: while 16 rows are
// multiplied, the C tile before is stored, the rows before those are scaled, the next A tiles are
// loaded, and a part of the panel after the next is expanded. Subtracting z while expanding costs
// one instruction per 64 weights and block of rows; taking it off the sums would cost one per 16
// sums.
#include "gemm/cpu/kernel.h"
#include "gemm/cpu/target.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

NIBBLE_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,amx-tile,amx-int8")
#include "gemm/cpu/amx.h"
#include "gemm/cpu/avx512.h"
#include "gemm/cpu/unroll.h"

namespace nibble {
namespace {

constexpr int64_t kMaxTiles = kMaxBlockRows / kTileRows;
constexpr int64_t kPanelSteps = 2;
constexpr int64_t kPanelLines = kPanelSteps * 16;
constexpr int64_t kUnitLines = 4;       // expanded at a time
constexpr int64_t kAhead = 2;           // panels
constexpr int64_t kLag = 2;             // row tiles between the multiplication and the scaling
constexpr int64_t kPending = 2 * kLag;  // a ring: the entry of kLag before is kLag further on
constexpr int64_t kPrefetchBytes = 4096;

/// Sums or float accumulators of 16 rows and 32 columns.
struct alignas(64) SumTile {
  amx::Tile half[2];
};
struct alignas(64) AccTile {
  float half[2][kTileRows][16];
};

/// What one call works in, on the stack of the thread.
struct Scratch {
  amx::Tile weights[kAhead + 1][2][kPanelSteps];  // panel in turn, column half, step
  alignas(64) float scales[8][kBlockColumns];     // of the group in turn
  // Groups of one panel use kPending in turn, so that they stay in L1; longer ones keep the sums of
  // all rows from panel to panel, of two or more groups in turn because the scaling lags behind.
  SumTile sums[2 * kMaxTiles];
  AccTile acc[kMaxTiles];
  amx::Tile unused;
  AccTile unused_acc;
};

/// 16 rows of 32 columns whose sums are complete.
struct Pending {
  const SumTile* sums;
  AccTile* acc;
  const float* scales;
  const float* t;  // with group scales: of the first row
  int64_t rows;
  int64_t block, group, tile;  // for the partial sums
};

/// A panel, counted within its group.
struct Position {
  int64_t group = 0, panel = 0;

  void advance(int64_t panels) {
    if (++panel < panels) return;
    panel = 0;
    ++group;
  }
};

[[gnu::noinline, gnu::cold]] void store_partials(const GemmBlock& b, const Pending& p) {
  const PackedWeights& w = *b.weights;
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t n0 = p.block * kBlockColumns + half * 16;
    const int64_t columns = std::clamp<int64_t>(w.n - n0, 0, 16);
    for (int64_t row = p.tile * 16; row < std::min(b.rows, p.tile * 16 + 16); ++row) {
      std::memcpy(b.partials + (row * w.groups + p.group) * w.n + n0,
                  p.sums->half[half].bytes + row % 16 * kLineBytes,
                  static_cast<size_t>(columns) * 4);
    }
  }
}

/// acc += float(S) [* t] * s for 16 columns and `rows` rows.
template <bool kGroupScales>
[[gnu::always_inline]] inline void finish_half(const amx::Tile& sums, float (*acc)[16],
                                               const float* scales, const float* t,
                                               int64_t t_stride, int64_t rows) {
  const __m512 s = _mm512_load_ps(scales);
  const auto add_row = [&](int64_t r) NIBBLE_INLINE {
    __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums.bytes + r * kLineBytes));
    if (kGroupScales) sum = _mm512_mul_ps(sum, _mm512_set1_ps(t[r * t_stride]));
    _mm512_store_ps(acc[r], _mm512_fmadd_ps(sum, s, _mm512_load_ps(acc[r])));
  };
  if (rows == kTileRows) {
    unroll<kTileRows>([&](auto r) NIBBLE_INLINE { add_row(r); });
  } else {
    for (int64_t r = 0; r < rows; ++r) add_row(r);
  }
}

template <bool kGroupScales>
void store_block(const GemmBlock& b, int64_t block, const AccTile* acc) {
  const PackedWeights& w = *b.weights;
  const bool has_bias = !w.bias.empty();
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t n0 = block * kBlockColumns + half * 16;
    const __m512 bias = has_bias ? _mm512_loadu_ps(&w.bias[n0]) : _mm512_setzero_ps();
    for (int64_t row = 0; row < b.rows; ++row) {
      __m512 y = _mm512_load_ps(acc[row / kTileRows].half[half][row % kTileRows]);
      if (!kGroupScales) {
        const __m512 t = _mm512_set1_ps(b.activations.scales[row]);
        y = has_bias ? _mm512_fmadd_ps(y, t, bias) : _mm512_mul_ps(y, t);
      } else if (has_bias) {
        y = _mm512_add_ps(y, bias);
      }
      store_floats(b.y, row * b.y_stride + n0, b.y_dtype, lanes_below(w.n - n0), y);
    }
  }
}

/// All rows of one block. kSteps: of a panel. kLong: groups have several panels.
// Plain local variables on purpose: as members of structs g++ moves them around as vectors, which
// then wait for the stores of their parts.
template <int kSteps, bool kLong, bool kGroupScales>
void run_block(const GemmBlock& b, int64_t block, Scratch& s) {
  const PackedWeights& w = *b.weights;
  const int64_t groups = w.groups, quads = w.quads;
  const int64_t tiles = (b.rows + kTileRows - 1) / kTileRows, steps = steps_of(w.group_size);
  const int64_t panels = kLong ? (steps + kPanelSteps - 1) / kPanelSteps : 1;
  const auto* const codes = reinterpret_cast<const amx::Tile*>(b.activations.codes);
  const auto activations = [&](const Position& p) NIBBLE_INLINE {
    return codes + (p.group * tiles * steps + p.panel * kPanelSteps);
  };

  // The panel that is being expanded, a few lines at a time.
  Position ahead;
  int64_t ahead_turn = 0, lines = 0;
  const uint8_t* from = nullptr;
  int8_t* to = nullptr;
  __m512i z_low = _mm512_setzero_si512(), z_high = z_low;
  const __m512i low_nibble = _mm512_set1_epi8(15);
  const auto begin_expansion = [&]() NIBBLE_INLINE {
    lines = 0;
    if (ahead.group == groups) return;
    const int64_t first = ahead.panel * kPanelLines, column = ahead.group * kBlockColumns;
    lines = std::min(quads - first, kPanelLines);
    from = w.codes(block) + (ahead.group * quads + first) * kLineBytes;
    to = s.weights[ahead_turn % (kAhead + 1)][0][0].bytes;
    const uint16_t* scales = w.scales(block) + column;
    const uint8_t* zeros = w.zeros(block) + column;
    // each zero point four times, to match the four k of a quad
    const __m512i ones = _mm512_set1_epi32(0x01010101);
    z_low = _mm512_mullo_epi32(load_zeros(zeros), ones);
    z_high = _mm512_mullo_epi32(load_zeros(zeros + 16), ones);
    float* scales_to = s.scales[ahead_turn / panels % 8];
    _mm512_store_ps(scales_to, load_scales(scales, w.scale_dtype));
    _mm512_store_ps(scales_to + 16, load_scales(scales + 16, w.scale_dtype));
    // A second step of which the group has no part. Lines past the end of a step that it has may
    // keep any code: the activations are zero there.
    if (kLong && lines <= 16) {
      std::memset(to + sizeof(amx::Tile), 0, sizeof(amx::Tile));
      std::memset(to + 3 * sizeof(amx::Tile), 0, sizeof(amx::Tile));
    }
    ++ahead_turn;
    ahead.advance(panels);
  };
  const auto expand_line = [&](int64_t i) NIBBLE_INLINE {
    const __m512i line = _mm512_load_si512(from + i * kLineBytes);
    _mm_prefetch(reinterpret_cast<const char*>(from) + i * kLineBytes + kPrefetchBytes,
                 _MM_HINT_T1);
    int8_t* const low = to + i * kLineBytes;
    _mm512_store_si512(low, _mm512_sub_epi8(_mm512_and_si512(line, low_nibble), z_low));
    _mm512_store_si512(
        low + kPanelSteps * sizeof(amx::Tile),
        _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(line, 4), low_nibble), z_high));
  };
  const auto expand_unit = [&]() NIBBLE_INLINE {
    if (lines >= kUnitLines) {
      unroll<kUnitLines>([&](auto i) NIBBLE_INLINE { expand_line(i); });
    } else {
      for (int64_t i = 0; i < lines; ++i) expand_line(i);
    }
    from += kUnitLines * kLineBytes;
    to += kUnitLines * kLineBytes;
    lines -= kUnitLines;
  };

  // Row tiles that wait to be scaled. The first have nowhere to go.
  std::memset(s.acc, 0, static_cast<size_t>(tiles) * sizeof s.acc[0]);
  Pending pending[kPending];
  for (Pending& p : pending) {
    p = {s.sums, &s.unused_acc, s.scales[0], b.activations.scales, 0, block, 0, -1};
  }
  const int64_t last_rows = b.rows - (tiles - 1) * kTileRows;
  const auto finish = [&](auto half, const Pending& p) NIBBLE_INLINE {
    finish_half<kGroupScales>(p.sums->half[half], p.acc->half[half], p.scales + half * 16, p.t,
                              groups, p.rows);
    if (half == 1 && b.partials != nullptr && p.tile >= 0) store_partials(b, p);
  };

  for (int64_t i = 0; i < kAhead; ++i) {
    begin_expansion();
    while (lines > 0) expand_unit();
  }
  const auto load_weights = [&](auto half, int64_t turn) NIBBLE_INLINE {
    const amx::Tile* tile = s.weights[turn % (kAhead + 1)][half];
    amx::load<4 + 2 * half>(tile[0]);
    if (kSteps == 2) amx::load<5 + 2 * half>(tile[1]);
  };
  // Read once per 32 columns and then not soon again: kept out of L1, which holds the accumulators.
  const auto load_activations = [&](const amx::Tile* a, int64_t second) NIBBLE_INLINE {
    amx::load_streaming<2>(a[0]);
    if (kSteps == 2) amx::load_streaming<3>(a[second]);
  };
  constexpr std::integral_constant<int, 0> low;
  constexpr std::integral_constant<int, 1> high;
  load_weights(low, 0);
  load_weights(high, 0);
  load_activations(codes, 1);
  amx::Tile* previous = &s.unused;
  const int64_t units = (kPanelLines / kUnitLines + tiles - 1) / tiles;
  int64_t turn = 0, done = 0;  // panels; row tiles with complete sums
  for (Position p; p.group < groups; ++turn) {
    begin_expansion();
    const amx::Tile* a = activations(p);
    const bool last = !kLong || p.panel == panels - 1, resume = kLong && p.panel > 0;
    const int64_t group = p.group;
    SumTile* const long_sums = &s.sums[turn / panels % (2 * kMaxTiles / tiles) * tiles];
    AccTile* acc = s.acc;
    const float* const scales = s.scales[turn / panels % 8];
    p.advance(panels);
    const amx::Tile* const next_a = p.group < groups ? activations(p) : a;
    const int64_t second = kLong && steps % 2 != 0 && last ? 0 : 1;
    // At the end there is no next panel: this one's tiles again, and nothing past them.
    const int64_t next_second = p.group == groups ? second
                                : kLong && steps % 2 != 0 && p.panel == panels - 1 ? 0
                                                                                   : 1;
    for (int64_t tile = 0; tile < tiles; ++tile, ++acc) {
      SumTile& sums = kLong ? long_sums[tile] : s.sums[done % kPending];
      const Pending& ready = pending[(done + kLag) % kPending];
      const bool last_tile = tile == tiles - 1;
      if (resume) {
        amx::load<0>(sums.half[0]);
      } else {
        amx::zero<0>();
      }
      amx::dot_s8s8<0, 2, 4>();
      if (kSteps == 2) amx::dot_s8s8<0, 3, 5>();
      if (last_tile) load_weights(low, turn + 1);
      amx::store<1>(*previous);
      if (last) finish(low, ready);
      if (resume) {
        amx::load<1>(sums.half[1]);
      } else {
        amx::zero<1>();
      }
      a = last_tile ? next_a : a + steps;
      amx::dot_s8s8<1, 2, 6>();
      if (kSteps == 2) amx::dot_s8s8<1, 3, 7>();
      load_activations(a, last_tile ? next_second : second);
      if (last_tile) load_weights(high, turn + 1);
      amx::store<0>(sums.half[0]);
      if (last) {
        finish(high, ready);
        Pending& entry = pending[done % kPending];
        entry.sums = &sums;
        entry.acc = acc;
        entry.scales = scales;
        entry.rows = last_tile ? last_rows : kTileRows;
        if (kGroupScales) entry.t = b.activations.scales + tile * kTileRows * groups + group;
        if (b.partials != nullptr) entry.block = block, entry.group = group, entry.tile = tile;
        ++done;
      }
      for (int64_t i = 0; i < units; ++i) expand_unit();
      previous = &sums.half[1];
    }
  }
  amx::store<1>(*previous);
  for (int64_t i = 0; i < kLag; ++i, ++done) {
    finish(low, pending[(done + kLag) % kPending]);
    finish(high, pending[(done + kLag) % kPending]);
  }
  store_block<kGroupScales>(b, block, s.acc);
}

template <int kSteps, bool kLong>
void run_blocks(const GemmBlock& b) {
  Scratch scratch;
  for (int64_t block = b.block0; block < b.block1; ++block) {
    b.group_scales ? run_block<kSteps, kLong, true>(b, block, scratch)
                   : run_block<kSteps, kLong, false>(b, block, scratch);
  }
}

}  // namespace

void run_w4a8_amx(const GemmBlock& b) {
  const int64_t steps = steps_of(b.weights->group_size);
  amx::configure();
  steps == 1   ? run_blocks<1, false>(b)
  : steps == 2 ? run_blocks<2, false>(b)
               : run_blocks<2, true>(b);
  amx::release();
}

}  // namespace nibble
NIBBLE_TARGET_END
