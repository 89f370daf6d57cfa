// FloatOps in plain C++, and the choice among the tables.
#include "gemm/float_ops.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>

#include "base/cpu_features.h"
#include "gemm/cpu/unroll.h"

namespace nibble {
namespace {

struct V16 {
  float lane[16];
};

constexpr int kTileRows = 3;
template <int kRows>
constexpr int kTileVectors = 1;

template <class Function>
inline V16 each_lane(Function function) {
  V16 out;
  for (int i = 0; i < 16; ++i) out.lane[i] = function(i);
  return out;
}

inline V16 zero() { return V16{}; }
inline V16 broadcast(float x) {
  return each_lane([&](int) { return x; });
}
inline V16 load(const float* x) {
  return each_lane([&](int i) { return x[i]; });
}
inline void store(float* x, V16 v) { std::copy(v.lane, v.lane + 16, x); }
inline V16 fma(V16 a, V16 b, V16 c) {
  return each_lane([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
}
inline V16 add(V16 a, V16 b) {
  return each_lane([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline V16 sub(V16 a, V16 b) {
  return each_lane([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline V16 mul(V16 a, V16 b) {
  return each_lane([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline V16 div(V16 a, V16 b) {
  return each_lane([&](int i) { return a.lane[i] / b.lane[i]; });
}
inline V16 maximum(V16 a, V16 b) {  // as VMAXPS: the second operand if one is a NaN
  return each_lane([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline V16 minimum(V16 a, V16 b) {
  return each_lane([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline V16 round_even(V16 v) {
  return each_lane([&](int i) { return std::nearbyint(v.lane[i]); });
}
inline V16 power_of_two(V16 n) {
  return each_lane(
      [&](int i) { return std::bit_cast<float>((static_cast<int32_t>(n.lane[i]) + 127) << 23); });
}

template <Dtype kDtype>
inline V16 load_panel(const void* panel, int64_t index) {
  return each_lane([&](int i) { return load_as_float(panel, index + i, kDtype); });
}

inline float sum_lanes(V16 v) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) v.lane[i] += v.lane[i + width];
  }
  return v.lane[0];
}

inline float max_lane(V16 v) { return *std::max_element(v.lane, v.lane + 16); }

#include "gemm/cpu/float_ops_generic.h"

}  // namespace

const FloatOps& float_ops_scalar() {
  static constexpr FloatOps kOps = make_ops("scalar");
  return kOps;
}

const FloatOps& float_ops() {
#if NIBBLE_SIMD
  if (cpu_features().avx512) return float_ops_avx512();
  if (cpu_features().avx2) return float_ops_avx2();
#endif
  return float_ops_scalar();
}

}  // namespace nibble
