// The CUDA functions of include/nibble.h on top of gemm/cuda/gemm_cuda.h.
#include <fmt/format.h>

#include <cstring>
#include <type_traits>

#include "capi_common.h"
#include "gemm/cuda/gemm_cuda.h"
#include "gemm/cuda/limits.h"
#include "gemm/cuda/weight_block.h"
#include "nibble.h"

struct nibble_cuda_weight {
  nibble::cuda::DeviceWeights weights;
};

namespace {

using nibble::Dtype;
using nibble::Problem;
using nibble::QuantMatrix;
using nibble::Result;
using nibble::Status;
using nibble::cuda::DeviceInfo;
using nibble::cuda::DeviceInput;
using nibble::cuda::DeviceWeights;
using nibble::cuda::Plan;
using namespace nibble::capi;

/// What lies in nibble_cuda_plan.opaque, as in capi.cc.
struct CudaPlanBox {
  uint64_t magic;
  Plan plan;
};
constexpr uint64_t kCudaPlanMagic = 0x314355444342494eu;  // "NIBCDUC1"
static_assert(std::is_trivially_copyable_v<CudaPlanBox>);
static_assert(sizeof(CudaPlanBox) <= sizeof(nibble_cuda_plan));
static_assert(NIBBLE_CUDA_FLAG_BYTES == nibble::cuda::kFlagBytes);

bool open_cuda_plan(const nibble_cuda_plan* boxed, Plan* plan) {
  if (boxed == nullptr) return false;
  CudaPlanBox box;
  std::memcpy(&box, boxed->opaque, sizeof box);
  if (box.magic != kCudaPlanMagic) return false;
  *plan = box.plan;
  return true;
}

Result<Plan> cuda_plan_from(const nibble_cuda_plan* boxed) {
  NIBBLE_TRY(require({{boxed, "plan"}}));
  Plan plan;
  if (open_cuda_plan(boxed, &plan)) return plan;
  return invalid("plan was not made by nibble_cuda_gemm_plan");
}

Result<DeviceInput> device_input(const nibble_input* input) {
  NIBBLE_TRY(require({{input, "input"}}));
  NIBBLE_TRY(require_zero("input->reserved", input->reserved));
  return DeviceInput{input->x, input->x_stride, input->clip == 0.0f ? 1.0f : input->clip,
                     input->static_scales};
}

Result<nibble::cuda::Operand> operand_from(const nibble_cuda_operand* operand) {
  NIBBLE_TRY(require({{operand, "operand"}}));
  return nibble::cuda::Operand{operand->codes, operand->scales, operand->sums, operand->range};
}

}  // namespace

nibble_status nibble_cuda_device_count(int32_t* out) {
  return guarded([&]() -> Status {
    NIBBLE_TRY(require({{out, "out"}}));
    const Result<int> count = nibble::cuda::device_count();
    if (!count.ok()) return count.status();
    *out = *count;
    return {};
  });
}

nibble_status nibble_cuda_device_info(nibble_cuda_info* out, int32_t device) {
  return guarded([&]() -> Status {
    NIBBLE_TRY(require({{out, "out"}}));
    const Result<DeviceInfo> info = nibble::cuda::device_info(device);
    if (!info.ok()) return info.status();
    *out = {};
    copy_text(info->name, out->name, sizeof out->name);
    out->capability = info->capability;
    out->multiprocessors = info->multiprocessors;
    out->memory_bytes = info->memory_bytes;
    out->l2_bytes = info->l2_bytes;
    return {};
  });
}

nibble_status nibble_cuda_weight_create(nibble_cuda_weight** out, const nibble_weight_desc* desc,
                                        int32_t device) {
  if (out != nullptr) *out = nullptr;
  return guarded([&]() -> Status {
    NIBBLE_TRY(require({{out, "out"}}));
    const Result<QuantMatrix> matrix = matrix_from(desc);
    if (!matrix.ok()) return matrix.status();
    const Result<DeviceInfo> info = nibble::cuda::device_info(device);
    if (!info.ok()) return info.status();
    Result<DeviceWeights> weights =
        DeviceWeights::create(*info, *matrix, desc->bias, static_cast<Dtype>(desc->bias_dtype));
    if (!weights.ok()) return weights.status();
    *out = new nibble_cuda_weight{std::move(*weights)};
    return {};
  });
}

void nibble_cuda_weight_destroy(nibble_cuda_weight* weight) { delete weight; }

size_t nibble_cuda_weight_bytes(const nibble_cuda_weight* weight) {
  return weight == nullptr ? 0 : static_cast<size_t>(weight->weights.bytes());
}

nibble_status nibble_cuda_packed_bytes(size_t* out, const nibble_weight_desc* desc) {
  return guarded([&]() -> Status {
    NIBBLE_TRY(require({{out, "out"}}));
    const Result<QuantMatrix> matrix = matrix_from(desc);
    if (!matrix.ok()) return matrix.status();
    NIBBLE_TRY(nibble::cuda::check_group_size(matrix->group_size, matrix->k));
    const bool bf16_scales = matrix->scale_dtype == Dtype::bf16;
    *out = nibble::cuda::weight_block(
               nibble::cuda::packed_layout(matrix->n, matrix->k, matrix->group_size), bf16_scales,
               desc->bias != nullptr)
               .bytes;
    return {};
  });
}

nibble_status nibble_cuda_pack(void* packed, size_t packed_bytes, const nibble_weight_desc* desc,
                               int32_t device) {
  return guarded([&]() -> Status {
    NIBBLE_TRY(require({{packed, "packed"}}));
    const Result<QuantMatrix> matrix = matrix_from(desc);
    if (!matrix.ok()) return matrix.status();
    const Result<DeviceInfo> info = nibble::cuda::device_info(device);
    if (!info.ok()) return info.status();
    return DeviceWeights::pack(*info, *matrix, desc->bias, static_cast<Dtype>(desc->bias_dtype),
                               packed, packed_bytes);
  });
}

nibble_status nibble_cuda_gemm_plan(nibble_cuda_plan* out, const nibble_problem* problem,
                                    int32_t device, const char* kernel) {
  return guarded([&]() -> Status {
    NIBBLE_TRY(require({{out, "out"}}));
    const Result<Problem> converted = problem_from(problem);
    if (!converted.ok()) return converted.status();
    const Result<DeviceInfo> info = nibble::cuda::device_info(device);
    if (!info.ok()) return info.status();
    const Result<Plan> plan = nibble::cuda::plan_gemm(*converted, *info, kernel);
    if (!plan.ok()) return plan.status();
    const CudaPlanBox box{kCudaPlanMagic, *plan};
    *out = {};
    std::memcpy(out->opaque, &box, sizeof box);
    return {};
  });
}

const char* nibble_cuda_plan_kernel(const nibble_cuda_plan* plan) {
  Plan opened;
  return open_cuda_plan(plan, &opened) ? opened.kernel_name() : nullptr;
}

size_t nibble_cuda_plan_describe(const nibble_cuda_plan* plan, char* text, size_t bytes) {
  if (text != nullptr && bytes > 0) text[0] = '\0';
  Plan opened;
  if (!open_cuda_plan(plan, &opened)) return 0;
  try {
    return copy_text(opened.describe(), text, bytes);
  } catch (...) {
    return 0;
  }
}

size_t nibble_cuda_workspace_bytes(const nibble_cuda_plan* plan) {
  Plan opened;
  return open_cuda_plan(plan, &opened) ? opened.workspace_bytes : 0;
}

size_t nibble_cuda_zeroed_bytes(const nibble_cuda_plan* plan) {
  Plan opened;
  return open_cuda_plan(plan, &opened) && opened.reads_flags() ? NIBBLE_CUDA_FLAG_BYTES : 0;
}

nibble_status nibble_cuda_gemm(const nibble_cuda_plan* plan, const nibble_input* input,
                               const nibble_cuda_weight* weight, void* y, int64_t y_stride,
                               void* workspace, void* stream) {
  return guarded([&]() -> Status {
    NIBBLE_TRY(require({{plan, "plan"}, {input, "input"}, {weight, "weight"}}));
    const Result<Plan> opened = cuda_plan_from(plan);
    if (!opened.ok()) return opened.status();
    const Result<DeviceInput> x = device_input(input);
    if (!x.ok()) return x.status();
    return nibble::cuda::run_gemm(*opened, *x, weight->weights, y, y_stride, workspace, stream);
  });
}

nibble_status nibble_cuda_gemm_packed(const nibble_cuda_plan* plan, const nibble_input* input,
                                      const void* packed, size_t packed_bytes, void* y,
                                      int64_t y_stride, void* workspace, void* stream) {
  return guarded([&]() -> Status {
    const Result<Plan> opened = cuda_plan_from(plan);
    if (!opened.ok()) return opened.status();
    const Result<DeviceInput> x = device_input(input);
    if (!x.ok()) return x.status();
    NIBBLE_TRY(require({{packed, "packed"}}));
    const Result<DeviceWeights> weights =
        DeviceWeights::view(opened->problem, opened->device, packed, packed_bytes);
    if (!weights.ok()) return weights.status();
    return nibble::cuda::run_gemm(*opened, *x, *weights, y, y_stride, workspace, stream);
  });
}

nibble_status nibble_cuda_quantize_activations(const nibble_cuda_plan* plan,
                                               const nibble_input* input,
                                               const nibble_cuda_operand* to, void* stream) {
  return guarded([&]() -> Status {
    const Result<Plan> opened = cuda_plan_from(plan);
    if (!opened.ok()) return opened.status();
    const Result<DeviceInput> x = device_input(input);
    if (!x.ok()) return x.status();
    const Result<nibble::cuda::Operand> operand = operand_from(to);
    if (!operand.ok()) return operand.status();
    return nibble::cuda::quantize_activations(*opened, *x, *operand, stream);
  });
}

nibble_status nibble_cuda_gemm_quantized(const nibble_cuda_plan* plan,
                                         const nibble_cuda_operand* operand, const void* packed,
                                         size_t packed_bytes, void* y, int64_t y_stride,
                                         void* workspace, void* stream) {
  return guarded([&]() -> Status {
    const Result<Plan> opened = cuda_plan_from(plan);
    if (!opened.ok()) return opened.status();
    const Result<nibble::cuda::Operand> from = operand_from(operand);
    if (!from.ok()) return from.status();
    NIBBLE_TRY(require({{packed, "packed"}}));
    const Result<DeviceWeights> weights =
        DeviceWeights::view(opened->problem, opened->device, packed, packed_bytes);
    if (!weights.ok()) return weights.status();
    return nibble::cuda::run_gemm_quantized(*opened, *from, *weights, y, y_stride, workspace,
                                            stream);
  });
}
