// Rope, q and k norms and the cache append, against the functions that the CPU runs.
#include <fmt/format.h>

#include <cmath>

#include "gemm/float_ops.h"
#include "kv_testing.h"
#include "model/rope.h"

namespace nibble::cuda::testing {
namespace {

struct Case {
  int64_t heads, kv_heads, head_dim;
  Element type, kv_type;
  bool norm = false;
};

constexpr Case kCases[] = {
    {8, 2, 128, Element::bf16, Element::bf16}, {8, 2, 128, Element::bf16, Element::f16, true},
    {9, 3, 64, Element::f16, Element::f16},    {4, 1, 256, Element::bf16, Element::f16, true},
    {4, 2, 32, Element::f16, Element::bf16},   {2, 2, 16, Element::f16, Element::f16, true},
    {2, 1, 96, Element::bf16, Element::bf16},
};

constexpr int64_t kPositions = 200, kSequences = 5;

struct RopeTest {
  Case c;
  std::vector<int32_t> sequence = {4, 0, 1, 1, 2, 3}, position = {0, 63, 64, 65, 199, -1};
  std::vector<uint16_t> qkv;
  std::vector<float> cosine, sine, q_norm, k_norm;
  PagedCache cache;
  Buffer device_qkv, q, device_sequence, device_position, device_cosine, device_sine, device_q_norm,
      device_k_norm, faults;

  RopeTest(const Case& a_case, std::mt19937& random)
      : c(a_case),
        qkv(random_bits(6 * width(), c.type, 2.0f, random)),
        cosine(static_cast<size_t>(kPositions * c.head_dim / 2)),
        sine(cosine.size()),
        q_norm(weights(random)),
        k_norm(weights(random)),
        cache(c.kv_type, c.kv_heads, c.head_dim, kSequences, kPositions, random, false),
        device_qkv(qkv),
        q(static_cast<size_t>(6 * c.heads * c.head_dim * 2)),
        device_sequence(sequence),
        device_position(position),
        device_cosine(angles(cosine, sine)),
        device_sine(sine),
        device_q_norm(q_norm),
        device_k_norm(k_norm),
        faults(kSequences * 4, 0) {}

  int64_t width() const { return (c.heads + 2 * c.kv_heads) * c.head_dim; }
  std::vector<float> weights(std::mt19937& random) const {
    std::vector<float> w(static_cast<size_t>(c.head_dim));
    for (float& v : w) v = 1.0f + 0.3f * std::normal_distribution<float>()(random);
    return w;
  }
  const std::vector<float>& angles(std::vector<float>& to_cosine,
                                   std::vector<float>& to_sine) const {
    const std::vector<float> frequencies = rope_frequencies(RopeConfig{}, c.head_dim);
    for (int64_t p = 0; p < kPositions; ++p) {
      rope_angles(frequencies, p, &to_cosine[p * c.head_dim / 2], &to_sine[p * c.head_dim / 2]);
    }
    return to_cosine;
  }

  RopeArgs args() const {
    RopeArgs a;
    a.type = c.type;
    a.qkv = device_qkv.as<>();
    a.qkv_stride = width();
    a.rows = 6;
    a.heads = c.heads;
    a.q = q.as<>();
    a.q_stride = c.heads * c.head_dim;
    a.kv = cache.pages();
    a.sequence = device_sequence.as<int32_t>();
    a.position = device_position.as<int32_t>();
    a.cosine = device_cosine.as<float>();
    a.sine = device_sine.as<float>();
    if (c.norm) {
      a.q_norm = device_q_norm.as<float>();
      a.k_norm = device_k_norm.as<float>();
    }
    a.eps = 1e-6f;
    a.faults = faults.as<int32_t>();
    return a;
  }

  /// What the CPU makes of head `head` of the row's qkv.
  std::vector<float> expected(int64_t row, int64_t head) const {
    std::vector<float> x(static_cast<size_t>(c.head_dim));
    for (int64_t i = 0; i < c.head_dim; ++i) {
      x[i] = load_as_float(qkv.data(), row * width() + head * c.head_dim + i,
                           static_cast<Dtype>(c.type));
    }
    if (head >= c.heads + c.kv_heads) return x;
    const FloatOps& ops = float_ops();
    const std::vector<float>& norm = head < c.heads ? q_norm : k_norm;
    if (c.norm) ops.rms_norm(x.data(), norm.data(), c.head_dim, 1e-6f, x.data());
    const int64_t at = position[row] * c.head_dim / 2;
    ops.rope(x.data(), &cosine[at], &sine[at], c.head_dim / 2);
    return x;
  }

  /// Without norms the same bits; with them squares are summed in another order: factors may be
  /// head_dim roundings apart, results a rounding to 16 bits more.
  void expect_close(uint16_t found, float expected) const {
    const auto dtype = static_cast<Dtype>(c.kv_type);
    if (!c.norm) {
      uint16_t bits;
      store_from_float(&bits, 0, dtype, expected);
      ASSERT_EQ(found, bits);
      return;
    }
    const float unit = c.kv_type == Element::f16 ? 0x1p-11f : 0x1p-8f;
    ASSERT_NEAR(load_as_float(&found, 0, dtype), expected,
                std::abs(expected) * unit + 8 * static_cast<float>(c.head_dim) * 0x1p-24f);
  }
};

TEST(CudaRope, EqualsTheCpu) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(21);
  for (const Case& c : kCases) {
    SCOPED_TRACE(
        fmt::format("heads {}/{} dim {} norm {}", c.heads, c.kv_heads, c.head_dim, c.norm));
    const RopeTest t(c, random);
    NIBBLE_CHECK_CUDA(launch_rope(t.args(), nullptr));
    NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
    const std::vector<uint16_t> q = t.q.download<uint16_t>();
    const std::vector<uint16_t> keys = t.cache.device_keys.download<uint16_t>();
    const std::vector<uint16_t> values = t.cache.device_values.download<uint16_t>();
    std::vector<bool> written(keys.size());
    for (int64_t row = 0; row < 5; ++row) {
      for (int64_t head = 0; head < c.heads + 2 * c.kv_heads; ++head) {
        const std::vector<float> x = t.expected(row, head);
        for (int64_t i = 0; i < c.head_dim; ++i) {
          uint16_t found;
          if (head < c.heads) {
            found = q[(row * c.heads + head) * c.head_dim + i];
          } else {
            const size_t at =
                t.cache.index(t.sequence[row], t.position[row], (head - c.heads) % c.kv_heads, i);
            found = (head < c.heads + c.kv_heads ? keys : values)[at];
            written[at] = true;
          }
          t.expect_close(found, x[i]);
          if (HasFatalFailure()) return;
        }
      }
    }
    for (size_t i = 0; i < keys.size(); ++i) {  // and nothing else
      if (written[i]) continue;
      ASSERT_EQ(keys[i] | values[i], 0);
    }
    for (int64_t i = 0; i < c.heads * c.head_dim; ++i) {
      ASSERT_EQ(q[5 * c.heads * c.head_dim + i], 0xcccc);  // position -1
    }
    ASSERT_EQ(t.faults.download<int32_t>(), std::vector<int32_t>(kSequences));
    ASSERT_TRUE(t.q.guard_is_intact() && t.cache.device_keys.guard_is_intact() &&
                t.cache.device_values.guard_is_intact() && t.faults.guard_is_intact());
  }
}

TEST(CudaRope, InPlaceIsTheSame) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(22);
  const RopeTest t(kCases[0], random);
  RopeArgs args = t.args();
  NIBBLE_CHECK_CUDA(launch_rope(args, nullptr));
  args.q = t.device_qkv.as<>();
  args.q_stride = args.qkv_stride;
  NIBBLE_CHECK_CUDA(launch_rope(args, nullptr));
  NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
  const std::vector<uint16_t> apart = t.q.download<uint16_t>();
  const std::vector<uint16_t> in_place = t.device_qkv.download<uint16_t>();
  const int64_t width = t.c.heads * t.c.head_dim;
  for (int64_t row = 0; row < 5; ++row) {
    for (int64_t i = 0; i < width; ++i) {
      ASSERT_EQ(in_place[row * t.width() + i], apart[row * width + i]);
    }
  }
}

TEST(CudaRope, FaultsAreOfTheirSequenceAndStoredAsZeros) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(23);
  RopeTest t({2, 1, 64, Element::bf16, Element::f16}, random);
  const int64_t v = 3 * t.c.head_dim;
  store_from_float(t.qkv.data(), v + 7, Dtype::bf16, 1e6f);         // row 0, sequence 4: v
  store_from_float(t.qkv.data(), t.width() + 3, Dtype::bf16, NAN);  // row 1, sequence 0: q
  store_from_float(t.qkv.data(), 4 * t.width() + 130, Dtype::bf16, INFINITY);  // row 4, 2: k
  t.device_qkv.upload(t.qkv.data());
  NIBBLE_CHECK_CUDA(launch_rope(t.args(), nullptr));
  NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
  EXPECT_EQ(t.faults.download<int32_t>(), (std::vector<int32_t>{1, 0, 1, 0, 1}));
  const std::vector<uint16_t> values = t.cache.device_values.download<uint16_t>();
  EXPECT_EQ(values[t.cache.index(4, 0, 0, 7)], 0);
  EXPECT_NE(values[t.cache.index(4, 0, 0, 6)], 0);
  for (const uint16_t bits : t.cache.device_keys.download<uint16_t>()) {
    ASSERT_TRUE(std::isfinite(load_as_float(&bits, 0, Dtype::f16)));
  }
}

TEST(CudaRope, RefusesWhatItCannotDo) {
  RopeArgs args;
  EXPECT_EQ(launch_rope(args, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace nibble::cuda::testing
