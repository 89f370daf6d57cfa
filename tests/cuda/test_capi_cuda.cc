// The CUDA functions of the C ABI: what they refuse, with and without a GPU. What they compute is
// that of gemm/cuda/gemm_cuda.h, tested there.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "nibble.h"

namespace {

bool has_gpu() {
  int32_t count = 0;
  return nibble_cuda_device_count(&count).code == NIBBLE_OK && count > 0;
}

nibble_problem small_problem() {
  nibble_problem p = {};
  p.m = 4;
  p.n = 64;
  p.k = 256;
  p.group_size = 128;
  p.mode = NIBBLE_W4A8;
  p.granularity = NIBBLE_TOKEN;
  return p;
}

TEST(CapiCuda, WithoutAGpuEverythingSaysWhy) {
  if (has_gpu()) GTEST_SKIP() << "there is a GPU";
  const auto expect_unsupported = [](const nibble_status& status) {
    EXPECT_EQ(status.code, NIBBLE_UNSUPPORTED) << status.message;
    EXPECT_NE(std::string(status.message).find("CUDA"), std::string::npos) << status.message;
  };
  int32_t count = -1;
  expect_unsupported(nibble_cuda_device_count(&count));
  nibble_cuda_info info;
  expect_unsupported(nibble_cuda_device_info(&info, 0));
  const std::vector<uint32_t> words(256 * 64 / 8);
  nibble_weight_desc desc = {};
  desc.k = 256;
  desc.n = 64;
  desc.group_size = 128;
  desc.scale_dtype = NIBBLE_F16;
  desc.qweight = desc.qzeros = desc.scales = words.data();
  auto* weight = reinterpret_cast<nibble_cuda_weight*>(&count);
  expect_unsupported(nibble_cuda_weight_create(&weight, &desc, 0));
  EXPECT_EQ(weight, nullptr);
  const nibble_problem problem = small_problem();
  nibble_cuda_plan plan;
  expect_unsupported(nibble_cuda_gemm_plan(&plan, &problem, 0, nullptr));
}

TEST(CapiCuda, NullsAreNamed) {
  const auto expect_names = [](const nibble_status& status, const char* name) {
    EXPECT_EQ(status.code, NIBBLE_INVALID_ARGUMENT);
    EXPECT_NE(std::string(status.message).find(name), std::string::npos) << status.message;
  };
  expect_names(nibble_cuda_device_count(nullptr), "out");
  expect_names(nibble_cuda_device_info(nullptr, 0), "out");
  nibble_cuda_weight* weight = nullptr;
  expect_names(nibble_cuda_weight_create(nullptr, nullptr, 0), "out");
  expect_names(nibble_cuda_weight_create(&weight, nullptr, 0), "desc");
  nibble_cuda_plan plan = {};
  expect_names(nibble_cuda_gemm_plan(nullptr, nullptr, 0, nullptr), "out");
  expect_names(nibble_cuda_gemm_plan(&plan, nullptr, 0, nullptr), "problem");
  const nibble_input input = {};
  expect_names(nibble_cuda_gemm(nullptr, &input, nullptr, nullptr, 0, nullptr, nullptr), "plan");
  expect_names(nibble_cuda_gemm(&plan, &input, nullptr, nullptr, 0, nullptr, nullptr), "weight");
  size_t bytes = 0;
  expect_names(nibble_cuda_packed_bytes(nullptr, nullptr), "out");
  expect_names(nibble_cuda_packed_bytes(&bytes, nullptr), "desc");
  expect_names(nibble_cuda_pack(nullptr, 0, nullptr, 0), "packed");
  expect_names(nibble_cuda_gemm_packed(nullptr, &input, &bytes, 8, nullptr, 0, nullptr, nullptr),
               "plan");
  const nibble_cuda_operand operand = {};
  expect_names(nibble_cuda_quantize_activations(nullptr, &input, &operand, nullptr), "plan");
  expect_names(
      nibble_cuda_gemm_quantized(nullptr, &operand, &bytes, 8, nullptr, 0, nullptr, nullptr),
      "plan");
}

// The size of a packed weight tells what is in it: no two kinds share one, and none is a size of a
// weight of the CPU, a multiple of 64.
TEST(CapiCuda, PackedSizesTellTheKindsApart) {
  const std::vector<uint32_t> words(256 * 64 / 8);
  nibble_weight_desc desc = {};
  desc.k = 256;
  desc.n = 64;
  desc.group_size = 128;
  desc.qweight = desc.qzeros = desc.scales = words.data();
  std::vector<size_t> sizes;
  for (const int32_t scale_dtype : {NIBBLE_F16, NIBBLE_BF16}) {
    for (const void* bias : {static_cast<const void*>(nullptr), desc.qweight}) {
      desc.scale_dtype = scale_dtype;
      desc.bias = bias;
      size_t bytes = 0;
      const nibble_status status = nibble_cuda_packed_bytes(&bytes, &desc);
      ASSERT_EQ(status.code, NIBBLE_OK) << status.message;
      EXPECT_NE(bytes % 64, 0u);
      EXPECT_EQ(std::count(sizes.begin(), sizes.end(), bytes), 0);
      sizes.push_back(bytes);
    }
  }
  desc.group_size = 16;
  size_t bytes = 0;
  const nibble_status status = nibble_cuda_packed_bytes(&bytes, &desc);
  EXPECT_EQ(status.code, NIBBLE_UNSUPPORTED) << status.message;
}

TEST(CapiCuda, MemoryThatIsNoPlanIsRefused) {
  nibble_cuda_plan plan = {};
  EXPECT_EQ(nibble_cuda_plan_kernel(&plan), nullptr);
  EXPECT_EQ(nibble_cuda_plan_kernel(nullptr), nullptr);
  EXPECT_EQ(nibble_cuda_workspace_bytes(&plan), 0u);
  EXPECT_EQ(nibble_cuda_zeroed_bytes(&plan), 0u);
  char text[8] = "x";
  EXPECT_EQ(nibble_cuda_plan_describe(&plan, text, sizeof text), 0u);
  EXPECT_STREQ(text, "");
  nibble_cuda_weight_destroy(nullptr);
  EXPECT_EQ(nibble_cuda_weight_bytes(nullptr), 0u);
}

TEST(CapiCuda, PlansOnAGpu) {
  if (!has_gpu()) {
    int32_t count = 0;
    GTEST_SKIP() << nibble_cuda_device_count(&count).message;
  }
  nibble_cuda_info info;
  ASSERT_EQ(nibble_cuda_device_info(&info, 0).code, NIBBLE_OK);
  EXPECT_GT(std::strlen(info.name), 0u);
  EXPECT_GE(info.capability, 80);
  EXPECT_EQ(nibble_cuda_device_info(&info, 99).code, NIBBLE_INVALID_ARGUMENT);
  const nibble_problem problem = small_problem();
  nibble_cuda_plan plan;
  const nibble_status status = nibble_cuda_gemm_plan(&plan, &problem, 0, nullptr);
  ASSERT_EQ(status.code, NIBBLE_OK) << status.message;
  EXPECT_EQ(std::string(nibble_cuda_plan_kernel(&plan)).substr(0, 4), "w4a8");
  EXPECT_GT(nibble_cuda_workspace_bytes(&plan), 0u);
  char text[512];
  EXPECT_EQ(nibble_cuda_plan_describe(&plan, text, sizeof text), std::strlen(text));
  EXPECT_EQ(nibble_cuda_gemm_plan(&plan, &problem, 0, "nonesuch").code, NIBBLE_INVALID_ARGUMENT);
}

}  // namespace
