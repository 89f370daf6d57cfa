// AMX tiles by name. All eight tiles are configured as 16 rows of 64 bytes.
// Inline assembly instead of the intrinsics for two reasons: g++ 12's _tile_loadconfig reads only
// 8 of the 64 bytes as far as the optimizer knows, so it deletes the stores to the rest; and
// _tile_loadd and _tile_stored name no memory operand, so stores around them may be moved.
#pragma once

#include <cstdint>

namespace nibble {
namespace {
namespace amx {

/// A tile in memory: 16 rows of 64 bytes. Loads and stores name it as their memory operand, so that
/// the compiler orders just what depends on each other.
constexpr int64_t kRowBytes = 64;
struct alignas(64) Tile {
  int8_t bytes[16 * kRowBytes];
};

/// Tile configuration as LDTILECFG reads it (Intel SDM, palette 1).
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

inline void configure() {
  static constexpr TileConfig config;
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

/// Back to the initial state, so that context switches need not save 8 KiB.
inline void release() { __asm__ volatile("tilerelease" ::: "memory"); }

template <int kTile>
inline void zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

template <int kTile>
inline void load(const Tile& from) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(&from), "r"(kRowBytes), "i"(kTile),
                   "m"(from));
}

/// The same for what will not be read again soon: it does not displace other data from L1.
template <int kTile>
inline void load_streaming(const Tile& from) {
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(&from), "r"(kRowBytes), "i"(kTile),
                   "m"(from));
}

template <int kTile>
inline void store(Tile& to) {
  __asm__ volatile("tilestored %%tmm%c3, (%1,%2,1)"
                   : "=m"(to)
                   : "r"(&to), "r"(kRowBytes), "i"(kTile));
}

/// C (int32) += A (signed bytes, rows) * B (signed bytes, quads of k by columns)
template <int kC, int kA, int kB>
inline void dot_s8s8() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

}  // namespace amx
}  // namespace
}  // namespace nibble
