// The float arithmetic around the products of a decoder layer: norms, activation functions, rope,
// softmax, and the panel product that attention and 16-bit linears are made of. One table per
// instruction set, all giving the same bits: sums run over 16 lanes (lane i takes elements i,
// i + 16, ...) and are folded 8, 4, 2, 1; every multiply-add is fused; exp is one polynomial.
#pragma once

#include <cstdint>

#include "base/dtype.h"

namespace nibble {

inline constexpr int64_t kPanelColumns = 64;

/// c (rows, 64) = or += a (rows, depth) * panel (depth, 64), every output one chain of fused
/// multiply-adds in order of the depth. Strides in elements.
struct PanelProduct {
  const float* a = nullptr;
  int64_t a_stride = 0;
  const void* panel = nullptr;  // (depth, 64) row-major of panel_dtype, 64-byte aligned
  Dtype panel_dtype = Dtype::f32;
  int64_t rows = 0, depth = 0;
  float* c = nullptr;
  int64_t c_stride = 0;
  bool start_from_zero = false;  // c is written, not added to
};

/// One step of a softmax that sees its row in blocks of 64 (Milakov and Gimelshein, "Online
/// normalizer calculation for softmax", 2018).
struct SoftmaxState {
  float max;  // of the scores so far; start: -infinity
  float sum;  // of exp(score - max) so far; start: 0
};

struct FloatOps {
  const char* name;  // "avx512", ...
  void (*panel_product)(const PanelProduct& product);
  /// scores (64): in [first, last) they become exp(score - new max), elsewhere 0. Returns what
  /// earlier results must be multiplied with.
  float (*softmax_block)(float* scores, int64_t first, int64_t last, SoftmaxState* state);
  void (*scale)(float* x, int64_t count, float factor);
  void (*add)(float* x, const float* y, int64_t count);  // x += y
  /// out = x / sqrt(mean(x^2) + eps) * weight; out may be x.
  void (*rms_norm)(const float* x, const float* weight, int64_t count, float eps, float* out);
  void (*silu_mul)(const float* gate, const float* up, int64_t count, float* out);
  void (*gelu_tanh_mul)(const float* gate, const float* up, int64_t count, float* out);
  /// Rotates pairs (x[i], x[i + half]) by the angles of cosine and sine (half each).
  void (*rope)(float* x, const float* cosine, const float* sine, int64_t half);
};

/// The widest table that this CPU executes.
const FloatOps& float_ops();

const FloatOps& float_ops_scalar();
const FloatOps& float_ops_avx2();    // only if built with NIBBLE_SIMD
const FloatOps& float_ops_avx512();  // likewise

}  // namespace nibble
