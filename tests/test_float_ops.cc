// Float arithmetic around the products: every instruction set gives the bits of the plain C++
// table, which is checked against double arithmetic; 16-bit and 8-bit linears against naive loops.
#include "gemm/float_ops.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "base/cpu_features.h"
#include "gemm/cpu/kernel.h"
#include "gemm/dense.h"
#include "gemm/int8.h"

namespace nibble {
namespace {

std::vector<const FloatOps*> tables() {
  std::vector<const FloatOps*> all = {&float_ops_scalar()};
#if NIBBLE_SIMD
  if (cpu_features().avx2) all.push_back(&float_ops_avx2());
  if (cpu_features().avx512) all.push_back(&float_ops_avx512());
#endif
  return all;
}

class FloatOpsTest : public ::testing::Test {
 protected:
  std::vector<float> random(int64_t count, float spread = 1) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = spread * std::normal_distribution<float>()(random_);
    return values;
  }

  /// `run(table)` gives the same bytes for every table; returns them.
  template <class Run>
  std::vector<float> same_bits(const Run& run) {
    const std::vector<float> expected = run(float_ops_scalar());
    for (const FloatOps* table : tables()) {
      const std::vector<float> found = run(*table);
      EXPECT_EQ(found.size(), expected.size());
      EXPECT_EQ(std::memcmp(found.data(), expected.data(), found.size() * sizeof(float)), 0)
          << table->name;
    }
    return expected;
  }

  std::mt19937 random_{20261123};
};

constexpr int64_t kCounts[] = {1, 7, 15, 16, 17, 64, 100, 576};

TEST_F(FloatOpsTest, PanelProductIsOneChainOfFusedMultiplyAddsForEveryShapeAndType) {
  for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16}) {
    for (const int64_t rows : {1, 2, 3, 5, 6, 7, 13}) {
      for (const int64_t depth : {1, 24, 64, 65}) {
        const std::vector<float> a = random(rows * depth), values = random(depth * 64);
        AlignedBuffer panel =
            std::move(*AlignedBuffer::zeroed(static_cast<size_t>(depth * 64 * 4)));
        for (int64_t i = 0; i < depth * 64; ++i)
          store_from_float(panel.data(), i, dtype, values[i]);
        const std::vector<float> start = random(rows * 64);
        for (const bool zero : {false, true}) {
          const std::vector<float> y = same_bits([&](const FloatOps& ops) {
            std::vector<float> c = start;
            ops.panel_product(
                {a.data(), depth, panel.data(), dtype, rows, depth, c.data(), 64, zero});
            return c;
          });
          for (int64_t i = 0; i < rows * 64; ++i) {
            float sum = zero ? 0.0f : start[i];
            for (int64_t d = 0; d < depth; ++d) {
              const float b = load_as_float(panel.data(), d * 64 + i % 64, dtype);
              sum = std::fma(a[i / 64 * depth + d], b, sum);
            }
            ASSERT_EQ(y[i], sum);
          }
        }
      }
    }
  }
}

TEST_F(FloatOpsTest, SoftmaxInBlocksEqualsTheSoftmaxOfTheWholeRow) {
  for (const int64_t first : {0, 3, 64}) {
    const std::vector<float> scores = random(128, 5);
    const int64_t last = 100;  // of 128; the second block ends at 36
    const std::vector<float> result = same_bits([&](const FloatOps& ops) {
      std::vector<float> p = scores;
      SoftmaxState state{-INFINITY, 0};
      ops.softmax_block(p.data(), first, 64, &state);
      const float factor = ops.softmax_block(p.data() + 64, 0, last - 64, &state);
      for (int64_t i = 0; i < 64; ++i) p[i] *= factor;
      for (float& value : p) value /= state.sum;
      return p;
    });
    double largest = -INFINITY, sum = 0;
    for (int64_t i = first; i < last; ++i) largest = std::max<double>(largest, scores[i]);
    for (int64_t i = first; i < last; ++i) sum += std::exp(scores[i] - largest);
    for (int64_t i = 0; i < 128; ++i) {
      const bool seen = i >= first && i < last;
      const double expected = seen ? std::exp(scores[i] - largest) / sum : 0;
      EXPECT_NEAR(result[i], expected, 1e-6 * (1 + expected)) << i;
    }
  }
}

TEST_F(FloatOpsTest, ABlockThatShowsNothingChangesNothing) {
  for (const FloatOps* ops : tables()) {
    std::vector<float> scores = random(64);
    SoftmaxState state{1.5f, 2.5f};
    EXPECT_EQ(ops->softmax_block(scores.data(), 64, 64, &state), 1.0f);
    EXPECT_EQ(state.max, 1.5f);
    EXPECT_EQ(state.sum, 2.5f);
    for (const float value : scores) EXPECT_EQ(value, 0.0f);
  }
}

TEST_F(FloatOpsTest, NormsAndActivationsMatchDoubleArithmetic) {
  for (const int64_t count : kCounts) {
    const std::vector<float> x = random(count, 3), w = random(count);
    const auto result = [&](auto member) {
      return same_bits([&](const FloatOps& ops) {
        std::vector<float> out(x.size());
        (ops.*member)(x.data(), w.data(), count, out.data());
        return out;
      });
    };
    const std::vector<float> silu = result(&FloatOps::silu_mul);
    const std::vector<float> gelu = result(&FloatOps::gelu_tanh_mul);
    const std::vector<float> norm = same_bits([&](const FloatOps& ops) {
      std::vector<float> out(x.size());
      ops.rms_norm(x.data(), w.data(), count, 1e-5f, out.data());
      return out;
    });
    double squares = 0;
    for (const float value : x) squares += static_cast<double>(value) * value;
    const double factor = 1 / std::sqrt(squares / static_cast<double>(count) + 1e-5);
    for (int64_t i = 0; i < count; ++i) {
      const double v = x[i];
      const double tanh = std::tanh(std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v));
      EXPECT_NEAR(silu[i], v / (1 + std::exp(-v)) * w[i], 2e-6 * (1 + std::fabs(v * w[i])));
      EXPECT_NEAR(gelu[i], v / 2 * (1 + tanh) * w[i], 2e-6 * (1 + std::fabs(v * w[i])));
      EXPECT_NEAR(norm[i], v * factor * w[i], 2e-6 * (1 + std::fabs(v * factor * w[i])));
    }
  }
}

TEST_F(FloatOpsTest, ActivationsOfLargeValuesStayFinite) {
  const std::vector<float> x = {-1e30f, -200, -100, -88, 88, 100, 200, 1e30f}, one(8, 1.0f);
  for (const FloatOps* ops : tables()) {
    std::vector<float> out(8);
    ops->silu_mul(x.data(), one.data(), 8, out.data());
    for (const float value : out) EXPECT_TRUE(std::isfinite(value)) << ops->name;
    EXPECT_NEAR(out[3], 0, 1e-30);
    EXPECT_EQ(out[7], 1e30f);
  }
}

TEST_F(FloatOpsTest, RopeAddAndScaleAreTheSameBitsEverywhere) {
  for (const int64_t half : {1, 8, 12, 16, 32, 64, 128}) {
    const std::vector<float> x = random(2 * half), angles = random(half, 3);
    std::vector<float> c(angles.size()), s(angles.size());
    for (size_t i = 0; i < angles.size(); ++i)
      c[i] = std::cos(angles[i]), s[i] = std::sin(angles[i]);
    const std::vector<float> y = same_bits([&](const FloatOps& ops) {
      std::vector<float> out = x;
      ops.rope(out.data(), c.data(), s.data(), half);
      return out;
    });
    for (int64_t i = 0; i < half; ++i) {
      const double norm = std::hypot(x[i], x[half + i]);
      EXPECT_NEAR(y[i], x[i] * c[i] - x[half + i] * s[i], 1e-6 * norm);
      EXPECT_NEAR(y[half + i], x[half + i] * c[i] + x[i] * s[i], 1e-6 * norm);
    }
    same_bits([&](const FloatOps& ops) {
      std::vector<float> out = x;
      ops.add(out.data(), angles.data(), half);
      ops.scale(out.data(), half, 0.3f);
      return out;
    });
  }
}

TEST_F(FloatOpsTest, DenseLinearEqualsItsDefinitionForEveryBatchAndThreadCount) {
  for (const int64_t n : {1, 64, 100}) {
    const int64_t k = 70, most = 100;
    const std::vector<float> w = random(n * k), bias = random(n), x = random(most * k);
    const DenseWeights packed =
        std::move(*pack_dense(n, k, w.data(), Dtype::f32, bias.data(), Dtype::f32, 2));
    for (const int64_t m : {int64_t{1}, int64_t{5}, most}) {
      for (const int threads : {1, 3}) {
        std::vector<float> y(static_cast<size_t>(m * n));
        run_dense(packed, m, x.data(), k, y.data(), n, threads);
        for (int64_t i = 0; i < m * n; ++i) {
          float sum = 0;
          for (int64_t j = 0; j < k; ++j) sum = std::fma(x[i / n * k + j], w[i % n * k + j], sum);
          ASSERT_EQ(y[i], sum + bias[i % n]);
        }
      }
    }
  }
}

TEST_F(FloatOpsTest, EveryInt8KernelGivesTheBitsOfTheScalarOne) {
  for (const int64_t k : {3, 64, 70, 576}) {
    for (const int64_t n : {1, 16, 50, 100}) {
      const std::vector<float> w = random(n * k);
      const Int8Weights packed = std::move(*pack_int8(n, k, w.data(), Dtype::f32, 1));
      for (const int64_t m : {1, 2, 3, 8, 11}) {
        const int64_t width = packed.quads * 4;
        std::vector<int8_t> codes(static_cast<size_t>(m * width));
        std::vector<int32_t> sums(static_cast<size_t>(m));
        for (int64_t i = 0; i < m * width; ++i) {
          // extremes first: 127 * 255 twice in 16 bits is what VPMADDUBSW cannot hold
          codes[i] = m == 1 ? 127 : static_cast<int8_t>(static_cast<int>(random_() % 255) - 127);
          sums[i / width] += codes[i];
        }
        const std::vector<float> scales = random(m);
        std::vector<float> expected;
        for (const Int8Kernel& kernel : int8_kernels()) {
          if (isa_missing_reason(kernel.isa) != nullptr) continue;
          std::vector<float> y(static_cast<size_t>(m * n));
          kernel.run({&packed, codes.data(), scales.data(), sums.data(), width, m, 0, packed.blocks,
                      y.data(), n});
          if (expected.empty()) expected = y;
          EXPECT_EQ(y, expected) << kernel.name << " k " << k << " n " << n << " m " << m;
        }
      }
    }
  }
}

TEST_F(FloatOpsTest, Int8LinearIsNearTheFloatOneAndTheSameForEveryBatch) {
  for (const int64_t k : {3, 64, 70, 576}) {
    for (const int64_t n : {1, 16, 50, 200}) {
      const std::vector<float> w = random(n * k), x = random(11 * k);
      const Int8Weights packed = std::move(*pack_int8(n, k, w.data(), Dtype::f32, 2));
      for (const int64_t m : {1, 2, 3, 8, 11}) {
        std::vector<float> y(static_cast<size_t>(m * n)), again = y;
        ASSERT_TRUE(run_int8(packed, m, x.data(), k, y.data(), n, 3).ok());
        for (int64_t row = 0; row < m; ++row) {  // alone: the same bits
          ASSERT_TRUE(run_int8(packed, 1, &x[row * k], k, &again[row * n], n, 1).ok());
        }
        EXPECT_EQ(y, again);
        for (int64_t i = 0; i < m * n; ++i) {
          double sum = 0, size = 0;
          for (int64_t j = 0; j < k; ++j) {
            const double product = static_cast<double>(x[i / n * k + j]) * w[i % n * k + j];
            sum += product;
            size += std::fabs(product);
          }
          // each factor is off by at most half a step of 1/127 of the largest in its row
          EXPECT_NEAR(y[i], sum, 0.05 * size + 0.05 * static_cast<double>(k)) << i;
        }
      }
    }
  }
}

TEST_F(FloatOpsTest, Int8LinearRefusesWhatIsNotFinite) {
  std::vector<float> w = random(32), x = random(16);
  w[20] = NAN;
  EXPECT_EQ(pack_int8(2, 16, w.data(), Dtype::f32, 1).status().code(), Code::non_finite);
  w[20] = 0;
  const Int8Weights packed = std::move(*pack_int8(2, 16, w.data(), Dtype::f32, 1));
  x[3] = INFINITY;
  float y[2];
  EXPECT_EQ(run_int8(packed, 1, x.data(), 16, y, 2, 1).code(), Code::non_finite);
}

}  // namespace
}  // namespace nibble
