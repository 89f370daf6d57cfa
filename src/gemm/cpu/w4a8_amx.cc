// w4a8 and w4a4 with AMX-INT8 tiles: prefill and batches.
//
// One step is 64 k of one group. For each group the codes of a 32-column block are expanded once to
// signed bytes q - z (exact: -15..15) in L1 and meet every 32 rows of the block of activations:
//
//            B0 (16 cols)   B1 (16 cols)
//   A0 (16)      C0             C1          4 tile multiplies per step, 2 steps per group of 128
//   A1 (16)      C2             C3
//
// C goes to memory after each group, where AVX-512 scales it into float accumulators while the
// tiles already work on the next 32 rows (two C buffers). Subtracting z while expanding costs one
// instruction per 64 weights and block of rows; taking it off the sums would cost one per 16 sums.
#include "gemm/cpu/kernel.h"
#include "gemm/cpu/target.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>

NIBBLE_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,amx-tile,amx-int8")
#include "gemm/cpu/amx.h"
#include "gemm/cpu/avx512.h"

namespace nibble {
namespace {

constexpr int64_t kPairRows = 2 * kTileRows;
constexpr int64_t kTileBytes = kTileRows * kTileDepth;
constexpr int64_t kMaxPairs = kMaxBlockRows / kPairRows;
constexpr int64_t kMaxSteps = 4;  // expanded at a time: 8 KiB
constexpr int64_t kPrefetchBytes = 4096;

/// Per-call scratch, on the stack of the thread.
struct alignas(64) Scratch {
  int8_t expanded[kMaxSteps][2][kTileBytes];  // B tiles: step, column half
  // C of the pairs. Groups of up to kMaxSteps steps use two in turn, so that they stay in L1;
  // longer ones need every pair's until the group is complete.
  int32_t sums[kMaxPairs][kPairRows][kBlockColumns];
  float acc[kMaxBlockRows][kBlockColumns];
};

/// Codes of `steps` steps to signed bytes q - z in B tile order. Lines past the end of the group
/// are left as they are: the activations are zero there.
inline void expand(const PackedWeights& w, int64_t block, int64_t group, int64_t step0,
                   int64_t steps, Scratch& scratch) {
  const __m512i low_nibble = _mm512_set1_epi8(15);
  const uint8_t* zeros = w.zeros(block) + group * kBlockColumns;
  // each zero point four times, to match the four k of a quad
  const __m512i ones = _mm512_set1_epi32(0x01010101);
  const __m512i z_low = _mm512_mullo_epi32(load_zeros(zeros), ones);
  const __m512i z_high = _mm512_mullo_epi32(load_zeros(zeros + 16), ones);
  const int64_t first = step0 * 16;
  const int64_t quads = std::min(w.quads - first, steps * 16);
  const uint8_t* line = w.codes(block) + (group * w.quads + first) * kLineBytes;
  for (int64_t quad = 0; quad < quads; ++quad, line += kLineBytes) {
    const __m512i codes = _mm512_loadu_si512(line);
    _mm_prefetch(reinterpret_cast<const char*>(line) + kPrefetchBytes, _MM_HINT_T0);
    int8_t(*to)[kTileBytes] = scratch.expanded[quad / 16];
    const int64_t at = quad % 16 * kLineBytes;
    _mm512_store_si512(to[0] + at, _mm512_sub_epi8(_mm512_and_si512(codes, low_nibble), z_low));
    _mm512_store_si512(
        to[1] + at,
        _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(codes, 4), low_nibble), z_high));
  }
}

/// C tiles of one pair of row tiles += A * B over `steps` steps, then stored to `sums`.
/// kBoth: the pair has two row tiles. `load`: continue from `sums` instead of from zero.
template <bool kBoth>
inline void multiply_pair(const int8_t* a, int64_t a_tile_stride, int64_t steps, bool load,
                          const Scratch& scratch, int32_t (*sums)[kBlockColumns]) {
  constexpr int64_t kStride = kBlockColumns * sizeof(int32_t);
  if (load) {
    amx::load<0>(&sums[0][0], kStride);
    amx::load<1>(&sums[0][16], kStride);
    if (kBoth) amx::load<2>(&sums[kTileRows][0], kStride);
    if (kBoth) amx::load<3>(&sums[kTileRows][16], kStride);
  } else {
    amx::zero<0>();
    amx::zero<1>();
    if (kBoth) amx::zero<2>();
    if (kBoth) amx::zero<3>();
  }
  for (int64_t step = 0; step < steps; ++step) {
    amx::load<4>(a + step * kTileBytes, kTileDepth);
    amx::load<6>(scratch.expanded[step][0], kLineBytes);
    amx::dot_s8s8<0, 4, 6>();
    if (kBoth) amx::load<5>(a + a_tile_stride + step * kTileBytes, kTileDepth);
    if (kBoth) amx::dot_s8s8<2, 5, 6>();
    amx::load<7>(scratch.expanded[step][1], kLineBytes);
    amx::dot_s8s8<1, 4, 7>();
    if (kBoth) amx::dot_s8s8<3, 5, 7>();
  }
  amx::store<0>(&sums[0][0], kStride);
  amx::store<1>(&sums[0][16], kStride);
  if (kBoth) amx::store<2>(&sums[kTileRows][0], kStride);
  if (kBoth) amx::store<3>(&sums[kTileRows][16], kStride);
}

/// acc += float(S) [* t] * s for the rows of one pair.
template <bool kGroupScales>
inline void accumulate_pair(const GemmBlock& b, int64_t group, int64_t pair, __m512 s_low,
                            __m512 s_high, const int32_t (*sums)[kBlockColumns],
                            float (*acc)[kBlockColumns]) {
  const int64_t rows = std::min(b.rows - pair * kPairRows, kPairRows);
  const int64_t groups = b.weights->groups;
  const float* t = b.activations.scales + pair * kPairRows * groups + group;
  for (int64_t r = 0; r < rows; ++r) {
    __m512 low = _mm512_cvtepi32_ps(_mm512_load_si512(&sums[r][0]));
    __m512 high = _mm512_cvtepi32_ps(_mm512_load_si512(&sums[r][16]));
    if (kGroupScales) {
      const __m512 scale = _mm512_set1_ps(t[r * groups]);
      low = _mm512_mul_ps(low, scale);
      high = _mm512_mul_ps(high, scale);
    }
    _mm512_store_ps(&acc[r][0], _mm512_fmadd_ps(low, s_low, _mm512_load_ps(&acc[r][0])));
    _mm512_store_ps(&acc[r][16], _mm512_fmadd_ps(high, s_high, _mm512_load_ps(&acc[r][16])));
  }
}

void store_partials(const GemmBlock& b, int64_t block, int64_t group, int64_t pair,
                    const int32_t (*sums)[kBlockColumns]) {
  const PackedWeights& w = *b.weights;
  const int64_t n0 = block * kBlockColumns;
  for (int64_t r = 0; r < std::min(b.rows - pair * kPairRows, kPairRows); ++r) {
    int32_t* to = b.partials + ((pair * kPairRows + r) * w.groups + group) * w.n + n0;
    std::memcpy(to, sums[r], static_cast<size_t>(std::min(kBlockColumns, w.n - n0)) * 4);
  }
}

template <bool kGroupScales>
void store_block(const GemmBlock& b, int64_t block, const Scratch& scratch) {
  const PackedWeights& w = *b.weights;
  const bool has_bias = !w.bias.empty();
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t n0 = block * kBlockColumns + half * 16;
    const __m512 bias = has_bias ? _mm512_loadu_ps(&w.bias[n0]) : _mm512_setzero_ps();
    for (int64_t row = 0; row < b.rows; ++row) {
      __m512 y = _mm512_load_ps(&scratch.acc[row][half * 16]);
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

/// One group against all rows: expand, then multiply pair i while pair i - 1 is scaled.
template <bool kGroupScales>
void run_group(const GemmBlock& b, int64_t block, int64_t group, Scratch& scratch) {
  const PackedWeights& w = *b.weights;
  const int64_t steps = steps_of(w.group_size), tiles = (b.rows + kTileRows - 1) / kTileRows;
  const int64_t a_tile_stride = steps * kTileBytes;
  const int8_t* a = b.activations.codes + group * tiles * a_tile_stride;
  const int64_t pairs = (tiles + 1) / 2;
  const int64_t column = group * kBlockColumns;
  const __m512 s_low = load_scales(w.scales(block) + column, w.scale_dtype);
  const __m512 s_high = load_scales(w.scales(block) + column + 16, w.scale_dtype);
  const int64_t num_slots = steps > kMaxSteps ? kMaxPairs : 2;
  const auto finish = [&](int64_t pair) {
    const int32_t(*sums)[kBlockColumns] = scratch.sums[pair % num_slots];
    if (b.partials != nullptr) store_partials(b, block, group, pair, sums);
    accumulate_pair<kGroupScales>(b, group, pair, s_low, s_high, sums,
                                  &scratch.acc[pair * kPairRows]);
  };
  for (int64_t step = 0; step < steps; step += kMaxSteps) {
    const int64_t now = std::min(steps - step, kMaxSteps);
    const bool last = step + now == steps;
    expand(w, block, group, step, now, scratch);
    amx::compiler_barrier();
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int8_t* from = a + 2 * pair * a_tile_stride + step * kTileBytes;
      int32_t(*sums)[kBlockColumns] = scratch.sums[pair % num_slots];
      2 * pair + 1 < tiles
          ? multiply_pair<true>(from, a_tile_stride, now, step > 0, scratch, sums)
          : multiply_pair<false>(from, a_tile_stride, now, step > 0, scratch, sums);
      if (last && pair > 0) finish(pair - 1);
      amx::compiler_barrier();
    }
  }
  finish(pairs - 1);
}

template <bool kGroupScales>
void run_blocks(const GemmBlock& b) {
  Scratch scratch;
  for (int64_t block = b.block0; block < b.block1; ++block) {
    std::memset(scratch.acc, 0, static_cast<size_t>(b.rows) * sizeof scratch.acc[0]);
    for (int64_t group = 0; group < b.weights->groups; ++group) {
      run_group<kGroupScales>(b, block, group, scratch);
    }
    store_block<kGroupScales>(b, block, scratch);
  }
}

}  // namespace

void run_w4a8_amx(const GemmBlock& b) {
  amx::configure();
  b.group_scales ? run_blocks<true>(b) : run_blocks<false>(b);
  amx::release();
}

}  // namespace nibble
NIBBLE_TARGET_END
