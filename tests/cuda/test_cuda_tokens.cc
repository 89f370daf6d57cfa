// What a decoding graph begins and ends with: embedding rows, the largest logit, positions.
#include <fmt/format.h>

#include <cmath>

#include "kv_testing.h"
#include "model/sampler.h"

namespace nibble::cuda::testing {
namespace {

TEST(CudaTokens, EmbeddingRowsAreScaled) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(31);
  constexpr int64_t kVocab = 50, kWidth = 1096;
  const std::vector<int32_t> tokens = {49, 0, 7, -1, 50, 7};
  for (const Element type : {Element::f16, Element::bf16}) {
    const std::vector<uint16_t> table = random_bits(kVocab * kWidth, type, 1.0f, random);
    const Buffer device_table(table), device_tokens(tokens);
    const Buffer hidden(tokens.size() * kWidth * 4);
    EmbeddingArgs args;
    args.type = type;
    args.table = device_table.as<>();
    args.vocab = kVocab;
    args.width = kWidth;
    args.tokens = device_tokens.as<int32_t>();
    args.rows = static_cast<int64_t>(tokens.size());
    args.scale = 33.5f;
    args.hidden = hidden.as<float>();
    NIBBLE_CHECK_CUDA(launch_embedding(args, nullptr));
    NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
    const std::vector<float> found = hidden.download<float>();
    ASSERT_TRUE(hidden.guard_is_intact());
    for (size_t row = 0; row < tokens.size(); ++row) {
      for (int64_t i = 0; i < kWidth; ++i) {
        const float v = found[row * kWidth + i];
        if (tokens[row] < 0 || tokens[row] >= kVocab) {
          ASSERT_TRUE(std::isnan(v));
        } else {
          ASSERT_EQ(
              v, load_as_float(table.data(), tokens[row] * kWidth + i, static_cast<Dtype>(type)) *
                     33.5f);
        }
      }
    }
    args.width = 1097;
    EXPECT_EQ(launch_embedding(args, nullptr), cudaErrorInvalidValue);
  }
}

TEST(CudaTokens, ArgmaxIsTheLowestIndexOfTheLargest) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(32);
  for (const int64_t vocab :
       {int64_t{1}, int64_t{7}, int64_t{8192}, int64_t{49152}, int64_t{128257}}) {
    SCOPED_TRACE(vocab);
    constexpr int64_t kRows = 9;
    const int64_t stride = (vocab + 3) / 4 * 4 + 4;
    std::vector<float> logits(static_cast<size_t>(kRows * stride), 1e30f);
    std::vector<int32_t> expected, position, after;
    for (int64_t row = 0; row < kRows; ++row) {
      float* x = &logits[row * stride];
      for (int64_t i = 0; i < vocab; ++i) {
        x[i] = -5.0f + std::normal_distribution<float>()(random) * (row % 2 == 0 ? 1.0f : 1e-3f);
      }
      if (row == 2) std::fill_n(x, vocab, -0.5f);
      if (row == 3) x[vocab / 2] = x[vocab - 1] = 2.0f;
      if (row == 4) x[vocab / 3] = NAN;
      if (row == 5) x[vocab - 1] = -INFINITY;
      if (row == 7) {  // the same number twice
        std::fill_n(x, vocab, -1.0f);
        x[vocab / 4] = -0.0f;
        x[vocab / 2] = 0.0f;
      }
      const bool faulty = row == 4 || row == 5;
      expected.push_back(faulty ? -1 : static_cast<int32_t>(std::max_element(x, x + vocab) - x));
      position.push_back(row == 6 ? -1 : static_cast<int32_t>(row * 10));
      after.push_back(position.back() + (faulty || row == 6 ? 0 : 1));
    }
    const Buffer device_logits(logits), device_position(position), tokens(kRows * 4);
    const Buffer scratch(static_cast<size_t>(argmax_scratch_bytes(kRows)), 0);
    ArgmaxArgs args;
    args.logits = device_logits.as<float>();
    args.stride = stride;
    args.rows = kRows;
    args.vocab = vocab;
    args.tokens = tokens.as<int32_t>();
    args.position = device_position.as<int32_t>();
    args.scratch = scratch.as<>();
    for (int turn = 0; turn < 2; ++turn) {
      NIBBLE_CHECK_CUDA(launch_argmax(args, nullptr));
      NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
      ASSERT_EQ(tokens.download<int32_t>(), expected);
      ASSERT_EQ(device_position.download<int32_t>(), after);
      args.position = nullptr;
    }
    ASSERT_TRUE(scratch.guard_is_intact() && tokens.guard_is_intact() &&
                device_position.guard_is_intact());
  }
}

TEST(CudaTokens, DrawsAreTheHosts) {
  NIBBLE_NEEDS_GPU();
  std::mt19937 random(33);
  const std::vector<SamplerOptions> rules = {{},                  // greedy
                                             {1.0f, 0, 1.0f, 1},  // everything
                                             {0.8f, 40, 1.0f, 2},
                                             {1.0f, 0, 0.9f, 3},
                                             {1.3f, 1000, 0.95f, 4},
                                             {1e-6f, 0, 0.5f, 5},
                                             {1e30f, 7, 1.0f, 6},
                                             {0.7f, 1, 0.5f, 7},
                                             {5.0f, 1 << 20, 0.999f, 8},
                                             {1.0f, 0, 0.0f, 9},
                                             {100.0f, 0, 0.3f, ~uint64_t{0}}};
  for (const int64_t vocab : {1, 3, 129, 4096, 49152, 128257, 262144}) {
    SCOPED_TRACE(vocab);
    const auto rows = static_cast<int64_t>(rules.size()) * 3;
    const int64_t stride = (vocab + 3) / 4 * 4 + 4;
    std::vector<float> logits(static_cast<size_t>(rows * stride), NAN);  // not seen behind a row
    std::vector<sampling::Rule> device_rules;
    std::vector<int32_t> expected, position, after;
    for (int64_t row = 0; row < rows; ++row) {
      float* x = &logits[static_cast<size_t>(row * stride)];
      std::normal_distribution<float> normal(-3.0f, row % 3 == 0 ? 4.0f : 1.0f);
      for (int64_t i = 0; i < vocab; ++i) x[i] = normal(random);
      if (row % 3 == 2) {  // many ties
        for (int64_t i = 0; i < vocab; ++i) x[i] = std::round(x[i]);
      }
      const bool faulty = row == rows - 2;
      if (faulty) x[vocab - 1] = INFINITY;
      device_rules.push_back(sampling_rule(rules[static_cast<size_t>(row) % rules.size()]));
      position.push_back(row == 5 ? -1 : static_cast<int32_t>(row * 100));
      expected.push_back(faulty ? -1
                                : draw_token({x, static_cast<size_t>(vocab)}, device_rules.back(),
                                             position.back() + 1));
      after.push_back(position.back() + (faulty || row == 5 ? 0 : 1));
    }
    const Buffer device_logits(logits), of_rows(device_rules);
    const Buffer tokens(static_cast<size_t>(rows) * 4);
    SampleArgs args;
    args.logits = device_logits.as<float>();
    args.stride = stride;
    args.rows = rows;
    args.vocab = vocab;
    args.rules = of_rows.as<sampling::Rule>();
    args.tokens = tokens.as<int32_t>();
    for (int turn = 0; turn < 2; ++turn) {
      const Buffer device_position(position);
      args.position = device_position.as<int32_t>();
      NIBBLE_CHECK_CUDA(launch_sample(args, nullptr));
      NIBBLE_CHECK_CUDA(cudaDeviceSynchronize());
      ASSERT_EQ(tokens.download<int32_t>(), expected);
      ASSERT_EQ(device_position.download<int32_t>(), after);
      ASSERT_TRUE(tokens.guard_is_intact() && device_position.guard_is_intact());
    }
    args.vocab = sampling::kMostTokens;
    EXPECT_EQ(launch_sample(args, nullptr), cudaErrorInvalidValue);
  }
}

}  // namespace
}  // namespace nibble::cuda::testing
