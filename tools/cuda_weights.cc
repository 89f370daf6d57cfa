// See cuda_weights.h.
#include "cuda_weights.h"

#include <random>

namespace nibble::cli {
namespace {

using cuda::DeviceInfo;
using cuda::DeviceWeights;

constexpr uint64_t kSeed = 1;

std::vector<uint32_t> random_words(int64_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<uint32_t> words(static_cast<size_t>(count));
  for (uint32_t& word : words) word = static_cast<uint32_t>(random());
  return words;
}

}  // namespace

Result<ColdWeights> make_cold_weights(const DeviceInfo& device, int64_t n, int64_t k,
                                      int64_t group_size) {
  ColdWeights w;
  const int64_t groups = k / group_size;
  w.tensors = {k,
               n,
               group_size,
               Dtype::f16,
               random_words(k * n / 8, kSeed),
               random_words(groups * n / 8, kSeed + 1),
               {}};
  std::mt19937 random(kSeed);
  for (int64_t i = 0; i < groups * n; ++i) {
    w.tensors.scales.push_back(
        f16_from_float(0.002f + 0.004f * static_cast<float>(random() >> 8) * 0x1p-24f));
  }
  const int64_t bytes = cuda::packed_layout(n, k, group_size).bytes();
  for (int64_t held = 0; held < kColdBytes; held += bytes) {
    Result<DeviceWeights> copy = DeviceWeights::create(device, w.tensors.view());
    if (!copy.ok()) return copy.status();
    w.copies.push_back(std::move(*copy));
  }
  return w;
}

}  // namespace nibble::cli
