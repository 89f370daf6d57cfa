// Runs a plan on its device: quantizes x into the workspace, then multiplies. Checks what the host
// can see; launches; never allocates or waits.
#include <fmt/format.h>

#include "gemm/cuda/fused_product.h"
#include "gemm/cuda/gemm_cuda.h"
#include "gemm/cuda/kernels.h"
#include "gemm/cuda/operand.h"
#include "gemm/cuda/plan.h"
#include "gemm/cuda/runtime.h"
#include "gemm/cuda/w4a4_mma_sm80.h"

namespace nibble::cuda {
namespace {

constexpr int64_t kVectorBytes = 16;  // what kernels load and store at once

static_assert(static_cast<int>(Dtype::f32) == static_cast<int>(Element::f32) &&
              static_cast<int>(Dtype::f16) == static_cast<int>(Element::f16) &&
              static_cast<int>(Dtype::bf16) == static_cast<int>(Element::bf16));

Element element_of(Dtype dtype) { return static_cast<Element>(dtype); }

Status invalid(std::string message) { return Status(Code::invalid_argument, std::move(message)); }

bool is_static(Granularity granularity) {
  return granularity == Granularity::static_tensor || granularity == Granularity::static_group;
}

/// Rows of `columns` elements that begin on 16 bytes, `stride` elements apart.
Status check_rows(const char* name, const void* data, int64_t stride, int64_t columns,
                  Dtype dtype) {
  if (data == nullptr) return invalid(fmt::format("{} is null", name));
  if (stride < columns) {
    return invalid(fmt::format("{} row stride {} is below {}", name, stride, columns));
  }
  if (reinterpret_cast<uintptr_t>(data) % kVectorBytes != 0 ||
      stride * dtype_bytes(dtype) % kVectorBytes != 0) {
    return invalid(
        fmt::format("rows of {} must start at multiples of {} bytes; its row stride is "
                    "{} elements of {}",
                    name, kVectorBytes, stride, dtype_name(dtype)));
  }
  return {};
}

Status check_input(const Problem& p, const DeviceInput& input) {
  NIBBLE_TRY(check_rows("x", input.x, input.x_stride, p.k, p.x_dtype));
  if (!(input.clip > 0.0f && input.clip <= 1.0f)) {
    return invalid(fmt::format("clip {} is outside (0, 1]", input.clip));
  }
  if (p.mode == Mode::w4a16) return {};
  if (is_static(p.granularity) && input.static_scales == nullptr) {
    return invalid(
        fmt::format("granularity {} needs static scales", granularity_name(p.granularity)));
  }
  return {};
}

Status check_weights(const Plan& plan, const DeviceWeights& weights) {
  const Problem& p = plan.problem;
  const PackedLayout& w = weights.layout();
  if (w.n != p.n || w.k != p.k || w.group_size != p.group_size) {
    return invalid(
        fmt::format("weights have N={} K={} and group size {}, the plan N={} K={} and "
                    "{}",
                    w.n, w.k, w.group_size, p.n, p.k, p.group_size));
  }
  if (weights.device() != plan.device) {
    return invalid(fmt::format("weights are on CUDA device {}, the plan is for {}",
                               weights.device(), plan.device));
  }
  if (plan.ss.expanded && weights.image(plan.e4m3) == nullptr) {
    return invalid(fmt::format("the plan is for weights that are expanded to {}, these are not",
                               plan.e4m3 ? "e4m3" : "int8"));
  }
  return {};
}

Status check_workspace(const Plan& plan, const void* workspace) {
  if (plan.workspace_bytes > 0 && workspace == nullptr) return invalid("workspace is null");
  if (reinterpret_cast<uintptr_t>(workspace) % kWorkspaceAlignment != 0) {
    return invalid(fmt::format("workspace is not {}-byte aligned", kWorkspaceAlignment));
  }
  return {};
}

Status check_quantizes(const Plan& plan) {
  if (plan.problem.mode != Mode::w4a16) return {};
  return invalid("w4a16 quantizes nothing: run_gemm reads x where it is");
}

Status check_operand(const Plan& plan, const Operand& operand) {
  if (operand.codes == nullptr || operand.scales == nullptr) {
    return invalid("codes or scales of the activations are null");
  }
  if (reinterpret_cast<uintptr_t>(operand.codes) % kVectorBytes != 0) {
    return invalid(fmt::format("codes are not {}-byte aligned", kVectorBytes));
  }
  if (plan.problem.granularity == Granularity::tensor && operand.range == nullptr) {
    return invalid("granularity tensor needs the scratch `range`");
  }
  return {};
}

Scaling scaling_of(Granularity granularity) {
  switch (granularity) {
    case Granularity::tensor: return Scaling::tensor;
    case Granularity::token: return Scaling::token;
    case Granularity::group: return Scaling::group;
    case Granularity::static_tensor: return Scaling::static_tensor;
    case Granularity::static_group: return Scaling::static_group;
  }
  return Scaling::token;
}

}  // namespace

QuantizeArgs quantize_args(const Plan& plan, const DeviceInput& input, const Operand& to) {
  const Problem& p = plan.problem;
  QuantizeArgs args;
  args.x = input.x;
  args.x_stride = input.x_stride;
  args.type = element_of(p.x_dtype);
  args.m = p.m;
  args.k = p.k;
  args.padded_k = plan.padded_k;
  args.group_size = p.group_size;
  args.promoted = static_cast<int>(promoted_depth(p.group_size));
  args.scaling = scaling_of(p.granularity);
  args.limit = !p.symmetric ? 15 : p.mode == Mode::w4a4 ? 7 : 127;
  if (p.mode == Mode::w4a8_fp8) {
    args.limit = 448;  // the largest e4m3 number
    args.kind = plan.e4m3 ? Codes::e4m3 : Codes::halves;
  } else if (plan.e4m3) {
    args.kind = Codes::int_as_e4m3;
  }
  args.symmetric = p.symmetric;
  args.clip = input.clip;
  args.static_scales = input.static_scales;
  args.wgmma_order = plan.order == OperandOrder::wgmma;
  args.programmatic = plan.programmatic;
  args.codes = to.codes;
  args.scales = to.scales;
  args.sums = args.kind == Codes::int8 ? to.sums : nullptr;
  args.tensor_range = to.range;
  return args;
}

GemmArgs gemm_args(const Plan& plan, const Operand& operand, const DeviceWeights& weights, void* y,
                   int64_t y_stride) {
  const Problem& p = plan.problem;
  GemmArgs args;
  args.slabs = weights.slabs();
  args.layout = weights.layout();
  args.bf16_scales = weights.bf16_scales();
  if (plan.ss.expanded) args.image = weights.image(plan.e4m3);
  args.codes = operand.codes;
  args.scales = operand.scales;
  if (p.mode == Mode::w4a8_fp8) {
    args.x = operand.codes;
    args.x_stride = args.x_columns = plan.padded_k;
  }
  args.group_scales = has_group_scales(p);
  args.m = p.m;
  args.out = {y, y_stride, element_of(p.y_dtype), weights.bias()};
  return args;
}

namespace {

cudaError_t launch(const Plan& plan, const GemmArgs& args, void* workspace, cudaStream_t stream) {
  const bool halves = multiplies_halves(plan);
  switch (plan.family) {
    case KernelFamily::slab:
    case KernelFamily::slab_rows:
    case KernelFamily::slab_handed:
      return halves ? launch_w4a16_slab_sm90(args, plan.slab, stream)
                    : launch_w4a8_slab_sm90(args, plan.slab, stream);
    case KernelFamily::rs:
      if (halves) {
        return launch_w4a16_rs_sm90(args, plan.rs, workspace_scratch(plan, workspace),
                                    workspace_operand(plan, workspace).codes, stream);
      }
      return plan.e4m3
                 ? launch_w4a8_fp8_rs_sm90(args, plan.rs, workspace_scratch(plan, workspace),
                                           stream)
                 : launch_w4a8_rs_sm90(args, plan.rs, workspace_scratch(plan, workspace), stream);
    case KernelFamily::ss:
      if (halves) {
        return launch_w4a16_ss_sm90(args, plan.ss, workspace_scratch(plan, workspace), stream);
      }
      return launch_w4a8_ss_sm90(args, plan.ss, workspace_scratch(plan, workspace), stream);
    case KernelFamily::mma:
      return halves ? launch_w4a16_mma_sm80(args, stream) : launch_w4a8_mma_sm80(args, stream);
    case KernelFamily::mma_int4:
      return launch_w4a4_mma_sm80(args, plan.problem.symmetric, workspace_scratch(plan, workspace),
                                  stream);
  }
  return cudaErrorInvalidValue;
}

/// Everything about a product but its input.
Status check_product(const Plan& plan, const DeviceWeights& weights, const void* y,
                     int64_t y_stride, const void* workspace) {
  NIBBLE_TRY(check_weights(plan, weights));
  NIBBLE_TRY(check_rows("y", y, y_stride, plan.problem.n, plan.problem.y_dtype));
  return check_workspace(plan, workspace);
}

Status launch_quantizer(const Plan& plan, const DeviceInput& input, const Operand& to,
                        Stream stream) {
  return to_status(
      launch_quantize(quantize_args(plan, input, to), static_cast<cudaStream_t>(stream)),
      "quantizing activations");
}

Status launch_product(const Plan& plan, const GemmArgs& args, void* workspace, Stream stream) {
  return to_status(launch(plan, args, workspace, static_cast<cudaStream_t>(stream)),
                   plan.kernel_name());
}

/// One launch that quantizes as well.
Status launch_whole(const Plan& plan, const DeviceInput& input, const Operand& operand,
                    const GemmArgs& args, void* workspace, Stream stream) {
  const QuantizeArgs x = quantize_args(plan, input, operand);
  auto* const to = static_cast<cudaStream_t>(stream);
  return to_status(plan.fused.quantizes
                       ? launch_w4a8_slab_rows_sm90(x, args, plan.fused, to)
                       : launch_w4a8_slab_handed_sm90(x, args, plan.fused,
                                                      workspace_scratch(plan, workspace), to),
                   plan.fused.quantizes ? "w4a8_slab_rows_sm90" : "w4a8_slab_handed_sm90");
}

}  // namespace

Status quantize_activations(const Plan& plan, const DeviceInput& input, const Operand& to,
                            Stream stream) {
  if (plan.problem.m == 0) return {};
  NIBBLE_TRY(check_quantizes(plan));
  NIBBLE_TRY(check_input(plan.problem, input));
  NIBBLE_TRY(check_operand(plan, to));
  const CurrentDevice current(plan.device);
  NIBBLE_TRY(current.status());
  return launch_quantizer(plan, input, to, stream);
}

Status run_gemm_quantized(const Plan& plan, const Operand& operand, const DeviceWeights& weights,
                          void* y, int64_t y_stride, void* workspace, Stream stream) {
  if (plan.problem.m == 0) return {};
  NIBBLE_TRY(check_quantizes(plan));
  NIBBLE_TRY(check_product(plan, weights, y, y_stride, workspace));
  NIBBLE_TRY(check_operand(plan, operand));
  const CurrentDevice current(plan.device);
  NIBBLE_TRY(current.status());
  return launch_product(plan, gemm_args(plan, operand, weights, y, y_stride), workspace, stream);
}

Status run_gemm(const Plan& plan, const DeviceInput& input, const DeviceWeights& weights, void* y,
                int64_t y_stride, void* workspace, Stream stream) {
  if (plan.problem.m == 0) return {};
  NIBBLE_TRY(check_input(plan.problem, input));
  NIBBLE_TRY(check_product(plan, weights, y, y_stride, workspace));
  const CurrentDevice current(plan.device);
  NIBBLE_TRY(current.status());
  if (plan.problem.mode == Mode::w4a16) {
    GemmArgs args = gemm_args(plan, {}, weights, y, y_stride);
    args.x = input.x;
    args.x_stride = input.x_stride;
    args.x_columns = plan.problem.k;
    args.x_type = element_of(plan.problem.x_dtype);
    return launch_product(plan, args, workspace, stream);
  }
  const Operand operand = workspace_operand(plan, workspace);
  if (plan.is_one_launch()) {
    return launch_whole(plan, input, operand, gemm_args(plan, operand, weights, y, y_stride),
                        workspace, stream);
  }
  NIBBLE_TRY(launch_quantizer(plan, input, operand, stream));
  return launch_product(plan, gemm_args(plan, operand, weights, y, y_stride), workspace, stream);
}

}  // namespace nibble::cuda
