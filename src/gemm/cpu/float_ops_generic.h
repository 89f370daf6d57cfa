// The functions of FloatOps, written once over a vector of 16 floats, V16. Included by one file per
// instruction set, inside its target region, after it has defined in its unnamed namespace:
//   V16                                   zero(), broadcast(float), load(const float*),
//   load_panel<Dtype>(const void*, index), store(float*, V16), fma(a, b, c), add, sub, mul, div,
//   maximum, round_even, power_of_two(V16 of integers in -126..127), sum_lanes, max_lane
//   kTileRows                             rows of the register tile of 64 columns
// No include guard on purpose: every includer compiles its own copy.

/// The first `count` of 16 floats, the rest zero.
inline V16 load_some(const float* x, int64_t count) {
  if (count >= 16) return load(x);
  alignas(64) float lanes[16] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = x[i];
  return load(lanes);
}

inline void store_some(float* x, int64_t count, V16 v) {
  if (count >= 16) return store(x, v);
  alignas(64) float lanes[16];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) x[i] = lanes[i];
}

/// e^x for x <= 88: 2^n * p(r), |r| <= ln(2) / 2, p a polynomial of degree 6 (relative error below
/// 3e-7). Below -87 the result is e^-87.
inline V16 exponential(V16 x) {
  x = maximum(x, broadcast(-87.0f));
  const V16 n = round_even(mul(x, broadcast(1.44269504f)));
  V16 r = fma(n, broadcast(-0.693359375f), x);  // ln 2 in two parts: the first product is exact
  r = fma(n, broadcast(2.12194440e-4f), r);
  V16 p = broadcast(1.0f / 720);
  p = fma(p, r, broadcast(1.0f / 120));
  p = fma(p, r, broadcast(1.0f / 24));
  p = fma(p, r, broadcast(1.0f / 6));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  return mul(p, power_of_two(n));
}

/// x / (1 + e^-x)
inline V16 silu(V16 x) {
  const V16 negative = minimum(sub(zero(), x), broadcast(88.0f));
  return div(x, add(broadcast(1.0f), exponential(negative)));
}

/// x/2 (1 + tanh(u)) = x / (1 + e^-2u), u = sqrt(2/pi) (x + 0.044715 x^3)
inline V16 gelu_tanh(V16 x) {
  const V16 cube = mul(mul(x, x), x);
  const V16 u = mul(broadcast(0.7978845608f), fma(broadcast(0.044715f), cube, x));
  const V16 negative = minimum(mul(broadcast(-2.0f), u), broadcast(88.0f));
  return div(x, add(broadcast(1.0f), exponential(negative)));
}

template <int kRows, Dtype kDtype>
void panel_tile(const PanelProduct& p, int64_t row) {
  const float* a = p.a + row * p.a_stride;
  float* c = p.c + row * p.c_stride;
  for (int64_t part = 0; part < 4; part += kTileVectors<kRows>) {
    V16 acc[kRows][kTileVectors<kRows>];
    unroll<kRows>([&](auto r) NIBBLE_INLINE {
      unroll<kTileVectors<kRows>>([&](auto v) NIBBLE_INLINE {
        acc[r][v] = p.start_from_zero ? zero() : load(c + r * p.c_stride + (part + v) * 16);
      });
    });
    for (int64_t d = 0; d < p.depth; ++d) {
      V16 b[kTileVectors<kRows>];
      unroll<kTileVectors<kRows>>([&](auto v) NIBBLE_INLINE {
        b[v] = load_panel<kDtype>(p.panel, d * kPanelColumns + (part + v) * 16);
      });
      unroll<kRows>([&](auto r) NIBBLE_INLINE {
        const V16 x = broadcast(a[r * p.a_stride + d]);
        unroll<kTileVectors<kRows>>([&](auto v)
                                        NIBBLE_INLINE { acc[r][v] = fma(x, b[v], acc[r][v]); });
      });
    }
    unroll<kRows>([&](auto r) NIBBLE_INLINE {
      unroll<kTileVectors<kRows>>(
          [&](auto v) NIBBLE_INLINE { store(c + r * p.c_stride + (part + v) * 16, acc[r][v]); });
    });
  }
}

template <Dtype kDtype>
void panel_rows(const PanelProduct& p) {
  int64_t row = 0;
  for (; p.rows - row >= kTileRows; row += kTileRows) panel_tile<kTileRows, kDtype>(p, row);
  for (; p.rows - row >= 2; row += 2) panel_tile<2, kDtype>(p, row);
  for (; row < p.rows; ++row) panel_tile<1, kDtype>(p, row);
}

void panel_product_isa(const PanelProduct& p) {
  switch (p.panel_dtype) {
    case Dtype::f32: return panel_rows<Dtype::f32>(p);
    case Dtype::f16: return panel_rows<Dtype::f16>(p);
    case Dtype::bf16: return panel_rows<Dtype::bf16>(p);
  }
}

float softmax_block_isa(float* scores, int64_t first, int64_t last, SoftmaxState* state) {
  for (int64_t i = 0; i < first; ++i) scores[i] = -INFINITY;
  for (int64_t i = last; i < 64; ++i) scores[i] = -INFINITY;
  V16 s[4];
  for (int v = 0; v < 4; ++v) s[v] = load(scores + 16 * v);
  const float block = max_lane(maximum(maximum(s[0], s[1]), maximum(s[2], s[3])));
  if (first >= last || block == -INFINITY) {  // nothing visible here
    for (int v = 0; v < 4; ++v) store(scores + 16 * v, zero());
    return 1.0f;
  }
  const float before = state->max, now = before > block ? before : block;
  const V16 limit = broadcast(now);
  for (int v = 0; v < 4; ++v) store(scores + 16 * v, exponential(sub(s[v], limit)));
  // exponential() of -infinity is e^-87, not 0
  for (int64_t i = 0; i < first; ++i) scores[i] = 0;
  for (int64_t i = last; i < 64; ++i) scores[i] = 0;
  V16 sum = load(scores);
  for (int v = 1; v < 4; ++v) sum = add(sum, load(scores + 16 * v));
  float factor = 0;
  if (before == now) {
    factor = 1;
  } else if (before > -INFINITY) {
    alignas(64) float lanes[16];
    store(lanes, exponential(broadcast(before - now)));
    factor = lanes[0];
  }
  state->max = now;
  state->sum = __builtin_fmaf(state->sum, factor, sum_lanes(sum));
  return factor;
}

void scale_isa(float* x, int64_t count, float factor) {
  for (int64_t i = 0; i < count; i += 16) {
    store_some(x + i, count - i, mul(load_some(x + i, count - i), broadcast(factor)));
  }
}

void add_isa(float* x, const float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    store_some(x + i, count - i, add(load_some(x + i, count - i), load_some(y + i, count - i)));
  }
}

void rms_norm_isa(const float* x, const float* weight, int64_t count, float eps, float* out) {
  V16 squares = zero();
  for (int64_t i = 0; i < count; i += 16) {
    const V16 v = load_some(x + i, count - i);
    squares = fma(v, v, squares);
  }
  const float mean = sum_lanes(squares) / static_cast<float>(count);
  const V16 factor = broadcast(1.0f / __builtin_sqrtf(mean + eps));
  for (int64_t i = 0; i < count; i += 16) {
    const V16 v = mul(load_some(x + i, count - i), factor);
    store_some(out + i, count - i, mul(v, load_some(weight + i, count - i)));
  }
}

void silu_mul_isa(const float* gate, const float* up, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const V16 g = silu(load_some(gate + i, count - i));
    store_some(out + i, count - i, mul(g, load_some(up + i, count - i)));
  }
}

void gelu_tanh_mul_isa(const float* gate, const float* up, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const V16 g = gelu_tanh(load_some(gate + i, count - i));
    store_some(out + i, count - i, mul(g, load_some(up + i, count - i)));
  }
}

void rope_isa(float* x, const float* cosine, const float* sine, int64_t half) {
  for (int64_t i = 0; i < half; i += 16) {
    const int64_t left = half - i;
    const V16 a = load_some(x + i, left), b = load_some(x + half + i, left);
    const V16 c = load_some(cosine + i, left), s = load_some(sine + i, left);
    store_some(x + i, left, sub(mul(a, c), mul(b, s)));
    store_some(x + half + i, left, fma(b, c, mul(a, s)));
  }
}

constexpr FloatOps make_ops(const char* name) {
  return {name,         panel_product_isa, softmax_block_isa, scale_isa, add_isa,
          rms_norm_isa, silu_mul_isa,      gelu_tanh_mul_isa, rope_isa};
}
