#include "synthetic.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>

#include "base/cpu_features.h"
#include "base/thread_pool.h"

namespace nibble {
namespace {

/// splitmix64 (Steele, Lea, Flood 2014): cheap, and seedable per column, so threads do not matter.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  float uniform() { return static_cast<float>(next() >> 40) * 0x1p-24f; }  // [0, 1)
  /// Sum of 12 uniforms: close to N(0, 1), the same bits on every machine.
  float normal() {
    float sum = -6.0f;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }

 private:
  uint64_t state_;
};

uint64_t mix(uint64_t seed, const std::string& name, uint64_t index) {
  return Random(seed ^ std::hash<std::string>{}(name) ^ (index * 0xd1342543de82ef95u)).next();
}

}  // namespace

AwqTensors make_synthetic_weight(const SyntheticWeight& spec, uint64_t seed) {
  const int64_t size = spec.group_size == -1 ? spec.k : spec.group_size;
  const int64_t groups = spec.k / size;
  std::vector<uint8_t> codes(static_cast<size_t>(spec.k * spec.n));
  std::vector<uint8_t> zeros(static_cast<size_t>(groups * spec.n));
  std::vector<uint16_t> scales(static_cast<size_t>(groups * spec.n));
  parallel_for(available_cpus(), spec.n, [&](int64_t n) {
    Random random(mix(seed, spec.name, static_cast<uint64_t>(n)));
    for (int64_t g = 0; g < groups; ++g) {
      const bool negate = spec.negative_scales && (n + g) % 3 == 0;
      // about what a group of normal weights gets: range near +-3 sigma over 15 steps
      const float magnitude = 0.02f * (0.35f + 0.1f * random.uniform());
      const float scale = negate ? -magnitude : magnitude;
      const int zero = spec.symmetric ? 8 : 6 + static_cast<int>(random.next() % 4);
      zeros[g * spec.n + n] = static_cast<uint8_t>(zero);
      scales[g * spec.n + n] =
          spec.scale_dtype == Dtype::f16 ? f16_from_float(scale) : bf16_from_float(scale);
      for (int64_t i = 0; i < size; ++i) {
        const int q = static_cast<int>(std::lrintf(random.normal() * 2.5f)) + zero;
        codes[(g * size + i) * spec.n + n] = static_cast<uint8_t>(std::clamp(q, 0, 15));
      }
    }
  });
  return pack_awq_gemm(spec.k, spec.n, size, codes.data(), zeros.data(), scales.data(),
                       spec.scale_dtype);
}

std::vector<SyntheticWeight> synthetic_model() {
  return {
      {"llama-3.1-8b.q_proj", 4096, 4096, 128, false, Dtype::f16, false, false},
      {"llama-3.1-8b.k_proj", 4096, 1024, 128, false, Dtype::f16, false, false},
      {"mistral-7b.o_proj.symmetric", 4096, 1024, 128, true, Dtype::f16, false, false},
      {"qwen2.5-0.5b.q_proj.bias", 896, 896, 128, false, Dtype::f16, true, false},
      {"qwen2.5-0.5b.down_proj", 4864, 896, 128, false, Dtype::f16, false, false},
      {"gemma-3-1b.gate_proj.g32", 1152, 6912, 32, true, Dtype::bf16, false, false},
      {"smollm2.down_proj.g64", 1536, 576, 64, false, Dtype::f16, false, false},
      {"per-channel.up_proj", 2048, 2048, -1, false, Dtype::f16, false, false},
      {"negative-scales.up_proj", 1024, 1024, 128, false, Dtype::f16, false, true},
  };
}

std::vector<float> make_input(InputKind kind, int64_t rows, int64_t k, uint64_t seed) {
  std::vector<float> x(static_cast<size_t>(rows * k));
  for (int64_t row = 0; row < rows; ++row) {
    Random random(mix(seed, "input", static_cast<uint64_t>(row)));
    for (int64_t i = 0; i < k; ++i) x[row * k + i] = random.normal();
    if (kind != InputKind::outliers) continue;
    for (int64_t c = 0; c < 8; ++c) x[row * k + (c * 977 + 13) % k] *= 60.0f;
    x[row * k + static_cast<int64_t>(random.next() % static_cast<uint64_t>(k))] = 400.0f;
  }
  return x;
}

}  // namespace nibble
