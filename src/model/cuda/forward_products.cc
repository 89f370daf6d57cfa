// The products of a slot, from whatever their input comes from: it is quantized by the kernel that
// makes it, or behind that by a kernel of its own, or by the product itself (step_fusion.h).
#include "model/cuda/forward.h"

#include "gemm/cuda/operand.h"
#include "gemm/cuda/runtime.h"

namespace nibble::cuda {
namespace {

/// With what its blocks do besides.
const char* fused_name(Slot slot, Fusion fusion) {
  switch (slot) {
    case Slot::qkv: return "norm, quantizing and qkv product";
    case Slot::o: return "quantizing and o product";
    case Slot::gate_up:
      return fusion == Fusion::norm_and_gate ? "norm, quantizing, gate_up product and gate"
                                             : "norm, quantizing and gate_up product";
    case Slot::down: return "quantizing and down product";
  }
  return "product";
}

const char* product_name(Slot slot) {
  switch (slot) {
    case Slot::qkv: return "qkv product";
    case Slot::o: return "o product";
    case Slot::gate_up: return "gate_up product";
    case Slot::down: return "down product";
  }
  return "product";
}

}  // namespace

bool Forward::runs_16bit(const DeviceLinear& linear, const LinearSpec& spec) {
  return !linear.quantized || spec.mode == Mode::w4a16;
}

/// Whether the kernel that makes the rows also quantizes them so.
bool Forward::can_fuse(Source::Kind kind, const Problem& problem) {
  if (problem.granularity == Granularity::tensor) return false;
  const int64_t group = problem.group_size;
  return kind != Source::Kind::norm || !scales_per_group(problem.granularity) || group == 32 ||
         group == 64 || group == 128 || group == problem.k;
}

/// The operand of a quantized product, in the workspace. `first`: nobody has made this source's
/// rows yet.
Status Forward::make_operand(const Source& source, bool first, const Plan& plan,
                             const LinearSpec& spec, const float* static_scales,
                             cudaStream_t stream) {
  if (source.kind == Source::Kind::codes) return {};
  const int64_t rows = plan.problem.m;
  DeviceInput input;
  input.clip = spec.clip;
  input.static_scales = static_scales;
  const Operand operand = workspace_operand(plan, workspace_.as<>());
  if (source.kind == Source::Kind::rows || !can_fuse(source.kind, plan.problem)) {
    int64_t stride = source.width;
    input.x = source.x;
    if (source.kind != Source::Kind::rows) {
      NIBBLE_TRY(make_rows(source, rows, &input.x, &stride, stream));
    }
    input.x_stride = stride;
    return quantize_activations(plan, input, operand, stream);
  }
  QuantizeArgs to = quantize_args(plan, input, operand);
  if (source.kind == Source::Kind::gate) {
    GateQuantizeArgs gate = gate_args(rows);
    to.x = gate.to.x;
    to.x_stride = gate.to.x_stride;
    gate.to = to;
    return to_status(launch_gate_quantize(gate, stream), "gate");
  }
  NormArgs norm = norm_args(source, rows);
  if (!first) {
    norm.delta = nullptr;
    norm.post_norm = nullptr;
  }
  return to_status(launch_norm_quantize(norm, to, stream), "norm");
}

NormArgs Forward::norm_args(const Source& source, int64_t rows) const {
  NormArgs norm;
  norm.m = rows;
  norm.k = model_.config.hidden;
  norm.hidden = residual();
  norm.delta = source.delta;
  norm.type = model_.type;
  norm.post_norm = source.post_norm;
  norm.norm = source.norm;
  norm.eps = static_cast<float>(model_.config.norm_eps);
  norm.programmatic = model_.device.programmatic();
  return norm;
}

GateQuantizeArgs Forward::gate_args(int64_t rows) const {
  const ModelConfig& c = model_.config;
  GateQuantizeArgs gate;
  gate.to.x = gate_up_.as<>();
  gate.to.x_stride = 2 * c.intermediate;
  gate.to.type = model_.type;
  gate.to.m = rows;
  gate.to.k = c.intermediate;
  gate.to.programmatic = model_.device.programmatic();
  gate.up = gate_up_.as<uint16_t>() + c.intermediate;
  gate.up_stride = 2 * c.intermediate;
  gate.function = c.activation == Activation::silu ? GateFunction::silu : GateFunction::gelu_tanh;
  gate.clusters = model_.device.capability >= 90;
  return gate;
}

/// The source's rows in 16 bits.
Status Forward::make_rows(const Source& source, int64_t rows, const void** x, int64_t* stride,
                          cudaStream_t stream) {
  *x = source.x;
  *stride = source.width;
  if (source.kind == Source::Kind::rows) return {};
  *x = rows16_.as<>();
  if (source.kind == Source::Kind::gate) {
    return to_status(launch_gate(gate_args(rows), rows16_.as<>(), *stride, stream), "gate");
  }
  return to_status(launch_norm(norm_args(source, rows), rows16_.as<>(), *stride, stream), "norm");
}

Status Forward::run_dense(const DeviceLinear& linear, const void* x, int64_t rows, void* y,
                          int64_t y_stride, cudaStream_t stream) {
  const auto type = linear.dense_type == Dtype::f16 ? Cublas::Type::f16 : Cublas::Type::bf16;
  NIBBLE_TRY(cublas_->multiply(type, x, linear.dense.as<>(), y, y_stride, rows, linear.n, linear.k,
                               stream));
  note("cublas");
  if (linear.bias.bytes() == 0) return {};
  return to_status(
      launch_add_bias(model_.type, y, y_stride, rows, linear.n, linear.bias.as<float>(), stream),
      "bias");
}

/// How the slot's product makes its input itself, if it does, and its plan.
std::optional<SlabConfig> Forward::fused_slot(int64_t layer, Slot slot, Fusion fusion, int64_t rows,
                                              const Plan** plan) {
  const DeviceGroup& group =
      model_.layers[static_cast<size_t>(layer)].groups[static_cast<int>(slot)];
  if (group.parts.size() != 1 || !group.parts[0].quantized) return std::nullopt;
  const Result<const Plan*> found =
      plan_for(group.parts[0], plan_.at(layer, slot), rows, model_.dtype());
  if (!found.ok()) return std::nullopt;  // whoever runs it says why
  *plan = *found;
  return fused_config(**found, fusion, model_.device);
}

/// Of what Fusion::norm_and_gate with that configuration gives.
RowRanges Forward::ranges_of_gate(const Plan& plan, const SlabConfig& config) const {
  const Problem& p = plan.problem;
  const int count = gated_ranges(packed_layout(p.n, p.k, p.group_size), config);
  if (count > kMostRowRanges) return {};
  return {gated_ranges_.as<uint32_t>(), count};
}

/// y: of Fusion::norm_and_gate (rows, n / 2) float.
Status Forward::run_fused(int64_t layer, Slot slot, const Source& source, Fusion fusion,
                          const Plan& plan, const SlabConfig& config, void* y,
                          cudaStream_t stream) {
  const LinearSpec& spec = plan_.at(layer, slot);
  const DeviceLinear& linear =
      model_.layers[static_cast<size_t>(layer)].groups[static_cast<int>(slot)].parts[0];
  DeviceInput input;
  input.x = source.x;
  input.x_stride = source.width;
  input.clip = spec.clip;
  input.static_scales =
      static_scales_[static_cast<size_t>(layer * kSlots + static_cast<int>(slot))].as<float>();
  QuantizeArgs to = quantize_args(plan, input, {});
  const GemmArgs product = gemm_args(plan, {}, linear.weights, y, linear.n);
  if (fusion == Fusion::rows) {
    if (source.floats) to.type = Element::f32;
    note("w4a8_slab_rows_sm90", mode_name(spec.mode));
    NIBBLE_TRY(to_status(launch_w4a8_slab_rows_sm90(to, product, config, stream, source.ranges),
                         "w4a8_slab_rows_sm90"));
    return mark(fused_name(slot, fusion), stream);
  }
  NormProductArgs args;
  args.norm = norm_args(source, plan.problem.m);
  args.to = to;
  args.product = product;
  if (source.delta != nullptr) {
    residual_ = 1 - residual_;
    args.sum = residual();
  }
  if (fusion == Fusion::norm_and_gate) {
    args.gated = static_cast<float*>(y);
    args.gated_stride = linear.n / 2;
    args.function = gate_args(plan.problem.m).function;
    args.ranges = ranges_of_gate(plan, config);
  }
  note("w4a8_slab_norm_sm90", mode_name(spec.mode));
  NIBBLE_TRY(to_status(launch_w4a8_slab_norm_sm90(args, config, stream), "w4a8_slab_norm_sm90"));
  return mark(fused_name(slot, fusion), stream);
}

Status Forward::run_slot(int64_t layer, Slot slot, const Source& source, int64_t rows, void* y,
                         cudaStream_t stream) {
  const Fusion fusion = source.kind == Source::Kind::norm ? Fusion::norm : Fusion::rows;
  if (source.kind != Source::Kind::gate) {
    const Plan* of = nullptr;
    const std::optional<SlabConfig> fused = fused_slot(layer, slot, fusion, rows, &of);
    if (fused) return run_fused(layer, slot, source, fusion, *of, *fused, y, stream);
  }
  const DeviceGroup& group =
      model_.layers[static_cast<size_t>(layer)].groups[static_cast<int>(slot)];
  const LinearSpec& spec = plan_.at(layer, slot);
  const auto* scales =
      static_scales_[static_cast<size_t>(layer * kSlots + static_cast<int>(slot))].as<float>();
  const int64_t stride = group.n();
  auto* to = static_cast<uint16_t*>(y);
  Source now = source;  // becomes the rows themselves once they are there
  bool first = true;
  for (const DeviceLinear& part : group.parts) {
    if (runs_16bit(part, spec) && now.kind != Source::Kind::rows) {
      if (!first) {
        now.delta = nullptr;  // it has been added
        now.post_norm = nullptr;
      }
      int64_t x_stride = 0;
      NIBBLE_TRY(make_rows(now, rows, &now.x, &x_stride, stream));
      now.kind = Source::Kind::rows;
      NIBBLE_TRY(mark(source.operation(), stream));
    }
    if (part.quantized) {
      const Result<const Plan*> found = plan_for(part, spec, rows, model_.dtype());
      if (!found.ok()) return found.status();
      const Plan& plan = **found;
      note(plan.kernel_name(), mode_name(spec.mode));
      if (spec.mode == Mode::w4a16) {
        DeviceInput input;
        input.x = now.x;
        input.x_stride = now.width;
        NIBBLE_TRY(run_gemm(plan, input, part.weights, to, stride, workspace_.as<>(), stream));
      } else {
        NIBBLE_TRY(make_operand(now, first, plan, spec, scales, stream));
        if (now.kind != Source::Kind::codes) NIBBLE_TRY(mark(source.quantizing(), stream));
        NIBBLE_TRY(run_gemm_quantized(plan, workspace_operand(plan, workspace_.as<>()),
                                      part.weights, to, stride, workspace_.as<>(), stream));
      }
    } else {
      NIBBLE_TRY(run_dense(part, now.x, rows, to, stride, stream));
    }
    first = false;
    to += part.n;
    NIBBLE_TRY(mark(product_name(slot), stream));
  }
  return {};
}

}  // namespace nibble::cuda
