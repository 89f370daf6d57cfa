#include "gemm_testing.h"

#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <set>

#include "base/aligned_buffer.h"
#include "base/check.h"

namespace nibble::testing {
namespace {

/// A workspace that ends at a page without access, less the 63 bytes that its alignment may leave:
/// a kernel that reads past it, even in assembly, faults. What was there must not matter: 0xa5.
class GuardedWorkspace {
 public:
  explicit GuardedWorkspace(size_t bytes) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t used = (bytes + kCacheLineBytes - 1) / kCacheLineBytes * kCacheLineBytes;
    const size_t pages = (used + page - 1) / page * page;
    mapped_ = pages + page;
    base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    NIBBLE_CHECK(base_ != MAP_FAILED);
    std::memset(base_, 0xa5, pages);
    NIBBLE_CHECK(mprotect(static_cast<std::byte*>(base_) + pages, page, PROT_NONE) == 0);
    data_ = static_cast<std::byte*>(base_) + pages - used;
  }
  ~GuardedWorkspace() { munmap(base_, mapped_); }
  GuardedWorkspace(const GuardedWorkspace&) = delete;
  GuardedWorkspace& operator=(const GuardedWorkspace&) = delete;

  void* data() const { return data_; }

 private:
  void* base_ = nullptr;
  void* data_ = nullptr;
  size_t mapped_ = 0;
};

uint16_t random_scale(ScaleKind kind, Dtype dtype, std::mt19937& random) {
  const float magnitude = std::uniform_real_distribution<float>(0.5f, 2.0f)(random) * 0.01f;
  switch (kind) {
    case ScaleKind::ordinary: break;
    case ScaleKind::negative:
      return dtype == Dtype::f16 ? f16_from_float(-magnitude) : bf16_from_float(-magnitude);
    case ScaleKind::subnormal:  // both types have exponent 0 below their smallest normal number
      return static_cast<uint16_t>(1 + random() % (dtype == Dtype::f16 ? 0x3ff : 0x7f));
    case ScaleKind::mixed: {
      const auto pick = static_cast<ScaleKind>(random() % 3);
      return random_scale(pick, dtype, random);
    }
  }
  return dtype == Dtype::f16 ? f16_from_float(magnitude) : bf16_from_float(magnitude);
}

}  // namespace

TestWeight make_weight(const WeightSpec& spec, std::mt19937& random) {
  const int64_t groups = spec.k / spec.group_size;
  std::vector<uint8_t> codes(static_cast<size_t>(spec.k * spec.n));
  std::vector<uint8_t> zeros(static_cast<size_t>(groups * spec.n));
  std::vector<uint16_t> scales(static_cast<size_t>(groups * spec.n));
  for (auto& q : codes)
    q = static_cast<uint8_t>(spec.fixed_code >= 0 ? spec.fixed_code : random() % 16);
  for (auto& z : zeros)
    z = static_cast<uint8_t>(spec.fixed_zero >= 0 ? spec.fixed_zero : random() % 16);
  for (auto& s : scales) s = random_scale(spec.scales, spec.scale_dtype, random);
  TestWeight weight;
  weight.tensors = pack_awq_gemm(spec.k, spec.n, spec.group_size, codes.data(), zeros.data(),
                                 scales.data(), spec.scale_dtype);
  if (spec.bias) {
    weight.bias.resize(static_cast<size_t>(spec.n));
    for (float& b : weight.bias) b = std::normal_distribution<float>()(random);
  }
  weight.reference = ref::unpack(weight.tensors.view());
  Result<PackedWeights> packed =
      pack_weights(weight.tensors.view(), weight.bias_or_null(), Dtype::f32, 1);
  EXPECT_TRUE(packed.ok()) << packed.status().message();
  if (packed.ok()) weight.packed = std::move(*packed);
  return weight;
}

std::vector<std::string> runnable_kernels(Mode mode) {
  static std::set<std::string> reported;
  std::vector<std::string> names;
  for (const KernelInfo& info : kernel_table()) {
    if (info.mode != mode) continue;
    if (info.runs_here) {
      names.push_back(info.name);
    } else if (reported.insert(info.name).second) {
      std::printf("SKIPPED KERNEL %s: %s\n", info.name, info.reason.c_str());
    }
  }
  return names;
}

std::vector<int8_t> random_codes(Mode mode, int64_t count, std::mt19937& random) {
  std::vector<int8_t> codes(static_cast<size_t>(count));
  for (auto& code : codes) {
    code = static_cast<int8_t>(mode == Mode::w4a4 ? static_cast<int>(random() % 31) - 15
                                                  : static_cast<int>(random() % 256) - 128);
  }
  return codes;
}

bool kernel_equals_oracle(const std::string& kernel, const Problem& problem,
                          const TestWeight& weight, const std::vector<int8_t>& codes,
                          const std::vector<float>& scales, std::string* why) {
  const ref::Weights& w = weight.reference;
  const Result<Plan> plan = plan_gemm(problem, kernel.c_str(), 1);
  if (!plan.ok()) return *why = plan.status().message(), false;
  if (plan->kernel_name() != kernel) return *why = "another kernel was planned", false;
  const auto expected = ref::partial_sums(w, codes.data(), problem.m);
  const auto expected_y = ref::epilogue(problem, w, expected, scales.data(), weight.bias_or_null());
  std::vector<int32_t> partials(expected.size(), 0x55555555);
  AlignedBuffer y = std::move(*AlignedBuffer::zeroed(expected_y.size() * 4));
  std::memset(y.data(), 0xcc, y.bytes());
  const GuardedWorkspace workspace(plan->workspace_bytes);
  const GemmTarget target{&weight.packed, y.data(), problem.n, partials.data()};
  const Status status = run_gemm_quantized(*plan, {codes.data(), problem.k, scales.data()},
                                           {&target, 1}, workspace.data());
  if (!status.ok()) return *why = status.message(), false;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (partials[i] == expected[i]) continue;
    const auto column = static_cast<int64_t>(i) % w.n, group = static_cast<int64_t>(i) / w.n;
    *why = fmt::format("{}: S of row {}, group {}, column {} is {}, expected {} [{}]", kernel,
                       group / w.groups, group % w.groups, column, partials[i], expected[i],
                       plan->describe());
    return false;
  }
  for (size_t i = 0; i < expected_y.size(); ++i) {
    std::byte rounded[4] = {};
    store_from_float(rounded, 0, problem.y_dtype, expected_y[i]);
    const int bytes = dtype_bytes(problem.y_dtype);
    if (std::memcmp(rounded, y.data() + i * bytes, bytes) == 0) continue;
    *why = fmt::format("{}: y of row {}, column {} is {}, expected {} [{}]", kernel,
                       static_cast<int64_t>(i) / w.n, static_cast<int64_t>(i) % w.n,
                       load_as_float(y.data(), static_cast<int64_t>(i), problem.y_dtype),
                       expected_y[i], plan->describe());
    return false;
  }
  return true;
}

void expect_kernel_equals_oracle(const std::string& kernel, Problem problem,
                                 const TestWeight& weight, std::mt19937& random) {
  problem.k = weight.reference.k;
  problem.n = weight.reference.n;
  problem.group_size = weight.reference.group_size;
  const auto codes = random_codes(problem.mode, problem.m * problem.k, random);
  const int64_t per_row = scales_per_group(problem.granularity) ? weight.reference.groups : 1;
  std::vector<float> scales(static_cast<size_t>(problem.m * per_row));
  for (float& t : scales) t = std::uniform_real_distribution<float>(0.001f, 0.1f)(random);
  std::string why;
  ASSERT_TRUE(kernel_equals_oracle(kernel, problem, weight, codes, scales, &why)) << why;
}

Status run(const Plan& plan, const GemmInput& input, std::span<const GemmTarget> targets) {
  const GuardedWorkspace workspace(plan.workspace_bytes);
  return run_gemm(plan, input, targets, workspace.data());
}

}  // namespace nibble::testing
