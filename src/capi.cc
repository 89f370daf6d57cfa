// The C ABI of include/nibble.h on top of gemm/gemm.h: checks what C cannot express (null, enum
// ranges, reserved fields), converts, and lets no exception out. No arithmetic lives here.
#include "nibble.h"

#include <fmt/format.h>

#include <array>
#include <cstring>
#include <span>
#include <type_traits>
#include <vector>

#include "capi_common.h"
#include "gemm/cpu/kernel.h"
#include "gemm/cpu/weight_block.h"
#include "gemm/gemm.h"

/// A weight is its block: whatever memory it lies in.
struct nibble_weight {
  nibble::WeightHeader header;
};

namespace {

using nibble::Code;
using nibble::Dtype;
using nibble::Granularity;
using nibble::Mode;
using nibble::Plan;
using nibble::Result;
using nibble::Status;
using nibble::WeightLayout;
using namespace nibble::capi;

// ---- both sides say the same --------------------------------------------------------------------

template <class Cpp>
constexpr bool same(int c, Cpp cpp) {
  return c == static_cast<int>(cpp);
}
static_assert(same(NIBBLE_OK, Code::ok) && same(NIBBLE_INVALID_ARGUMENT, Code::invalid_argument) &&
              same(NIBBLE_UNSUPPORTED, Code::unsupported) &&
              same(NIBBLE_CORRUPT_FILE, Code::corrupt_file) &&
              same(NIBBLE_IO_ERROR, Code::io_error) &&
              same(NIBBLE_OUT_OF_MEMORY, Code::out_of_memory) &&
              same(NIBBLE_NON_FINITE, Code::non_finite) &&
              same(NIBBLE_INTERRUPTED, Code::interrupted));
static_assert(same(NIBBLE_F32, Dtype::f32) && same(NIBBLE_F16, Dtype::f16) &&
              same(NIBBLE_BF16, Dtype::bf16));
static_assert(same(NIBBLE_W4A16, Mode::w4a16) && same(NIBBLE_W4A8, Mode::w4a8) &&
              same(NIBBLE_W4A4, Mode::w4a4) && same(NIBBLE_W4A8_FP8, Mode::w4a8_fp8));
static_assert(same(NIBBLE_TENSOR, Granularity::tensor) && same(NIBBLE_TOKEN, Granularity::token) &&
              same(NIBBLE_GROUP, Granularity::group) &&
              same(NIBBLE_STATIC_TENSOR, Granularity::static_tensor) &&
              same(NIBBLE_STATIC_GROUP, Granularity::static_group));
static_assert(same(NIBBLE_AWQ_GEMM, WeightLayout::awq_gemm) &&
              same(NIBBLE_AWQ_GEMV, WeightLayout::awq_gemv) &&
              same(NIBBLE_CT_PACK, WeightLayout::ct_pack));
static_assert(sizeof(nibble_status) == 512);

/// What lies in nibble_plan.opaque. The magic word tells a plan from memory that is not one.
struct PlanBox {
  uint64_t magic;
  Plan plan;
};
constexpr uint64_t kPlanMagic = 0x314e414c5042494eu;  // "NIBPLAN1"
static_assert(std::is_trivially_copyable_v<PlanBox>);
static_assert(sizeof(PlanBox) <= sizeof(nibble_plan));

constexpr int64_t kTargetsOnStack = 8;

// ---- conversions --------------------------------------------------------------------------------

/// The plan in `boxed`; false if it is null or was never made by nibble_gemm_plan.
bool open_plan(const nibble_plan* boxed, Plan* plan) {
  if (boxed == nullptr) return false;
  PlanBox box;
  std::memcpy(&box, boxed->opaque, sizeof box);
  if (box.magic != kPlanMagic) return false;
  *plan = box.plan;
  return true;
}

Result<Plan> plan_from(const nibble_plan* boxed) {
  NIBBLE_TRY(require({{boxed, "plan"}}));
  Plan plan;
  if (!open_plan(boxed, &plan)) return invalid("plan was not made by nibble_gemm_plan");
  return plan;
}

nibble::PackSource pack_source(const nibble::QuantMatrix& matrix, const nibble_weight_desc& desc) {
  return {matrix, desc.bias, static_cast<Dtype>(desc.bias_dtype)};
}

/// The weight in `bytes` of memory that the caller's argument `name` points to.
Result<nibble::PackedWeights> open_packed(const void* memory, size_t bytes, const char* name) {
  if (memory != nullptr && bytes < sizeof(nibble::WeightHeader)) {
    return invalid(fmt::format("{} has {} bytes, less than a header", name, bytes));
  }
  Result<nibble::PackedWeights> view = nibble::open_weight_block(memory, name);
  if (!view.ok()) return view;
  const uint64_t needed = static_cast<const nibble_weight*>(memory)->header.bytes;
  if (needed <= bytes) return view;
  return invalid(fmt::format("{} has {} bytes, expected {}", name, bytes, needed));
}

Result<nibble::GemmInput> input_from(const nibble_input* input, const Plan& plan) {
  NIBBLE_TRY(require({{input, "input"}}));
  NIBBLE_TRY(require_zero("input->reserved", input->reserved));
  nibble::GemmInput to{input->x, input->x_stride, input->clip == 0.0f ? 1.0f : input->clip,
                       input->static_scales};
  // Callers of other modes may have been compiled before the field existed.
  if (plan.problem.mixed_groups) to.wide_groups = input->wide_groups;
  return to;
}

/// views: of the weights, which the converted targets point to.
Status convert_targets(const Plan& plan, const nibble_target* from,
                       std::span<nibble::PackedWeights> views, std::span<nibble::GemmTarget> to) {
  for (size_t i = 0; i < to.size(); ++i) {
    nibble::Result<nibble::PackedWeights> weights = nibble::open_weight_block(from[i].weight);
    if (!weights.ok()) return invalid(fmt::format("targets[{}].{}", i, weights.status().message()));
    if (from[i].y == nullptr && plan.problem.m > 0) {
      return invalid(fmt::format("targets[{}].y is null", i));
    }
    views[i] = std::move(*weights);
    to[i] = {&views[i], from[i].y, from[i].y_stride};
  }
  return {};
}

/// body(std::span<const GemmTarget>) on the converted targets; the usual few need no allocation.
template <class Body>
Status with_targets(const Plan& plan, const nibble_target* targets, int32_t num_targets,
                    const Body& body) {
  if (num_targets < 0) return invalid(fmt::format("num_targets is {}", num_targets));
  if (num_targets > 0) NIBBLE_TRY(require({{targets, "targets"}}));
  const auto count = static_cast<size_t>(num_targets);
  if (num_targets <= kTargetsOnStack) {
    std::array<nibble::GemmTarget, kTargetsOnStack> few;
    std::array<nibble::PackedWeights, kTargetsOnStack> views;
    NIBBLE_TRY(convert_targets(plan, targets, views, std::span(few).first(count)));
    return body(std::span<const nibble::GemmTarget>(few).first(count));
  }
  std::vector<nibble::GemmTarget> many(count);
  std::vector<nibble::PackedWeights> views(count);
  NIBBLE_TRY(convert_targets(plan, targets, views, many));
  return body(std::span<const nibble::GemmTarget>(many));
}

}  // namespace

// ---- the functions of nibble.h, in its order ----------------------------------------------------

int32_t nibble_abi_version(void) { return NIBBLE_ABI_VERSION; }

const char* nibble_version(void) { return NIBBLE_VERSION; }

nibble_status nibble_weight_create(nibble_weight** out, const nibble_weight_desc* desc,
                                   int32_t threads) {
  if (out != nullptr) *out = nullptr;
  return guarded([&]() -> Status {
    NIBBLE_TRY(require({{out, "out"}}));
    NIBBLE_TRY(require_threads(threads));
    const Result<nibble::QuantMatrix> matrix = matrix_from(desc);
    if (!matrix.ok()) return matrix.status();
    const nibble::PackSource source = pack_source(*matrix, *desc);
    const Result<size_t> bytes = nibble::weight_block_bytes(*matrix, desc->bias != nullptr);
    if (!bytes.ok()) return bytes.status();
    Result<nibble::AlignedBuffer> block = nibble::AlignedBuffer::zeroed(*bytes);
    if (!block.ok()) return block.status();
    NIBBLE_TRY(nibble::write_weight_block(source, threads, block->data(), *bytes, true));
    size_t mapped = 0;
    auto* weight = reinterpret_cast<nibble_weight*>(block->release(&mapped));
    weight->header.mapped = mapped;
    *out = weight;
    return {};
  });
}

void nibble_weight_destroy(nibble_weight* weight) {
  if (weight == nullptr) return;
  const nibble::FreeBuffer free_block{static_cast<size_t>(weight->header.mapped)};
  free_block(reinterpret_cast<std::byte*>(weight));
}

nibble_status nibble_weight_packed_bytes(size_t* out, const nibble_weight_desc* desc) {
  return guarded([&]() -> Status {
    NIBBLE_TRY(require({{out, "out"}}));
    const Result<nibble::QuantMatrix> matrix = matrix_from(desc);
    if (!matrix.ok()) return matrix.status();
    const Result<size_t> bytes = nibble::weight_block_bytes(*matrix, desc->bias != nullptr);
    if (!bytes.ok()) return bytes.status();
    *out = *bytes;
    return {};
  });
}

nibble_status nibble_weight_pack(void* memory, size_t bytes, const nibble_weight_desc* desc,
                                 int32_t threads) {
  return guarded([&]() -> Status {
    NIBBLE_TRY(require({{memory, "memory"}}));
    NIBBLE_TRY(require_threads(threads));
    const Result<nibble::QuantMatrix> matrix = matrix_from(desc);
    if (!matrix.ok()) return matrix.status();
    return nibble::write_weight_block(pack_source(*matrix, *desc), threads, memory, bytes, false);
  });
}

nibble_status nibble_weight_open(const nibble_weight** out, const void* memory, size_t bytes) {
  if (out != nullptr) *out = nullptr;
  return guarded([&]() -> Status {
    NIBBLE_TRY(require({{out, "out"}}));
    const Result<nibble::PackedWeights> view = open_packed(memory, bytes, "memory");
    if (!view.ok()) return view.status();
    *out = static_cast<const nibble_weight*>(memory);
    return {};
  });
}

int64_t nibble_weight_k(const nibble_weight* weight) {
  return weight == nullptr ? 0 : weight->header.k;
}

int64_t nibble_weight_n(const nibble_weight* weight) {
  return weight == nullptr ? 0 : weight->header.n;
}

int64_t nibble_weight_group_size(const nibble_weight* weight) {
  return weight == nullptr ? 0 : weight->header.group_size;
}

size_t nibble_weight_bytes(const nibble_weight* weight) {
  return weight == nullptr ? 0 : static_cast<size_t>(weight->header.bytes);
}

nibble_status nibble_dequantize(const nibble_weight_desc* desc, float* out) {
  return guarded([&]() -> Status {
    NIBBLE_TRY(require({{out, "out"}}));
    const Result<nibble::QuantMatrix> matrix = matrix_from(desc);
    if (!matrix.ok()) return matrix.status();
    nibble::dequantize(*matrix, 0, matrix->n, out);
    return {};
  });
}

nibble_status nibble_gemm_plan(nibble_plan* out, const nibble_problem* problem,
                               const char* kernel) {
  return guarded([&]() -> Status {
    NIBBLE_TRY(require({{out, "out"}}));
    const Result<nibble::Problem> converted = problem_from(problem);
    if (!converted.ok()) return converted.status();
    const Result<Plan> plan = nibble::plan_gemm(*converted, kernel, problem->threads);
    if (!plan.ok()) return plan.status();
    const PlanBox box{kPlanMagic, *plan};
    *out = {};
    std::memcpy(out->opaque, &box, sizeof box);
    return {};
  });
}

const char* nibble_plan_kernel(const nibble_plan* plan) {
  Plan opened;
  return open_plan(plan, &opened) ? opened.kernel_name() : nullptr;
}

size_t nibble_plan_describe(const nibble_plan* plan, char* text, size_t bytes) {
  if (text == nullptr) bytes = 0;
  if (bytes > 0) text[0] = '\0';
  Plan opened;
  if (!open_plan(plan, &opened)) return 0;
  try {
    return copy_text(opened.describe(), text, bytes);
  } catch (...) {
    return 0;
  }
}

size_t nibble_gemm_workspace_bytes(const nibble_plan* plan) {
  Plan opened;
  return open_plan(plan, &opened) ? opened.workspace_bytes : 0;
}

nibble_status nibble_gemm(const nibble_plan* plan, const nibble_input* input,
                          const nibble_target* targets, int32_t num_targets, void* workspace) {
  return guarded([&]() -> Status {
    const Result<Plan> opened = plan_from(plan);
    if (!opened.ok()) return opened.status();
    const Result<nibble::GemmInput> x = input_from(input, *opened);
    if (!x.ok()) return x.status();
    return with_targets(*opened, targets, num_targets, [&](const auto& converted) {
      return nibble::run_gemm(*opened, *x, converted, workspace);
    });
  });
}

nibble_status nibble_gemm_packed(const nibble_plan* plan, const nibble_input* input,
                                 const void* packed, size_t packed_bytes, void* y, int64_t y_stride,
                                 void* workspace) {
  return guarded([&]() -> Status {
    const Result<Plan> opened = plan_from(plan);
    if (!opened.ok()) return opened.status();
    const Result<nibble::GemmInput> x = input_from(input, *opened);
    if (!x.ok()) return x.status();
    const Result<nibble::PackedWeights> weights = open_packed(packed, packed_bytes, "packed");
    if (!weights.ok()) return weights.status();
    if (weights->n != opened->problem.n) {
      return invalid(fmt::format("packed has N={}, the plan N={}", weights->n, opened->problem.n));
    }
    if (opened->problem.m > 0) NIBBLE_TRY(require({{y, "y"}}));
    const nibble::GemmTarget target{&*weights, y, y_stride};
    return nibble::run_gemm(*opened, *x, std::span(&target, 1), workspace);
  });
}

nibble_status nibble_gemm_quantized(const nibble_plan* plan, const int8_t* codes,
                                    int64_t code_stride, const float* scales,
                                    const nibble_target* targets, int32_t num_targets,
                                    void* workspace) {
  return guarded([&]() -> Status {
    const Result<Plan> opened = plan_from(plan);
    if (!opened.ok()) return opened.status();
    if (opened->problem.m > 0) NIBBLE_TRY(require({{codes, "codes"}, {scales, "scales"}}));
    return with_targets(*opened, targets, num_targets, [&](const auto& converted) {
      return nibble::run_gemm_quantized(*opened, {codes, code_stride, scales}, converted,
                                        workspace);
    });
  });
}

nibble_status nibble_quantize_activations(const nibble_plan* plan, const nibble_input* input,
                                          int8_t* codes, float* scales, int32_t* sums) {
  return guarded([&]() -> Status {
    const Result<Plan> opened = plan_from(plan);
    if (!opened.ok()) return opened.status();
    const Result<nibble::GemmInput> x = input_from(input, *opened);
    if (!x.ok()) return x.status();
    if (opened->problem.m > 0) NIBBLE_TRY(require({{codes, "codes"}, {scales, "scales"}}));
    return nibble::quantize_activations(*opened, *x, codes, scales, sums);
  });
}

int32_t nibble_kernel_count(void) { return static_cast<int32_t>(nibble::cpu_kernels().size()); }

const char* nibble_kernel_name(int32_t index) {
  if (index < 0 || index >= nibble_kernel_count()) return nullptr;
  return nibble::cpu_kernels()[static_cast<size_t>(index)].name;
}

const char* nibble_kernel_missing(int32_t index) {
  if (index < 0 || index >= nibble_kernel_count()) return "no kernel has this index";
  return nibble::isa_missing_reason(nibble::cpu_kernels()[static_cast<size_t>(index)].isa);
}
