// The CUDA functions of include/nibble.h on top of gemm/cuda/gemm_cuda.h.
#include <fmt/format.h>

#include <cstring>
#include <type_traits>

#include "capi_common.h"
#include "gemm/cuda/gemm_cuda.h"
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

bool open_cuda_plan(const nibble_cuda_plan* boxed, Plan* plan) {
  if (boxed == nullptr) return false;
  CudaPlanBox box;
  std::memcpy(&box, boxed->opaque, sizeof box);
  if (box.magic != kCudaPlanMagic) return false;
  *plan = box.plan;
  return true;
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

nibble_status nibble_cuda_gemm(const nibble_cuda_plan* plan, const nibble_input* input,
                               const nibble_cuda_weight* weight, void* y, int64_t y_stride,
                               void* workspace, void* stream) {
  return guarded([&]() -> Status {
    NIBBLE_TRY(require({{plan, "plan"}, {input, "input"}, {weight, "weight"}}));
    NIBBLE_TRY(require_zero("input->reserved", input->reserved));
    Plan opened;
    if (!open_cuda_plan(plan, &opened)) {
      return invalid("plan was not made by nibble_cuda_gemm_plan");
    }
    const DeviceInput x{input->x, input->x_stride, input->clip == 0.0f ? 1.0f : input->clip,
                        input->static_scales};
    return nibble::cuda::run_gemm(opened, x, weight->weights, y, y_stride, workspace, stream);
  });
}
