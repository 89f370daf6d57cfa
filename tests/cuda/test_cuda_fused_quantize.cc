// The quantizers with a norm or a gate in front, against the same arithmetic on the host: the norm
// in the order that fused_quantize.h promises, so bit for bit; the gate in double, because no two
// exponential functions round alike.
#include <fmt/format.h>

#include <cmath>

#include "cuda_testing.h"
#include "gemm/cuda/fused_quantize.h"
#include "gemm/cuda/gate_cluster.h"
#include "gemm/ref.h"

namespace nibble::cuda::testing {
namespace {

struct Shape {
  int64_t m, k;
  Granularity granularity = Granularity::token;
  int64_t group_size = 128;
};

constexpr Shape kShapes[] = {{1, 4096},
                             {3, 264},
                             {5, 1000},
                             {300, 2048},
                             {2, 28672},
                             {420, 14336},
                             {900, 8200},
                             {7, 4096, Granularity::group},
                             {270, 5120, Granularity::group},
                             {4, 1088, Granularity::group, 64},
                             {6, 96, Granularity::group, 32}};

/// 16-bit rows: row 1 is all zeros, the last of several has a NaN.
std::vector<uint16_t> rows_of(int64_t m, int64_t k, Element type, std::mt19937& random) {
  std::vector<uint16_t> bits(static_cast<size_t>(m * k));
  for (int64_t i = 0; i < m * k; ++i) {
    float value = std::normal_distribution<float>()(random) * (random() % 301 == 0 ? 30.0f : 1.0f);
    if (i / k == 1) value = 0;
    if (m > 2 && i == m * k - 2) value = NAN;
    store_from_float(bits.data(), i, static_cast<Dtype>(type), value);
  }
  return bits;
}

/// Device memory for the codes, scales and sums of one shape.
struct Quantized {
  QuantizeArgs args;
  Buffer codes, scales, sums;

  Quantized(const Shape& s, Element type)
      : codes(static_cast<size_t>(s.m * padded(s))),
        scales(static_cast<size_t>(s.m * scales_of_row(s) * 4)),
        sums(static_cast<size_t>(s.m * padded(s) / promoted_depth(s.group_size) * 4)) {
    args.x_stride = args.k = s.k;
    args.type = type;
    args.m = s.m;
    args.padded_k = padded(s);
    args.group_size = s.group_size;
    args.promoted = static_cast<int>(promoted_depth(s.group_size));
    args.scaling = s.granularity == Granularity::group ? Scaling::group : Scaling::token;
    args.codes = codes.as<int8_t>();
    args.scales = scales.as<float>();
    args.sums = sums.as<int32_t>();
  }
  static int64_t padded(const Shape& s) { return (s.k + kSlabDepth - 1) / kSlabDepth * kSlabDepth; }
  static int64_t scales_of_row(const Shape& s) {
    return s.granularity == Granularity::group ? s.k / s.group_size : 1;
  }
};

float pairwise(std::vector<float> lanes) {
  for (size_t d = 16; d > 0; d /= 2) {
    const std::vector<float> before = lanes;
    for (size_t i = 0; i < 32; ++i) lanes[i] = before[i] + before[i ^ d];
  }
  return lanes[0];
}

float sum_of_squares(const std::vector<float>& h) {
  std::vector<float> last(32);
  for (size_t block = 0; block * 256 < h.size(); ++block) {
    std::vector<float> chunks(32);
    for (size_t i = 0; i < 256 && block * 256 + i < h.size(); ++i) {
      const float v = h[block * 256 + i];
      chunks[i / 8] = std::fma(v, v, chunks[i / 8]);
    }
    last[block % 32] += pairwise(chunks);
  }
  return pairwise(last);
}

void expect_row(const Quantized& q, const Shape& s, int64_t row, const std::vector<float>& values) {
  const std::vector<int8_t> codes = q.codes.download<int8_t>();
  const std::vector<float> scales = q.scales.download<float>();
  const int8_t* found = codes.data() + row * q.args.padded_k;
  const int64_t width = Quantized::scales_of_row(s);
  if (std::isnan(values[s.k - 2])) {
    EXPECT_TRUE(std::isnan(scales[row * width + (s.k - 2) / (s.k / width)]));
    return;
  }
  const Problem problem{.m = 1,
                        .n = 8,
                        .k = s.k,
                        .group_size = width == 1 ? s.k : s.group_size,
                        .granularity = s.granularity};
  const ref::Activations expected = ref::quantize(problem, {.x = values.data(), .x_stride = s.k});
  for (int64_t i = 0; i < width; ++i) ASSERT_EQ(scales[row * width + i], expected.scales[i]);
  std::vector<int32_t> expected_sums(static_cast<size_t>(q.args.padded_k / q.args.promoted));
  for (int64_t i = 0; i < q.args.padded_k; ++i) {
    const int8_t code = i < s.k ? expected.codes[i] : int8_t{0};
    ASSERT_EQ(found[i], code) << "row " << row << ", k " << i;
    expected_sums[i / q.args.promoted] += code;
  }
  const std::vector<int32_t> sums = q.sums.download<int32_t>();
  for (size_t i = 0; i < expected_sums.size(); ++i) {
    ASSERT_EQ(sums[row * expected_sums.size() + i], expected_sums[i]);
  }
}

std::vector<int64_t> sampled_rows(int64_t m) {
  std::vector<int64_t> rows = {0};
  for (const int64_t row : {int64_t{1}, m / 2, m - 1}) {
    if (row > rows.back() && row < m) rows.push_back(row);
  }
  return rows;
}

/// A norm's input on host and device: what NormArgs asks for.
struct NormCase {
  NormArgs args;
  std::vector<float> hidden, norm, post_norm;
  std::vector<uint16_t> delta;
  Buffer device_hidden, device_norm, device_post_norm, device_delta;

  NormCase(const Shape& s, Element type, bool with_delta, bool with_post_norm, std::mt19937& random)
      : hidden(floats_of(rows_of(s.m, s.k, Element::bf16, random), Element::bf16)),
        norm(floats_of(rows_of(1, s.k, Element::f16, random), Element::f16)),
        post_norm(floats_of(rows_of(1, s.k, Element::f16, random), Element::f16)),
        delta(rows_of(s.m, s.k, type, random)),
        device_hidden(hidden),
        device_norm(norm),
        device_post_norm(post_norm),
        device_delta(delta) {
    for (float& h : hidden) h *= 1.0f + 0x1p-12f;  // more bits than 16 hold
    device_hidden.upload(hidden.data());
    args.m = s.m;
    args.k = s.k;
    args.hidden = device_hidden.as<float>();
    args.type = type;
    args.norm = device_norm.as<float>();
    args.eps = 1e-5f;
    if (with_delta) args.delta = device_delta.as<>();
    if (with_post_norm) args.post_norm = device_post_norm.as<float>();
  }
  static std::vector<float> floats_of(const std::vector<uint16_t>& bits, Element type) {
    std::vector<float> values(bits.size());
    for (size_t i = 0; i < bits.size(); ++i) {
      values[i] = load_as_float(bits.data(), static_cast<int64_t>(i), static_cast<Dtype>(type));
    }
    return values;
  }
  float factor(const std::vector<float>& row) const {
    return 1.0f / std::sqrt(sum_of_squares(row) / static_cast<float>(args.k) + args.eps);
  }
  /// hidden of `row` after the residual add.
  std::vector<float> sum(int64_t row) const {
    const int64_t k = args.k;
    std::vector<float> h(hidden.begin() + row * k, hidden.begin() + (row + 1) * k);
    if (args.delta == nullptr) return h;
    std::vector<float> d(static_cast<size_t>(k));
    for (int64_t i = 0; i < k; ++i) {
      d[i] = load_as_float(delta.data(), row * k + i, static_cast<Dtype>(args.type));
    }
    if (args.post_norm != nullptr) {
      const float f = factor(d);
      for (int64_t i = 0; i < k; ++i) d[i] = d[i] * f * post_norm[i];
    }
    for (int64_t i = 0; i < k; ++i) h[i] = h[i] + d[i];
    return h;
  }
  std::vector<float> normalized(std::vector<float> h) const {
    const float f = factor(h);
    for (int64_t i = 0; i < args.k; ++i) h[i] = h[i] * f * norm[i];
    return h;
  }
  void expect_hidden(int64_t row, const std::vector<float>& expected) const {
    const std::vector<float> found = device_hidden.download<float>();
    for (int64_t i = 0; i < args.k; ++i) {
      if (std::isnan(expected[i])) continue;
      ASSERT_EQ(found[row * args.k + i], expected[i]);
    }
  }
};

/// Without delta, with it, and with a norm of it.
struct NormKind {
  bool delta, post_norm;
};
constexpr NormKind kNormKinds[] = {{false, false}, {true, false}, {true, true}};

TEST(CudaFusedQuantize, NormEqualsItsDocumentedOrder) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(3);
  for (const Shape& s : kShapes) {
    if (s.k > 16384) continue;
    for (const Element type : {Element::f16, Element::bf16}) {
      for (const NormKind& kind : kNormKinds) {
        SCOPED_TRACE(fmt::format("m {} k {} delta {} {}", s.m, s.k, kind.delta, kind.post_norm));
        const NormCase c(s, type, kind.delta, kind.post_norm, random);
        Quantized q(s, type);
        NIBBLE_CHECK_CUDA(launch_norm_quantize(c.args, q.args, nullptr));
        NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
        for (const int64_t row : sampled_rows(s.m)) {
          const std::vector<float> h = c.sum(row);
          c.expect_hidden(row, h);
          expect_row(q, s, row, c.normalized(h));
          if (HasFatalFailure()) return;
        }
        for (const Buffer* buffer :
             std::initializer_list<const Buffer*>{&q.codes, &q.scales, &q.sums, &c.device_hidden}) {
          ASSERT_TRUE(buffer->guard_is_intact());
        }
      }
    }
  }
}

TEST(CudaFusedQuantize, NormIn16BitsIsTheSameRowRounded) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(6);
  for (const Shape& s : {Shape{1, 4096}, Shape{300, 2048}, Shape{3, 264}, Shape{2, 16384}}) {
    for (const Element type : {Element::f16, Element::bf16}) {
      for (const NormKind& kind : kNormKinds) {
        for (const bool gather : {false, true}) {
          SCOPED_TRACE(fmt::format("m {} k {} delta {} {} gather {}", s.m, s.k, kind.delta,
                                   kind.post_norm, gather));
          NormCase c(s, type, kind.delta, kind.post_norm, random);
          std::vector<int32_t> rows;
          for (const int64_t row : sampled_rows(s.m))
            rows.insert(rows.begin(), static_cast<int32_t>(row));
          const Buffer device_rows(rows);
          if (gather) {
            c.args.gather = device_rows.as<int32_t>();
            c.args.m = static_cast<int64_t>(rows.size());
          }
          const int64_t stride = s.k + 8;
          Buffer out(static_cast<size_t>(c.args.m * stride * 2));
          NIBBLE_CHECK_CUDA(launch_norm(c.args, out.as<>(), stride, nullptr));
          NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
          const std::vector<uint16_t> found = out.download<uint16_t>();
          for (size_t i = 0; i < rows.size(); ++i) {
            const std::vector<float> h = c.sum(rows[i]), y = c.normalized(h);
            const int64_t at = (gather ? static_cast<int64_t>(i) : rows[i]) * stride;
            for (int64_t j = 0; j < s.k; ++j) {
              uint16_t expected;
              store_from_float(&expected, 0, static_cast<Dtype>(type), y[j]);
              if (std::isnan(y[j])) continue;
              ASSERT_EQ(found[at + j], expected) << rows[i] << " " << j;
            }
            const int64_t k = s.k;
            c.expect_hidden(rows[i], gather
                                         ? std::vector<float>(c.hidden.begin() + rows[i] * k,
                                                              c.hidden.begin() + (rows[i] + 1) * k)
                                         : h);
            if (HasFatalFailure()) return;
          }
          ASSERT_TRUE(out.guard_is_intact());
          for (int64_t j = s.k; j < stride; ++j) ASSERT_EQ(found[j], 0xcccc);
        }
      }
    }
  }
}

TEST(CudaFusedQuantize, ResidualAddAlone) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(7);
  for (const bool post_norm : {false, true}) {
    const NormCase c({5, 1000}, Element::bf16, true, post_norm, random);
    NIBBLE_CHECK_CUDA(launch_norm(c.args, nullptr, 0, nullptr));
    NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
    for (int64_t row = 0; row < 4; ++row) c.expect_hidden(row, c.sum(row));
  }
}

TEST(CudaFusedQuantize, NormOfARowDoesNotDependOnTheOthers) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(5);
  const Shape many{1000, 8192}, one{1, 8192};
  NormCase c(many, Element::bf16, false, false, random);
  Quantized all(many, Element::bf16), alone(one, Element::bf16);
  NIBBLE_CHECK_CUDA(launch_norm_quantize(c.args, all.args, nullptr));
  c.args.hidden += 777 * many.k;
  c.args.m = 1;
  NIBBLE_CHECK_CUDA(launch_norm_quantize(c.args, alone.args, nullptr));
  NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
  const std::vector<int8_t> codes = all.codes.download<int8_t>();
  const std::vector<int8_t> row(codes.begin() + 777 * many.k, codes.begin() + 778 * many.k);
  EXPECT_EQ(alone.codes.download<int8_t>(), row);
  EXPECT_EQ(alone.scales.download<float>()[0], all.scales.download<float>()[777]);
}

double gate_function(GateFunction function, double g) {
  const double t =
      function == GateFunction::silu ? g : 2 * 0.7978845608028654 * (g + 0.044715 * g * g * g);
  return g / (1 + std::exp(-t));
}

/// x (m, 2 k): gate, then up.
void expect_gate(const Shape& s, Element type, GateFunction function, std::mt19937& random) {
  const auto dtype = static_cast<Dtype>(type);
  const std::vector<uint16_t> x = rows_of(s.m, 2 * s.k, type, random);
  const Buffer device_x(x);
  Quantized q(s, type);
  GateQuantizeArgs args;
  args.to = q.args;
  args.to.x = device_x.as<>();
  args.to.x_stride = args.up_stride = 2 * s.k;
  args.up = device_x.as<uint16_t>() + s.k;
  args.function = function;
  NIBBLE_CHECK_CUDA(launch_gate_quantize(args, nullptr));
  NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
  const std::vector<int8_t> codes = q.codes.download<int8_t>();
  const std::vector<float> scales = q.scales.download<float>();
  const int64_t width = Quantized::scales_of_row(s), share = s.k / width;
  for (const int64_t row : sampled_rows(s.m)) {
    std::vector<double> amax(static_cast<size_t>(width)), values(static_cast<size_t>(s.k));
    for (int64_t i = 0; i < s.k; ++i) {
      values[i] = gate_function(function, load_as_float(x.data(), row * 2 * s.k + i, dtype)) *
                  load_as_float(x.data(), row * 2 * s.k + s.k + i, dtype);
      double& largest = amax[i / share];
      if (!std::isnan(largest) && !(std::abs(values[i]) <= largest)) largest = std::abs(values[i]);
    }
    for (int64_t i = 0; i < s.k; ++i) {
      const float scale = scales[row * width + i / share];
      const int code = codes[row * q.args.padded_k + i];
      if (std::isnan(amax[i / share])) {
        ASSERT_TRUE(std::isnan(scale));
        ASSERT_EQ(code, 0);
      } else if (amax[i / share] == 0) {
        ASSERT_EQ(scale, 0);
      } else {
        ASSERT_NEAR(scale, amax[i / share] / 127, 2e-6 * scale);
        ASSERT_NEAR(code, values[i] / scale, 0.501) << "row " << row << ", k " << i;
      }
    }
  }
  ASSERT_TRUE(q.codes.guard_is_intact() && q.scales.guard_is_intact());
}

TEST(CudaFusedQuantize, GateIsRoundedFromTheRightValue) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(4);
  for (Shape s : kShapes) {
    for (const Element type : {Element::f16, Element::bf16}) {
      for (const GateFunction function : {GateFunction::silu, GateFunction::gelu_tanh}) {
        SCOPED_TRACE(fmt::format("m {} k {}", s.m, s.k));
        expect_gate(s, type, function, random);
        if (HasFatalFailure()) return;
      }
    }
  }
  expect_gate({2, 40960}, Element::bf16, GateFunction::silu,
              random);  // more than stays in registers
}

TEST(CudaFusedQuantize, AGateRowOfSeveralBlocksIsThatOfOne) {
  NIBBLE_NEEDS_GPU();
  if (gpu().value().capability < 90) GTEST_SKIP() << "clusters of blocks need 9.0";
  std::mt19937 random(14);
  for (const Shape& s : {Shape{1, 14336}, Shape{33, 14336}, Shape{64, 14336}, Shape{100, 2304},
                         Shape{5, 4224}, Shape{2, 40960}, Shape{7, 1096}}) {
    for (int i = 0; i < 6; ++i) {
      SCOPED_TRACE(fmt::format("m {} k {}, {}", s.m, s.k, i));
      const Element type = i % 2 == 0 ? Element::bf16 : Element::f16;
      const Buffer x(rows_of(s.m, 2 * s.k, type, random));
      std::vector<int8_t> codes[2];
      std::vector<uint32_t> scales[2];
      std::vector<int32_t> sums[2];
      for (const bool clusters : {false, true}) {
        const Quantized q(s, type);
        GateQuantizeArgs args;
        args.to = q.args;
        args.to.wgmma_order = i % 2 == 1;
        args.to.symmetric = i != 3;
        args.to.limit = i == 3 ? 15 : i == 4 ? 7 : 127;
        args.to.clip = i == 2 ? 0.7f : 1.0f;
        args.to.x = x.as<>();
        args.to.x_stride = args.up_stride = 2 * s.k;
        args.up = x.as<uint16_t>() + s.k;
        args.function = i == 5 ? GateFunction::gelu_tanh : GateFunction::silu;
        args.clusters = clusters;
        NIBBLE_CHECK_CUDA(launch_gate_quantize(args, nullptr));
        NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
        codes[clusters] = q.codes.download<int8_t>();
        scales[clusters] = q.scales.download<uint32_t>();
        sums[clusters] = q.sums.download<int32_t>();
        ASSERT_TRUE(q.codes.guard_is_intact() && q.scales.guard_is_intact());
      }
      ASSERT_EQ(codes[1], codes[0]);
      ASSERT_EQ(scales[1], scales[0]);
      ASSERT_EQ(sums[1], sums[0]);
    }
  }
}

/// Pure, so without a GPU.
TEST(CudaFusedQuantize, GateRowsAreSharedOutWhileTheyAreFew) {
  GateQuantizeArgs args;
  args.to.k = args.to.padded_k = 14336;
  args.to.group_size = 128;
  const auto blocks = [&](int64_t m) {
    args.to.m = m;
    return gate_cluster_blocks(args);
  };
  EXPECT_EQ(blocks(1), 1);  // no clusters
  args.clusters = true;
  EXPECT_EQ(blocks(1), 8);
  EXPECT_EQ(blocks(32), 8);
  EXPECT_EQ(blocks(33), 4);
  EXPECT_EQ(blocks(128), 2);
  EXPECT_EQ(blocks(129), 1);
  args.to.k = args.to.padded_k = 2048;
  EXPECT_EQ(blocks(1), 2);
  args.to.padded_k = 1 << 17;  // more than a chunk a thread
  EXPECT_EQ(blocks(1), 1);
  args.to.padded_k = 14336;
  args.to.scaling = Scaling::group;  // is dealt to blocks anyway
  EXPECT_EQ(blocks(1), 1);
}

TEST(CudaFusedQuantize, GateIn16BitsIsRoundedFromTheRightValue) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(8);
  for (const Shape& s : {Shape{1, 14336}, Shape{70, 1096}, Shape{3, 8}}) {
    for (const Element type : {Element::f16, Element::bf16}) {
      for (const GateFunction function : {GateFunction::silu, GateFunction::gelu_tanh}) {
        const auto dtype = static_cast<Dtype>(type);
        const std::vector<uint16_t> x = rows_of(s.m, 2 * s.k, type, random);
        const Buffer device_x(x);
        Buffer out(static_cast<size_t>(s.m * s.k * 2));
        GateQuantizeArgs args;
        args.to.x = device_x.as<>();
        args.to.x_stride = args.up_stride = 2 * s.k;
        args.to.type = type;
        args.to.m = s.m;
        args.to.k = s.k;
        args.up = device_x.as<uint16_t>() + s.k;
        args.function = function;
        NIBBLE_CHECK_CUDA(launch_gate(args, out.as<>(), s.k, nullptr));
        NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
        const std::vector<uint16_t> found = out.download<uint16_t>();
        ASSERT_TRUE(out.guard_is_intact());
        const double unit = type == Element::f16 ? 0x1p-11 : 0x1p-8;
        for (int64_t i = 0; i < s.m * s.k; ++i) {
          const int64_t at = i / s.k * 2 * s.k + i % s.k;
          const double y = gate_function(function, load_as_float(x.data(), at, dtype)) *
                           load_as_float(x.data(), at + s.k, dtype);
          const float v = load_as_float(found.data(), i, dtype);
          if (std::isnan(y)) {
            ASSERT_TRUE(std::isnan(v));
          } else {  // 2e-6 as for the codes above; f16 below 2^-14 has a fixed unit
            ASSERT_NEAR(v, y, std::abs(y) * (unit + 2e-6) + 0x1p-25) << i;
          }
        }
      }
    }
  }
}

TEST(CudaFusedQuantize, RefusesWhatItCannotDo) {
  NormArgs args;
  QuantizeArgs to;
  args.m = 1;
  args.k = to.padded_k = 512;
  args.hidden = reinterpret_cast<float*>(256);  // not looked at
  args.norm = args.hidden;
  to.scaling = Scaling::tensor;
  EXPECT_EQ(launch_norm_quantize(args, to, nullptr), cudaErrorInvalidValue);
  to.scaling = Scaling::token;
  args.type = Element::f32;
  EXPECT_EQ(launch_norm_quantize(args, to, nullptr), cudaErrorInvalidValue);
  args.type = Element::bf16;
  args.k = to.padded_k = 16384 + 512;
  EXPECT_EQ(launch_norm_quantize(args, to, nullptr), cudaErrorInvalidValue);
  args.k = to.padded_k = 512;
  args.norm = nullptr;
  EXPECT_EQ(launch_norm_quantize(args, to, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(launch_norm(args, reinterpret_cast<void*>(256), 512, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace nibble::cuda::testing
