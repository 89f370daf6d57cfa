// The C ABI as a caller sees it: only nibble.h and libnibble.so. What packs the weights of these
// tests, and the oracle that checks y, come from nibble_core.
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "format/quant_matrix.h"
#include "gemm/ref.h"
#include "nibble.h"

namespace nibble::testing {
namespace {

constexpr int64_t kK = 96, kN = 40, kGroup = 32, kGroups = kK / kGroup, kM = 5;

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

void expect_ok(const nibble_status& status) {
  EXPECT_EQ(status.code, NIBBLE_OK) << status.message;
  EXPECT_STREQ(status.message, "");
}

void expect_error(const nibble_status& status, nibble_code code,
                  std::initializer_list<const char*> words) {
  EXPECT_EQ(status.code, code) << status.message;
  EXPECT_LT(std::strlen(status.message), sizeof status.message);
  for (const char* word : words) {
    EXPECT_TRUE(contains(status.message, word)) << word << " is not in: " << status.message;
  }
}

struct WeightDeleter {
  void operator()(nibble_weight* weight) const { nibble_weight_destroy(weight); }
};
using WeightPtr = std::unique_ptr<nibble_weight, WeightDeleter>;

WeightPtr create(const nibble_weight_desc& desc) {
  nibble_weight* weight = nullptr;
  expect_ok(nibble_weight_create(&weight, &desc, 1));
  return WeightPtr(weight);
}

struct alignas(64) Line {
  std::byte bytes[64];
};
using Workspace = std::vector<Line>;
Workspace workspace_of(const nibble_plan& plan) {
  return Workspace(nibble_gemm_workspace_bytes(&plan) / sizeof(Line) + 1);
}

/// One set of values (q, z, s) and x; weights of it in the three file layouts.
class CApi : public ::testing::Test {
 protected:
  CApi() : codes_(kK * kN), zeros_(kGroups * kN), scales_(kGroups * kN), x_(kM * kK) {
    std::mt19937 random(20260105);
    for (auto& q : codes_) q = static_cast<uint8_t>(random() % 16);
    for (auto& z : zeros_) z = static_cast<uint8_t>(random() % 16);
    for (auto& s : scales_) s = static_cast<uint16_t>(0x2000 + random() % 0x400);
    for (auto& v : x_) v = std::normal_distribution<float>()(random);
    for (int i = 0; i < kN; ++i) bias_.push_back(std::normal_distribution<float>()(random));
    awq_ = pack_awq_gemm(kK, kN, kGroup, codes_.data(), zeros_.data(), scales_.data(), Dtype::f16);
    desc_.k = kK;
    desc_.n = kN;
    desc_.group_size = kGroup;
    desc_.layout = NIBBLE_AWQ_GEMM;
    desc_.scale_dtype = NIBBLE_F16;
    desc_.qweight = awq_.qweight.data();
    desc_.qzeros = awq_.qzeros.data();
    desc_.scales = awq_.scales.data();
    problem_.m = kM;
    problem_.n = kN;
    problem_.k = kK;
    problem_.group_size = kGroup;
    problem_.mode = NIBBLE_W4A8;
    problem_.granularity = NIBBLE_TOKEN;
    problem_.threads = 1;
    input_.x = x_.data();
    input_.x_stride = kK;
  }

  nibble_plan plan(const char* kernel = nullptr) const {
    nibble_plan plan = {};
    expect_ok(nibble_gemm_plan(&plan, &problem_, kernel));
    return plan;
  }

  std::vector<float> multiply(const nibble_plan& plan, const nibble_weight* weight) const {
    std::vector<float> y(kM * kN, -1);
    Workspace workspace = workspace_of(plan);
    const nibble_target target = {weight, y.data(), kN};
    expect_ok(nibble_gemm(&plan, &input_, &target, 1, workspace.data()));
    return y;
  }

  Problem cpp_problem() const {
    return {.m = kM,
            .n = kN,
            .k = kK,
            .group_size = kGroup,
            .mode = static_cast<Mode>(problem_.mode),
            .granularity = static_cast<Granularity>(problem_.granularity),
            .symmetric = problem_.asymmetric == 0};
  }

  std::vector<float> expected(const float* bias = nullptr) const {
    const ref::Weights w = ref::unpack(awq_.view());
    if (problem_.mode == NIBBLE_W4A16) return ref::multiply_w4a16(w, x_.data(), kM, bias);
    const Problem p = cpp_problem();
    const GemmInput input{x_.data(), kK, input_.clip == 0 ? 1 : input_.clip, input_.static_scales};
    const ref::Activations a = ref::quantize(p, input);
    return ref::epilogue(p, w, ref::partial_sums(w, a.codes.data(), kM), a.scales.data(), bias);
  }

  /// nibble_gemm_plan after one change to the problem.
  template <class Change>
  nibble_status plan_with(const Change& change) const {
    nibble_problem p = problem_;
    change(p);
    nibble_plan plan;
    return nibble_gemm_plan(&plan, &p, nullptr);
  }

  /// nibble_weight_create after one change to the description; the result must be null.
  template <class Change>
  nibble_status create_with(const Change& change) const {
    nibble_weight_desc desc = desc_;
    change(desc);
    nibble_weight* weight = reinterpret_cast<nibble_weight*>(1);
    const nibble_status status = nibble_weight_create(&weight, &desc, 1);
    EXPECT_EQ(weight, nullptr);
    std::vector<float> dense(kK * kN);
    expect_error(nibble_dequantize(&desc, dense.data()), static_cast<nibble_code>(status.code),
                 {status.message});
    return status;
  }

  std::vector<uint8_t> codes_, zeros_;  // (k, n), (groups, n)
  std::vector<uint16_t> scales_;        // (groups, n)
  std::vector<float> bias_, x_;
  AwqTensors awq_;
  nibble_weight_desc desc_ = {};
  nibble_problem problem_ = {};
  nibble_input input_ = {};
};

// ---- the library itself -------------------------------------------------------------------------

TEST(CApiLibrary, VersionsAreThoseOfTheHeader) {
  EXPECT_EQ(nibble_abi_version(), NIBBLE_ABI_VERSION);
  int major = -1, minor = -1, patch = -1;
  EXPECT_EQ(std::sscanf(nibble_version(), "%d.%d.%d", &major, &minor, &patch), 3);
}

// Values that callers have compiled in.
TEST(CApiLibrary, StructsKeepTheirLayout) {
  EXPECT_EQ(sizeof(nibble_status), 512u);
  EXPECT_EQ(sizeof(nibble_plan), 256u);
  EXPECT_EQ(sizeof(nibble_weight_desc), 80u);
  EXPECT_EQ(offsetof(nibble_weight_desc, layout), 24u);
  EXPECT_EQ(offsetof(nibble_weight_desc, qweight), 32u);
  EXPECT_EQ(offsetof(nibble_weight_desc, zero_words), 56u);
  EXPECT_EQ(offsetof(nibble_weight_desc, bias), 64u);
  EXPECT_EQ(sizeof(nibble_problem), 56u);
  EXPECT_EQ(offsetof(nibble_problem, mode), 32u);
  EXPECT_EQ(offsetof(nibble_problem, threads), 52u);
  EXPECT_EQ(sizeof(nibble_input), 40u);
  EXPECT_EQ(offsetof(nibble_input, clip), 16u);
  EXPECT_EQ(offsetof(nibble_input, static_scales), 24u);
  EXPECT_EQ(offsetof(nibble_input, wide_groups), 32u);
  EXPECT_EQ(sizeof(nibble_target), 24u);
}

TEST(CApiLibrary, ExportsTheCAbiAndNothingElse) {
  Dl_info info = {};
  ASSERT_NE(dladdr(dlsym(RTLD_DEFAULT, "nibble_abi_version"), &info), 0);
  const std::string path = info.dli_fname;
  ASSERT_TRUE(contains(path, "libnibble")) << path;
  const std::string command = "nm -D --defined-only '" + path + "' 2>&1";
  FILE* pipe = popen(command.c_str(), "r");
  ASSERT_NE(pipe, nullptr);
  char line[1024], name[1024];
  std::vector<std::string> names;
  while (std::fgets(line, sizeof line, pipe) != nullptr) {
    if (std::sscanf(line, "%*s %*s %1023s", name) == 1) names.push_back(name);
  }
  if (pclose(pipe) != 0) GTEST_SKIP() << "nm does not work here: " << line;
  EXPECT_EQ(names.size(), 39u);
  for (const std::string& symbol : names) {
    EXPECT_EQ(symbol.rfind("nibble_", 0), 0u) << symbol << " is exported";
  }
}

TEST(CApiLibrary, ListsItsKernels) {
  const int32_t count = nibble_kernel_count();
  ASSERT_GE(count, 3);
  std::vector<std::string> names;
  for (int32_t i = 0; i < count; ++i) {
    names.push_back(nibble_kernel_name(i));
    const char* reason = nibble_kernel_missing(i);
    EXPECT_STRNE(reason, "");
    EXPECT_TRUE(reason == nullptr || !contains(names.back(), "_scalar")) << reason;
  }
  for (const char* name : {"w4a16_scalar", "w4a8_scalar", "w4a4_scalar"}) {
    EXPECT_EQ(std::count(names.begin(), names.end(), name), 1) << name;
  }
  for (const int32_t bad : {-1, count, std::numeric_limits<int32_t>::max()}) {
    EXPECT_EQ(nibble_kernel_name(bad), nullptr);
    EXPECT_NE(nibble_kernel_missing(bad), nullptr);
  }
}

// ---- weights ------------------------------------------------------------------------------------

TEST_F(CApi, AWeightKnowsItsSize) {
  const WeightPtr weight = create(desc_);
  ASSERT_NE(weight, nullptr);
  EXPECT_EQ(nibble_weight_k(weight.get()), kK);
  EXPECT_EQ(nibble_weight_n(weight.get()), kN);
  EXPECT_EQ(nibble_weight_group_size(weight.get()), kGroup);
  EXPECT_GE(nibble_weight_bytes(weight.get()), static_cast<size_t>(kK * kN / 2));
  nibble_weight_destroy(nullptr);
  EXPECT_EQ(nibble_weight_k(nullptr), 0);
  EXPECT_EQ(nibble_weight_n(nullptr), 0);
  EXPECT_EQ(nibble_weight_group_size(nullptr), 0);
  EXPECT_EQ(nibble_weight_bytes(nullptr), 0u);
}

TEST_F(CApi, AWeightIsABlockThatMayLieAnywhere) {
  desc_.bias = bias_.data();
  desc_.bias_dtype = NIBBLE_F32;
  const WeightPtr made = create(desc_);
  const std::vector<float> expected = multiply(plan(), made.get());
  size_t bytes = 0;
  expect_ok(nibble_weight_packed_bytes(&bytes, &desc_));
  ASSERT_EQ(bytes, nibble_weight_bytes(made.get()));
  for (const int32_t threads : {1, 3}) {
    std::vector<Line> memory(bytes / sizeof(Line) + 1);
    std::memset(memory.data(), 0xa5, bytes + 1);  // what was there before is gone
    expect_ok(nibble_weight_pack(memory.data(), bytes, &desc_, threads));
    EXPECT_EQ(memory.back().bytes[0], std::byte{0xa5});
    const std::vector<Line> copy = memory;
    for (const Line* at : {static_cast<const Line*>(memory.data()), copy.data()}) {
      const nibble_weight* weight = nullptr;
      expect_ok(nibble_weight_open(&weight, at, bytes));
      EXPECT_EQ(nibble_weight_k(weight), kK);
      EXPECT_EQ(nibble_weight_bytes(weight), bytes);
      EXPECT_EQ(multiply(plan(), weight), expected);
      const nibble_plan made_plan = plan();
      Workspace workspace = workspace_of(made_plan);
      std::vector<float> y(kM * kN);
      expect_ok(nibble_gemm_packed(&made_plan, &input_, at, bytes, y.data(), kN, workspace.data()));
      EXPECT_EQ(y, expected);
      expect_error(
          nibble_gemm_packed(&made_plan, &input_, at, bytes - 1, y.data(), kN, workspace.data()),
          NIBBLE_INVALID_ARGUMENT, {std::to_string(bytes).c_str()});
    }
  }
  // A copy of what nibble_weight_create made is a weight too.
  std::vector<Line> copy(bytes / sizeof(Line));
  std::memcpy(copy.data(), made.get(), bytes);
  const nibble_weight* weight = nullptr;
  expect_ok(nibble_weight_open(&weight, copy.data(), bytes));
  EXPECT_EQ(multiply(plan(), weight), expected);
  std::vector<float> y(2 * kM * kN);
  problem_.n = 2 * kN;
  const nibble_plan wider = plan();
  Workspace workspace = workspace_of(wider);
  expect_error(
      nibble_gemm_packed(&wider, &input_, copy.data(), bytes, y.data(), 2 * kN, workspace.data()),
      NIBBLE_INVALID_ARGUMENT, {"N=40", "N=80"});
}

TEST_F(CApi, MemoryThatIsNotAWeightIsRefused) {
  size_t bytes = 0;
  expect_ok(nibble_weight_packed_bytes(&bytes, &desc_));
  std::vector<Line> memory(bytes / sizeof(Line) + 1);
  auto* at = reinterpret_cast<char*>(memory.data());
  constexpr auto invalid = NIBBLE_INVALID_ARGUMENT;
  const std::string have = std::to_string(bytes - 64), want = std::to_string(bytes);
  expect_error(nibble_weight_pack(at, bytes - 64, &desc_, 1), invalid,
               {have.c_str(), want.c_str()});
  expect_error(nibble_weight_pack(at + 4, bytes, &desc_, 1), invalid, {"64-byte aligned"});
  expect_error(nibble_weight_pack(nullptr, bytes, &desc_, 1), invalid, {"memory is null"});
  expect_ok(nibble_weight_pack(at, bytes, &desc_, 1));
  const nibble_weight* weight = nullptr;
  expect_error(nibble_weight_open(&weight, at, bytes - 1), invalid, {want.c_str()});
  expect_error(nibble_weight_open(&weight, at, 63), invalid, {"63 bytes"});
  expect_error(nibble_weight_open(&weight, at + 8, bytes - 8), invalid, {"64-byte aligned"});
  expect_error(nibble_weight_open(nullptr, at, bytes), invalid, {"out is null"});
  std::vector<float> y(kM * kN);
  const nibble_plan made = plan();
  Workspace workspace = workspace_of(made);
  for (int byte = 0; byte < 48; ++byte) {  // any change of the header
    at[byte] ^= 1;
    expect_error(nibble_weight_open(&weight, at, bytes), invalid, {"was not made by"});
    EXPECT_EQ(weight, nullptr);
    const nibble_target target = {reinterpret_cast<const nibble_weight*>(at), y.data(), kN};
    expect_error(nibble_gemm(&made, &input_, &target, 1, workspace.data()), invalid,
                 {"targets[0].weight was not made by"});
    at[byte] ^= 1;
  }
  expect_ok(nibble_weight_open(&weight, at, bytes));
}

TEST_F(CApi, AWeightTakesAtMost4Point25BitsPerCode) {
  constexpr int64_t k = 512, n = 256;
  const std::vector<uint8_t> codes(k * n, 3), zeros(k / 128 * n, 5);
  const std::vector<uint16_t> scales(k / 128 * n, 0x2000);
  const AwqTensors awq =
      pack_awq_gemm(k, n, 128, codes.data(), zeros.data(), scales.data(), Dtype::f16);
  nibble_weight_desc desc = desc_;
  desc.k = k;
  desc.n = n;
  desc.group_size = 128;
  desc.qweight = awq.qweight.data();
  desc.qzeros = awq.qzeros.data();
  desc.scales = awq.scales.data();
  EXPECT_LE(static_cast<double>(nibble_weight_bytes(create(desc).get())) * 8, 4.25 * k * n);
}

TEST_F(CApi, DequantizeIsExact) {
  std::vector<float> dense(kK * kN);
  expect_ok(nibble_dequantize(&desc_, dense.data()));
  for (int64_t k = 0; k < kK; ++k) {
    for (int64_t n = 0; n < kN; ++n) {
      const int64_t g = k / kGroup * kN + n;
      ASSERT_EQ(dense[k * kN + n],
                static_cast<float>(codes_[k * kN + n] - zeros_[g]) * float_from_f16(scales_[g]));
    }
  }
}

// One matrix, three file layouts: packed here by the drawings of nibble.h.
TEST_F(CApi, EveryLayoutOfTheSameValuesGivesTheSameWeight) {
  const auto put = [](std::vector<uint32_t>& words, int64_t word, int64_t nibble, uint8_t value) {
    words[word] |= static_cast<uint32_t>(value) << (4 * nibble);
  };
  constexpr int64_t kWords = 2;  // of zeros per row of AWQ_GEMV: one holds all, one is padding
  std::vector<uint32_t> by_row(kN * kK / 8), gemv_zeros(kN * kWords), ct_zeros(kN / 8 * kGroups);
  std::vector<uint16_t> gemv_scales(kN * kWords * 8), ct_scales(kN * kGroups);
  for (int64_t n = 0; n < kN; ++n) {
    for (int64_t k = 0; k < kK; ++k) {
      put(by_row, n * (kK / 8) + k / 8, k % 8, codes_[k * kN + n]);
    }
    for (int64_t g = 0; g < kGroups; ++g) {
      put(gemv_zeros, n * kWords + g / 8, g % 8, zeros_[g * kN + n]);
      put(ct_zeros, n / 8 * kGroups + g, n % 8, zeros_[g * kN + n]);
      gemv_scales[n * kWords * 8 + g] = scales_[g * kN + n];
      ct_scales[n * kGroups + g] = scales_[g * kN + n];
    }
  }
  nibble_weight_desc gemv = desc_, ct = desc_;
  gemv.layout = NIBBLE_AWQ_GEMV;
  gemv.qweight = ct.qweight = by_row.data();
  gemv.qzeros = gemv_zeros.data();
  gemv.scales = gemv_scales.data();
  gemv.zero_words = kWords;
  ct.layout = NIBBLE_CT_PACK;
  ct.qzeros = ct_zeros.data();
  ct.scales = ct_scales.data();
  std::vector<float> dense(kK * kN);
  expect_ok(nibble_dequantize(&desc_, dense.data()));
  for (const nibble_weight_desc& desc : {desc_, gemv, ct}) {
    std::vector<float> same(kK * kN);
    expect_ok(nibble_dequantize(&desc, same.data()));
    EXPECT_EQ(same, dense) << desc.layout;
    EXPECT_EQ(multiply(plan(), create(desc).get()), expected()) << desc.layout;
  }
}

TEST_F(CApi, NullZerosMean8AndGroupSizeMinus1MeansK) {
  const std::vector<uint8_t> eights(kN, 8);
  const AwqTensors awq =
      pack_awq_gemm(kK, kN, kK, codes_.data(), eights.data(), scales_.data(), Dtype::f16);
  desc_.group_size = -1;
  desc_.scales = awq.scales.data();
  desc_.qzeros = awq.qzeros.data();
  problem_.group_size = -1;
  const WeightPtr weight = create(desc_);
  EXPECT_EQ(nibble_weight_group_size(weight.get()), kK);
  const std::vector<float> y = multiply(plan(), weight.get());
  desc_.qzeros = nullptr;
  EXPECT_EQ(multiply(plan(), create(desc_).get()), y);
}

TEST_F(CApi, BiasIsAddedInEveryDtype) {
  for (const int32_t dtype : {NIBBLE_F32, NIBBLE_F16, NIBBLE_BF16}) {
    std::vector<float> stored(kN), rounded(kN);
    for (int64_t n = 0; n < kN; ++n) {
      store_from_float(stored.data(), n, static_cast<Dtype>(dtype), bias_[n]);
      rounded[n] = load_as_float(stored.data(), n, static_cast<Dtype>(dtype));
    }
    desc_.bias = stored.data();
    desc_.bias_dtype = dtype;
    EXPECT_EQ(multiply(plan(), create(desc_).get()), expected(rounded.data())) << dtype;
  }
}

TEST_F(CApi, WrongDescriptionsAreRefusedByName) {
  const auto invalid = NIBBLE_INVALID_ARGUMENT;
  using Desc = nibble_weight_desc;
  expect_error(create_with([](Desc& d) { d.qweight = nullptr; }), invalid, {"desc->qweight"});
  expect_error(create_with([](Desc& d) { d.scales = nullptr; }), invalid, {"desc->scales"});
  expect_error(create_with([](Desc& d) { d.layout = 3; }), invalid, {"desc->layout is 3"});
  expect_error(create_with([](Desc& d) { d.layout = -1; }), invalid, {"desc->layout is -1"});
  expect_error(create_with([](Desc& d) { d.scale_dtype = NIBBLE_F32; }), invalid,
               {"desc->scale_dtype is 0"});
  expect_error(create_with([](Desc& d) { d.reserved = 7; }), invalid, {"desc->reserved is 7"});
  expect_error(create_with([](Desc& d) { d.zero_words = 5; }), invalid, {"zero_words is 5"});
  expect_error(create_with([&](Desc& d) {
                 d.bias = bias_.data();
                 d.bias_dtype = 9;
               }),
               invalid, {"desc->bias_dtype is 9"});
  expect_error(create_with([](Desc& d) { d.k = 0; }), invalid, {"K = 0"});
  expect_error(create_with([](Desc& d) { d.n = -8; }), invalid, {"N = -8"});
  expect_error(create_with([](Desc& d) { d.k = int64_t{1} << 40; }), invalid, {"1099511627776"});
  expect_error(create_with([](Desc& d) { d.n = 36; }), invalid, {"36", "multiple of 8"});
  expect_error(create_with([](Desc& d) {
                 d.n = 36;
                 d.layout = NIBBLE_CT_PACK;
               }),
               invalid, {"36", "multiple of 8"});
  expect_error(create_with([](Desc& d) { d.group_size = 36; }), invalid, {"36", "96"});
  expect_error(create_with([](Desc& d) { d.group_size = -2; }), invalid, {"-2"});
  expect_error(create_with([](Desc& d) { d.layout = NIBBLE_AWQ_GEMV; }), invalid, {"0 words"});
  nibble_weight* weight = nullptr;
  expect_error(nibble_weight_create(&weight, nullptr, 1), invalid, {"desc is null"});
  expect_error(nibble_weight_create(nullptr, &desc_, 1), invalid, {"out is null"});
  expect_error(nibble_weight_create(&weight, &desc_, 100000), invalid, {"threads is 100000"});
  expect_error(nibble_dequantize(&desc_, nullptr), invalid, {"out is null"});
  expect_error(nibble_dequantize(nullptr, x_.data()), invalid, {"desc is null"});
}

TEST_F(CApi, AWeightThatDoesNotFitMemoryIsAnError) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "sanitizers abort on allocations of this size";
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
  GTEST_SKIP() << "sanitizers abort on allocations of this size";
#endif
#endif
  desc_.k = (int64_t{1} << 31) - 128;
  desc_.n = (int64_t{1} << 31) - 128;
  desc_.group_size = 128;
  nibble_weight* weight = nullptr;
  expect_error(nibble_weight_create(&weight, &desc_, 1), NIBBLE_OUT_OF_MEMORY, {"bytes"});
}

// ---- plans --------------------------------------------------------------------------------------

TEST_F(CApi, EveryKernelCanBeForcedByName) {
  for (int32_t i = 0; i < nibble_kernel_count(); ++i) {
    const char* name = nibble_kernel_name(i);
    problem_.mode = contains(name, "w4a16_")  ? NIBBLE_W4A16
                    : contains(name, "w4a8_") ? NIBBLE_W4A8
                                              : NIBBLE_W4A4;
    nibble_plan made = {};
    const nibble_status status = nibble_gemm_plan(&made, &problem_, name);
    if (const char* reason = nibble_kernel_missing(i)) {
      expect_error(status, NIBBLE_UNSUPPORTED, {name, reason});
      std::printf("SKIPPED KERNEL %s: %s\n", name, reason);
      continue;
    }
    expect_ok(status);
    EXPECT_STREQ(nibble_plan_kernel(&made), name);
    EXPECT_EQ(multiply(made, create(desc_).get()), expected()) << name;
  }
}

TEST_F(CApi, TheEnvironmentForcesAKernel) {
  const char* before = std::getenv("NIBBLE_KERNEL");
  const std::string saved = before == nullptr ? "" : before;
  setenv("NIBBLE_KERNEL", "w4a8_scalar", 1);
  const nibble_plan forced = plan();
  EXPECT_STREQ(nibble_plan_kernel(&forced), "w4a8_scalar");
  setenv("NIBBLE_KERNEL", "nonsense", 1);
  expect_error(plan_with([](nibble_problem&) {}), NIBBLE_INVALID_ARGUMENT, {"'nonsense'"});
  before == nullptr ? unsetenv("NIBBLE_KERNEL") : setenv("NIBBLE_KERNEL", saved.c_str(), 1);
}

TEST_F(CApi, WrongProblemsAreRefusedByName) {
  const auto invalid = NIBBLE_INVALID_ARGUMENT;
  using P = nibble_problem;
  expect_error(plan_with([](P& p) { p.mode = 5; }), invalid, {"problem->mode is 5", "0 to 3"});
  expect_error(plan_with([](P& p) { p.x_dtype = -1; }), invalid, {"problem->x_dtype is -1"});
  expect_error(plan_with([](P& p) { p.y_dtype = 3; }), invalid, {"problem->y_dtype is 3"});
  expect_error(plan_with([](P& p) { p.granularity = 5; }), invalid, {"granularity is 5"});
  expect_error(plan_with([](P& p) { p.asymmetric = 2; }), invalid, {"asymmetric is 2"});
  expect_error(plan_with([](P& p) { p.asymmetric = 1; }), invalid, {"asymmetric", "w4a8"});
  expect_error(plan_with([](P& p) { p.threads = 5000; }), invalid, {"threads is 5000"});
  expect_error(plan_with([](P& p) { p.m = -1; }), invalid, {"-1, 40, 96"});
  expect_error(plan_with([](P& p) { p.n = 41; }), invalid, {"41"});
  expect_error(plan_with([](P& p) { p.group_size = 33; }), invalid, {"33", "96"});
  expect_error(plan_with([](P& p) { p.k = std::numeric_limits<int64_t>::max(); }), invalid,
               {"9223372036854775807"});
  nibble_plan made;
  expect_error(nibble_gemm_plan(nullptr, &problem_, nullptr), invalid, {"out is null"});
  expect_error(nibble_gemm_plan(&made, nullptr, nullptr), invalid, {"problem is null"});
  expect_error(nibble_gemm_plan(&made, &problem_, "nonsense"), invalid, {"'nonsense'"});
  expect_error(nibble_gemm_plan(&made, &problem_, "w4a4_scalar"), invalid, {"w4a4", "w4a8"});
}

TEST_F(CApi, AFailedPlanIsUntouched) {
  nibble_plan made;
  std::memset(&made, 0x5a, sizeof made);
  const nibble_plan before = made;
  problem_.n = 41;
  EXPECT_NE(nibble_gemm_plan(&made, &problem_, nullptr).code, NIBBLE_OK);
  EXPECT_EQ(std::memcmp(&made, &before, sizeof made), 0);
}

TEST_F(CApi, MemoryThatIsNotAPlanIsRefused) {
  const WeightPtr weight = create(desc_);
  std::vector<float> y(kM * kN), scales(kM);
  std::vector<int8_t> codes(kM * kK);
  Workspace workspace(1 << 10);
  const nibble_target target = {weight.get(), y.data(), kN};
  nibble_plan zero = {}, garbage;
  std::memset(&garbage, 0xcd, sizeof garbage);
  for (const nibble_plan* bad :
       {static_cast<const nibble_plan*>(nullptr), static_cast<const nibble_plan*>(&zero),
        static_cast<const nibble_plan*>(&garbage)}) {
    const char* word = bad == nullptr ? "plan is null" : "plan was not made by nibble_gemm_plan";
    EXPECT_EQ(nibble_plan_kernel(bad), nullptr);
    EXPECT_EQ(nibble_gemm_workspace_bytes(bad), 0u);
    char text[8] = "before";
    EXPECT_EQ(nibble_plan_describe(bad, text, sizeof text), 0u);
    EXPECT_STREQ(text, "");
    expect_error(nibble_gemm(bad, &input_, &target, 1, workspace.data()), NIBBLE_INVALID_ARGUMENT,
                 {word});
    expect_error(
        nibble_gemm_quantized(bad, codes.data(), kK, scales.data(), &target, 1, workspace.data()),
        NIBBLE_INVALID_ARGUMENT, {word});
    expect_error(nibble_quantize_activations(bad, &input_, codes.data(), scales.data(), nullptr),
                 NIBBLE_INVALID_ARGUMENT, {word});
  }
}

TEST_F(CApi, APlanIsAValue) {
  const WeightPtr weight = create(desc_);
  const nibble_plan original = plan();
  nibble_plan copy;
  std::memcpy(&copy, &original, sizeof copy);
  EXPECT_EQ(multiply(copy, weight.get()), multiply(original, weight.get()));
}

TEST_F(CApi, DescribeCutsToTheBuffer) {
  const nibble_plan made = plan("w4a8_scalar");
  const size_t length = nibble_plan_describe(&made, nullptr, 0);
  ASSERT_GT(length, 20u);
  std::string whole(length + 1, '?');
  EXPECT_EQ(nibble_plan_describe(&made, whole.data(), whole.size()), length);
  EXPECT_EQ(std::strlen(whole.c_str()), length);
  EXPECT_TRUE(contains(whole, "w4a8_scalar: M=5 N=40 K=96 g=32")) << whole;
  for (const size_t bytes : {size_t{1}, size_t{2}, size_t{13}, length}) {
    std::string cut(length + 1, '?');
    EXPECT_EQ(nibble_plan_describe(&made, cut.data(), bytes), length);
    EXPECT_EQ(std::string(cut.c_str()), whole.substr(0, bytes - 1));
    EXPECT_EQ(cut[bytes], '?');
  }
  char untouched = '?';
  EXPECT_EQ(nibble_plan_describe(&made, &untouched, 0), length);
  EXPECT_EQ(untouched, '?');
}

TEST_F(CApi, LongMessagesAreCutBetweenCharacters) {
  for (size_t shift = 0; shift < 4; ++shift) {
    const std::string prefix(shift, 'x');
    for (const std::string character : {"é", "漢", "🙂"}) {
      std::string name = prefix;
      while (name.size() < 1000) name += character;
      nibble_plan made;
      const nibble_status status = nibble_gemm_plan(&made, &problem_, name.c_str());
      const std::string message = status.message;
      EXPECT_LE(message.size(), sizeof status.message - 1);
      EXPECT_GE(message.size(), sizeof status.message - 4);
      const std::string tail = message.substr(message.size() - character.size());
      EXPECT_EQ(tail, character) << shift;
    }
  }
}

// ---- products -----------------------------------------------------------------------------------

TEST_F(CApi, EveryModeAndGranularityEqualsTheOracle) {
  const WeightPtr weight = create(desc_);
  static constexpr float kStaticScales[] = {0.02f, 0.05f, 0.03f};
  input_.static_scales = kStaticScales;
  for (const int32_t mode : {NIBBLE_W4A16, NIBBLE_W4A8, NIBBLE_W4A4}) {
    for (int32_t granularity = NIBBLE_TENSOR; granularity <= NIBBLE_STATIC_GROUP; ++granularity) {
      for (const int32_t asymmetric : {0, 1}) {
        if (asymmetric == 1 && (mode != NIBBLE_W4A4 || granularity > NIBBLE_GROUP)) continue;
        for (const float clip : {0.0f, 1.0f, 0.8f}) {
          problem_.mode = mode;
          problem_.granularity = granularity;
          problem_.asymmetric = asymmetric;
          input_.clip = clip;
          EXPECT_EQ(multiply(plan(), weight.get()), expected())
              << mode << " " << granularity << " " << asymmetric << " " << clip;
        }
      }
    }
  }
}

TEST_F(CApi, WideGroupsAreInt8TheOthersInt4) {
  const WeightPtr weight = create(desc_);
  problem_.granularity = NIBBLE_GROUP;
  problem_.mode = NIBBLE_W4A4;
  const std::vector<float> narrow = multiply(plan(), weight.get());
  problem_.mode = NIBBLE_W4A8;
  const std::vector<float> wide = multiply(plan(), weight.get());
  ASSERT_NE(narrow, wide);
  problem_.mode = NIBBLE_W4A4_WIDE;
  std::vector<uint8_t> groups(kGroups, 1);
  input_.wide_groups = groups.data();
  EXPECT_EQ(multiply(plan(), weight.get()), wide);
  groups.assign(kGroups, 0);
  EXPECT_EQ(multiply(plan(), weight.get()), narrow);
  groups[1] = 1;
  // The oracle's codes and scales of the one mode or the other, group by group.
  const ref::Weights w = ref::unpack(awq_.view());
  const GemmInput input{x_.data(), kK};
  Problem p = cpp_problem();
  p.mode = Mode::w4a4;
  ref::Activations a = ref::quantize(p, input);
  p.mode = Mode::w4a8;
  const ref::Activations a8 = ref::quantize(p, input);
  for (int64_t m = 0; m < kM; ++m) {
    std::copy_n(&a8.codes[m * kK + kGroup], kGroup, &a.codes[m * kK + kGroup]);
    a.scales[m * kGroups + 1] = a8.scales[m * kGroups + 1];
  }
  EXPECT_EQ(
      multiply(plan(), weight.get()),
      ref::epilogue(p, w, ref::partial_sums(w, a.codes.data(), kM), a.scales.data(), nullptr));
  const nibble_plan made = plan();
  Workspace workspace = workspace_of(made);
  std::vector<float> y(kM * kN);
  input_.wide_groups = nullptr;
  const nibble_target target = {weight.get(), y.data(), kN};
  expect_error(nibble_gemm(&made, &input_, &target, 1, workspace.data()), NIBBLE_INVALID_ARGUMENT,
               {"wide_groups"});
  expect_error(plan_with([](nibble_problem& q) { q.granularity = NIBBLE_TOKEN; }),
               NIBBLE_INVALID_ARGUMENT, {"group"});
}

TEST_F(CApi, QuantizingAloneThenMultiplyingIsTheSame) {
  const WeightPtr weight = create(desc_);
  const nibble_plan made = plan();
  std::vector<int8_t> codes(kM * kK);
  std::vector<float> scales(kM), y(kM * kN);
  std::vector<int32_t> sums(kM * kGroups);
  expect_ok(nibble_quantize_activations(&made, &input_, codes.data(), scales.data(), sums.data()));
  const ref::Activations a = ref::quantize(cpp_problem(), {x_.data(), kK});
  EXPECT_EQ(codes, a.codes);
  EXPECT_EQ(scales, a.scales);
  EXPECT_EQ(sums, a.sums);
  expect_ok(nibble_quantize_activations(&made, &input_, codes.data(), scales.data(), nullptr));
  Workspace workspace = workspace_of(made);
  const nibble_target target = {weight.get(), y.data(), kN};
  expect_ok(
      nibble_gemm_quantized(&made, codes.data(), kK, scales.data(), &target, 1, workspace.data()));
  EXPECT_EQ(y, expected());
}

// Up to 8 targets are converted on the stack, more on the heap.
TEST_F(CApi, AnyNumberOfTargets) {
  const WeightPtr weight = create(desc_);
  const nibble_plan made = plan();
  Workspace workspace = workspace_of(made);
  for (const int32_t count : {0, 1, 2, 7, 8, 9, 20}) {
    std::vector<std::vector<float>> outputs(static_cast<size_t>(count),
                                            std::vector<float>(kM * kN, -1));
    std::vector<nibble_target> targets;
    for (auto& y : outputs) targets.push_back({weight.get(), y.data(), kN});
    expect_ok(nibble_gemm(&made, &input_, targets.data(), count, workspace.data()));
    for (const auto& y : outputs) EXPECT_EQ(y, expected()) << count;
    if (count == 0) continue;
    targets.back().weight = nullptr;
    const std::string name = "targets[" + std::to_string(count - 1) + "].weight is null";
    expect_error(nibble_gemm(&made, &input_, targets.data(), count, workspace.data()),
                 NIBBLE_INVALID_ARGUMENT, {name.c_str()});
  }
  expect_ok(nibble_gemm(&made, &input_, nullptr, 0, workspace.data()));
}

TEST_F(CApi, NoRowsNeedNoBuffers) {
  const WeightPtr weight = create(desc_);
  problem_.m = 0;
  input_.x = nullptr;
  const nibble_plan made = plan();
  const nibble_target target = {weight.get(), nullptr, kN};
  expect_ok(nibble_gemm(&made, &input_, &target, 1, nullptr));
  expect_ok(nibble_gemm_quantized(&made, nullptr, kK, nullptr, &target, 1, nullptr));
  expect_ok(nibble_quantize_activations(&made, &input_, nullptr, nullptr, nullptr));
}

TEST_F(CApi, WrongCallsAreRefusedByName) {
  const WeightPtr weight = create(desc_);
  const nibble_plan made = plan();
  Workspace workspace = workspace_of(made);
  std::vector<float> y(kM * kN), scales(kM, 1.0f);
  std::vector<int8_t> codes(kM * kK);
  const nibble_target target = {weight.get(), y.data(), kN};
  const auto gemm = [&](const nibble_input& input, const nibble_target& t) {
    return nibble_gemm(&made, &input, &t, 1, workspace.data());
  };
  const auto invalid = NIBBLE_INVALID_ARGUMENT;
  expect_ok(gemm(input_, target));
  expect_error(nibble_gemm(&made, nullptr, &target, 1, workspace.data()), invalid,
               {"input is null"});
  expect_error(nibble_gemm(&made, &input_, nullptr, 1, workspace.data()), invalid,
               {"targets is null"});
  expect_error(nibble_gemm(&made, &input_, &target, -1, workspace.data()), invalid,
               {"num_targets is -1"});
  expect_error(nibble_gemm(&made, &input_, &target, 1, nullptr), invalid, {"workspace is null"});
  expect_error(nibble_gemm(&made, &input_, &target, 1, workspace[0].bytes + 8), invalid,
               {"64-byte aligned"});
  expect_error(gemm(input_, {nullptr, y.data(), kN}), invalid, {"targets[0].weight is null"});
  expect_error(gemm(input_, {weight.get(), nullptr, kN}), invalid, {"targets[0].y is null"});
  expect_error(gemm(input_, {weight.get(), y.data(), kN - 1}), invalid, {"39", "N=40"});
  nibble_input input = input_;
  input.x = nullptr;
  expect_error(gemm(input, target), invalid, {"x is null"});
  input = input_;
  input.x_stride = kK - 1;
  expect_error(gemm(input, target), invalid, {"95", "K=96"});
  input = input_;
  input.reserved = 3;
  expect_error(gemm(input, target), invalid, {"input->reserved is 3"});
  input = input_;
  input.clip = 2;
  expect_error(gemm(input, target), invalid, {"clip 2"});
  expect_error(
      nibble_gemm_quantized(&made, nullptr, kK, scales.data(), &target, 1, workspace.data()),
      invalid, {"codes is null"});
  expect_error(
      nibble_gemm_quantized(&made, codes.data(), kK, nullptr, &target, 1, workspace.data()),
      invalid, {"scales is null"});
  expect_error(nibble_gemm_quantized(&made, codes.data(), kK - 1, scales.data(), &target, 1,
                                     workspace.data()),
               invalid, {"95", "K=96"});
  expect_error(nibble_quantize_activations(&made, nullptr, codes.data(), scales.data(), nullptr),
               invalid, {"input is null"});
  expect_error(nibble_quantize_activations(&made, &input_, nullptr, scales.data(), nullptr),
               invalid, {"codes is null"});
  expect_error(nibble_quantize_activations(&made, &input_, codes.data(), nullptr, nullptr), invalid,
               {"scales is null"});
  problem_.granularity = NIBBLE_STATIC_GROUP;
  const nibble_plan needs_scales = plan();
  expect_error(nibble_gemm(&needs_scales, &input_, &target, 1, workspace.data()), invalid,
               {"static-group", "3 static scales"});
  desc_.group_size = 48;
  desc_.k = 48;
  const WeightPtr other = create(desc_);
  expect_error(gemm(input_, {other.get(), y.data(), kN}), invalid, {"K=48", "K=96"});
}

TEST_F(CApi, NonFiniteActivationsNameTheirRow) {
  const WeightPtr weight = create(desc_);
  const nibble_plan made = plan();
  Workspace workspace = workspace_of(made);
  std::vector<float> y(kM * kN), scales(kM);
  std::vector<int8_t> codes(kM * kK);
  const nibble_target target = {weight.get(), y.data(), kN};
  x_[3 * kK + 95] = std::numeric_limits<float>::infinity();
  expect_error(nibble_gemm(&made, &input_, &target, 1, workspace.data()), NIBBLE_NON_FINITE,
               {"row 3"});
  expect_error(nibble_quantize_activations(&made, &input_, codes.data(), scales.data(), nullptr),
               NIBBLE_NON_FINITE, {"row 3"});
}

}  // namespace
}  // namespace nibble::testing
