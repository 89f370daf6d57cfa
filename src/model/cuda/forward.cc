// See forward.h.
#include "model/cuda/forward.h"

#include <fmt/format.h>

#include <algorithm>

#include "gemm/cuda/fused_product.h"
#include "gemm/cuda/fused_quantize.h"
#include "gemm/cuda/operand.h"
#include "gemm/cuda/runtime.h"

namespace nibble::cuda {
namespace {

Dtype dtype_of(Element type) { return static_cast<Dtype>(type); }

int64_t width16(const ModelConfig& c) {
  return std::max({c.hidden, c.intermediate, c.heads * c.head_dim});
}

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

bool runs_16bit(const DeviceLinear& linear, const LinearSpec& spec) {
  return !linear.quantized || spec.mode == Mode::w4a16;
}

}  // namespace

/// Whether the kernel that makes the rows also quantizes them so.
bool Forward::can_fuse(Source::Kind kind, const Problem& problem) {
  if (problem.granularity == Granularity::tensor) return false;
  const int64_t group = problem.group_size;
  return kind != Source::Kind::norm || !scales_per_group(problem.granularity) || group == 32 ||
         group == 64 || group == 128 || group == problem.k;
}

Forward::Forward(DeviceModel& model, const KvPool& pool, int64_t rows, bool expanded)
    : model_(model), pool_(pool), rows_(rows), expanded_(expanded) {}
Forward::~Forward() = default;

const void* DeviceModel::head_rows() const {
  if (tied()) return embedding.as<>();
  return head.quantized ? nullptr : head.dense.as<>();
}

int64_t Forward::logits_stride() const { return (model_.config.vocab + 3) / 4 * 4; }

uint64_t Forward::workspace_bytes(const ModelConfig& c, const KvShape& shape, int64_t rows) {
  const int64_t q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
  const int64_t row = 4 * c.hidden + 2 * (2 * q + 2 * kv + q + c.hidden + 2 * c.intermediate) +
                      2 * width16(c) + 8 * c.hidden + 2 * width16(c);  // states, codes
  const int64_t image = 2 * std::max({(q + 2 * kv) * c.hidden, 2 * c.intermediate * c.hidden});
  return static_cast<uint64_t>(rows * row + (rows >= 512 ? image : 0) +
                               kHeadRows * (c.vocab + 4) * 4 + (int64_t{64} << 20)) +
         static_cast<uint64_t>(
             decode_scratch_bytes(shape.sequences, c.heads, c.head_dim, shape.context));
}

Result<std::unique_ptr<Forward>> Forward::create(DeviceModel& model, const KvPool& pool,
                                                 int64_t rows, bool expanded) {
  std::unique_ptr<Forward> forward(new Forward(model, pool, rows, expanded));
  NIBBLE_TRY(forward->allocate());
  NIBBLE_TRY(forward->set_plan(uniform_plan(model.config.layers, Mode::w4a16)));
  return forward;
}

Status Forward::allocate() {
  const ModelConfig& c = model_.config;
  const DeviceInfo& device = model_.device;
  const int64_t q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
  const auto bytes = [this](int64_t width, int64_t element) {
    return static_cast<size_t>(rows_ * width * element);
  };
  NIBBLE_TRY(residuals_[0].allocate(bytes(c.hidden, 4), device));
  const auto few = static_cast<size_t>(std::min<int64_t>(rows_, kSlabFusedTokens));
  NIBBLE_TRY(residuals_[1].allocate(few * static_cast<size_t>(c.hidden) * sizeof(float), device));
  NIBBLE_TRY(gated_.allocate(few * static_cast<size_t>(c.intermediate) * sizeof(float), device));
  NIBBLE_TRY(gated_ranges_.allocate(few * kMostRowRanges * sizeof(uint32_t), device));
  NIBBLE_TRY(qkv_.allocate(bytes(q + 2 * kv, 2), device));
  NIBBLE_TRY(q_.allocate(bytes(q, 2), device));
  // Rows that are left out of attention keep what is there.
  NIBBLE_TRY(attention_.allocate_zeroed(bytes(q, 2), device));
  NIBBLE_TRY(delta_.allocate(bytes(c.hidden, 2), device));
  NIBBLE_TRY(gate_up_.allocate(bytes(2 * c.intermediate, 2), device));
  NIBBLE_TRY(rows16_.allocate(bytes(width16(c), 2), device));
  NIBBLE_TRY(states_.allocate(bytes(c.hidden, 4), device));
  NIBBLE_TRY(high_.allocate(bytes(c.hidden, 2), device));
  NIBBLE_TRY(low_.allocate(bytes(c.hidden, 2), device));
  NIBBLE_TRY(logits_.allocate(static_cast<size_t>(kHeadRows * logits_stride() * 4), device));
  const KvShape& shape = pool_.shape();
  NIBBLE_TRY(
      decode_scratch_.allocate_zeroed(static_cast<size_t>(decode_scratch_bytes(
                                          shape.sequences, c.heads, c.head_dim, shape.context)),
                                      device));
  NIBBLE_TRY(
      faults_.allocate_zeroed(static_cast<size_t>(shape.sequences) * sizeof(int32_t), device));
  const auto is_dense = [](const DeviceLinear& linear) { return !linear.quantized; };
  for (const DeviceLayer& layer : model_.layers) {
    for (const DeviceGroup& group : layer.groups) {
      if (cublas_ != nullptr || std::none_of(group.parts.begin(), group.parts.end(), is_dense)) {
        continue;
      }
      Result<std::unique_ptr<Cublas>> cublas = Cublas::open(device);
      if (!cublas.ok()) return cublas.status();
      cublas_ = std::move(*cublas);
    }
  }
  return {};
}

Status Forward::set_plan(const ModelPlan& plan) {
  const auto expected = static_cast<size_t>(model_.config.layers * kSlots);
  if (plan.specs.size() != expected) {
    return Status(
        Code::invalid_argument,
        fmt::format("a plan of {} linear groups for a model of {}", plan.specs.size(), expected));
  }
  std::vector<DeviceBuffer> scales;
  for (size_t i = 0; i < expected; ++i) {
    const LinearSpec& spec = plan.specs[i];
    const bool mixed = std::any_of(spec.wide_groups.begin(), spec.wide_groups.end(),
                                   [](uint8_t wide) { return wide != 0; });
    if (mixed) {
      return Status(Code::unsupported,
                    fmt::format("layer {}, {}: K-groups of 8 and of 4 bits side by side run on "
                                "the CPU only",
                                i / kSlots, slot_name(static_cast<Slot>(i % kSlots))));
    }
    Result<DeviceBuffer> buffer = upload_floats(model_.device, spec.static_scales);
    if (!buffer.ok()) return buffer.status();
    scales.push_back(std::move(*buffer));
  }
  plan_ = plan;
  prepared_.clear();
  static_scales_ = std::move(scales);
  if (!expanded_) return {};
  const Status expanded = expand_weights();
  if (!expanded.ok()) {  // some lost the image of the plan before: then everything runs without
    expanded_ = false;
    plans_.clear();
    prepared_.clear();
  }
  return expanded;
}

/// Those whose products of a whole pass start from an image. Fewer rows never want another.
Status Forward::expand_weights() {
  for (int64_t i = 0; i < model_.config.layers; ++i) {
    for (int slot = 0; slot < kSlots; ++slot) {
      const LinearSpec& spec = plan_.at(i, static_cast<Slot>(slot));
      for (DeviceLinear& part : model_.layers[static_cast<size_t>(i)].groups[slot].parts) {
        if (!part.quantized) continue;
        const Result<const Plan*> plan = plan_for(part, spec, rows_, dtype_of(model_.type));
        if (!plan.ok()) return plan.status();
        const SsConfig& ss = (*plan)->ss;
        if (!ss.expanded || part.weights.image(ss.e4m3) != nullptr) continue;
        const Status expanded = part.weights.expand(model_.device, ss.e4m3);
        if (!expanded.ok()) {
          return Status(expanded.code(), fmt::format("{}: {}", part.name, expanded.message()));
        }
      }
    }
  }
  return {};
}

void Forward::note(const std::string& kernel, const char* mode) { kernels_[kernel] = mode; }

Result<const Plan*> Forward::plan_for(const DeviceLinear& linear, const LinearSpec& spec,
                                      int64_t rows, Dtype y_type) {
  Problem problem;
  problem.m = rows;
  problem.n = linear.n;
  problem.k = linear.k;
  problem.group_size = linear.weights.layout().group_size;
  problem.mode = spec.mode;
  problem.x_dtype = dtype_of(model_.type);
  problem.y_dtype = y_type;
  problem.granularity = spec.granularity;
  problem.symmetric = spec.mode == Mode::w4a4 ? spec.symmetric : true;
  const Key key{rows,
                problem.n,
                problem.k,
                problem.group_size,
                static_cast<int>(problem.mode),
                static_cast<int>(problem.granularity),
                problem.symmetric,
                static_cast<int>(y_type)};
  const auto found = plans_.find(key);
  if (found != plans_.end()) return &found->second;
  const Result<Plan> plan = plan_gemm(problem, model_.device, nullptr, expanded_);
  if (!plan.ok()) {
    return Status(plan.status().code(),
                  fmt::format("{}: {}", linear.name, plan.status().message()));
  }
  return &plans_.emplace(key, *plan).first->second;
}

Status Forward::prepare(int64_t rows, bool* moved) {
  *moved = false;
  if (prepared_.contains(rows)) return {};  // every decoding step asks
  size_t bytes = 0;
  const auto want = [&](const DeviceLinear& linear, const LinearSpec& spec, int64_t m,
                        Dtype y) -> Status {
    if (!linear.quantized) return {};
    const Result<const Plan*> plan = plan_for(linear, spec, m, y);
    if (!plan.ok()) return plan.status();
    bytes = std::max(bytes, (*plan)->workspace_bytes);
    return {};
  };
  for (int64_t i = 0; i < model_.config.layers; ++i) {
    for (int slot = 0; slot < kSlots; ++slot) {
      const LinearSpec& spec = plan_.at(i, static_cast<Slot>(slot));
      for (const DeviceLinear& part : model_.layers[static_cast<size_t>(i)].groups[slot].parts) {
        NIBBLE_TRY(want(part, spec, rows, dtype_of(model_.type)));
      }
    }
  }
  if (!model_.tied()) {
    for (int64_t m = 1; m <= std::min(rows, int64_t{kHeadRows}); ++m) {
      NIBBLE_TRY(want(model_.head, LinearSpec{}, m, Dtype::f32));
    }
  }
  if (bytes > workspace_.bytes()) {
    NIBBLE_TRY(to_status(cudaDeviceSynchronize(), "cudaDeviceSynchronize"));
    *moved = true;
    prepared_.clear();  // an allocation that fails leaves nothing
    NIBBLE_TRY(workspace_.allocate_zeroed(bytes, model_.device));
  }
  prepared_.insert(rows);
  return {};
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
      plan_for(group.parts[0], plan_.at(layer, slot), rows, dtype_of(model_.type));
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
      const Result<const Plan*> found = plan_for(part, spec, rows, dtype_of(model_.type));
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

AttentionArgs Forward::attention_args(int64_t layer) const {
  const ModelConfig& c = model_.config;
  AttentionArgs attention;
  attention.q = q_.as<>();
  attention.q_stride = c.heads * c.head_dim;
  attention.heads = c.heads;
  attention.kv = pool_.layer(layer);
  attention.window = c.window[static_cast<size_t>(layer)];
  attention.scale = static_cast<float>(c.attention_scale);
  attention.type = model_.type;
  attention.out = attention_.as<>();
  attention.out_stride = attention.q_stride;
  attention.programmatic = model_.device.programmatic();
  return attention;
}

std::optional<QuantizeArgs> Forward::attention_codes(int64_t layer, const PassInputs& inputs,
                                                     int64_t rows) {
  const DeviceGroup& group =
      model_.layers[static_cast<size_t>(layer)].groups[static_cast<int>(Slot::o)];
  const LinearSpec& spec = plan_.at(layer, Slot::o);
  if (inputs.num_tiles > 0 || group.parts.size() != 1 || runs_16bit(group.parts[0], spec)) {
    return std::nullopt;
  }
  const Plan* plan = nullptr;
  if (fused_slot(layer, Slot::o, Fusion::rows, rows, &plan) || plan == nullptr) return std::nullopt;
  DeviceInput input;
  input.clip = spec.clip;
  input.static_scales =
      static_scales_[static_cast<size_t>(layer * kSlots + static_cast<int>(Slot::o))].as<float>();
  const QuantizeArgs to = quantize_args(*plan, input, workspace_operand(*plan, workspace_.as<>()));
  if (!decode_quantizes(attention_args(layer), to)) return std::nullopt;
  return to;
}

Status Forward::attend(int64_t layer, const PassInputs& inputs, int64_t rows,
                       const QuantizeArgs* codes, cudaStream_t stream) {
  const ModelConfig& c = model_.config;
  const DeviceNorms& norms = model_.layers[static_cast<size_t>(layer)].norms;
  const AttentionArgs attention = attention_args(layer);
  const int kind = attention.window > 0 ? 1 : 0;
  RopeArgs rope;
  rope.type = model_.type;
  rope.qkv = qkv_.as<>();
  rope.qkv_stride = (c.heads + 2 * c.kv_heads) * c.head_dim;
  rope.rows = rows;
  rope.heads = c.heads;
  rope.q = q_.as<>();
  rope.q_stride = attention.q_stride;
  rope.kv = attention.kv;
  rope.sequence = inputs.sequence;
  rope.position = inputs.position;
  rope.cosine = model_.cosine[kind].as<float>();
  rope.sine = model_.sine[kind].as<float>();
  rope.q_norm = norms.q.as<float>();
  rope.k_norm = norms.k.as<float>();
  rope.eps = static_cast<float>(c.norm_eps);
  rope.faults = faults();
  rope.programmatic = model_.device.programmatic();
  const bool together = inputs.num_tiles == 0 && decode_takes(rope);
  if (!together) {
    NIBBLE_TRY(to_status(launch_rope(rope, stream), "rope"));
    NIBBLE_TRY(mark("rope, keys and values", stream));
  }
  if (inputs.num_tiles > 0) {
    // num_tiles fits: see PassStaging.
    const bool wgmma = model_.device.capability == 90;
    const PrefillArgs args{attention, inputs.tiles, inputs.num_tiles, wgmma};
    note(wgmma ? "attention_prefill_sm90" : "attention_prefill_sm80");
    return to_status(launch_attention_prefill(args, stream), "attention_prefill");
  }
  DecodeArgs args;
  args.attention = attention;
  args.rows = rows;
  args.sequence = inputs.sequence;
  args.position = inputs.position;
  args.max_context = pool_.shape().context;
  args.scratch = decode_scratch_.as<>();
  args.multiprocessors = model_.device.multiprocessors;
  if (together) args.rope = rope;
  if (codes != nullptr) args.codes = *codes;
  note("attention_decode");
  return to_status(launch_attention_decode(args, stream), "attention_decode");
}

Status Forward::layers(const PassInputs& inputs, int64_t rows, cudaStream_t stream) {
  const ModelConfig& c = model_.config;
  EmbeddingArgs embedding;
  embedding.type = static_cast<Element>(model_.embedding_type);
  embedding.table = model_.embedding.as<>();
  embedding.vocab = c.vocab;
  embedding.width = c.hidden;
  embedding.tokens = inputs.tokens;
  embedding.rows = rows;
  embedding.scale = model_.embedding_scale;
  residual_ = 0;
  embedding.hidden = residual();
  embedding.programmatic = model_.device.programmatic();
  NIBBLE_TRY(mark("start", stream));
  NIBBLE_TRY(to_status(launch_embedding(embedding, stream), "embedding"));
  NIBBLE_TRY(mark("embedding", stream));
  Source norm;
  norm.kind = Source::Kind::norm;
  norm.width = c.hidden;
  for (int64_t i = 0; i < c.layers; ++i) {
    const DeviceNorms& norms = model_.layers[static_cast<size_t>(i)].norms;
    norm.norm = norms.input.as<float>();
    norm.delta = i == 0 ? nullptr : delta_.as<>();
    norm.post_norm =
        i == 0 ? nullptr : model_.layers[static_cast<size_t>(i - 1)].norms.post_mlp.as<float>();
    NIBBLE_TRY(run_slot(i, Slot::qkv, norm, rows, qkv_.as<>(), stream));
    const std::optional<QuantizeArgs> codes = attention_codes(i, inputs, rows);
    NIBBLE_TRY(attend(i, inputs, rows, codes ? &*codes : nullptr, stream));
    NIBBLE_TRY(mark(codes ? "attention, quantizing" : "attention", stream));
    Source attended;
    if (codes) attended.kind = Source::Kind::codes;
    attended.x = attention_.as<>();
    attended.width = c.heads * c.head_dim;
    NIBBLE_TRY(run_slot(i, Slot::o, attended, rows, delta_.as<>(), stream));
    norm.norm = norms.mlp.as<float>();
    norm.delta = delta_.as<>();
    norm.post_norm = norms.post_attention.as<float>();
    Source gated;
    gated.width = c.intermediate;
    const Plan *gate_plan = nullptr, *down_plan = nullptr;
    const auto fused = fused_slot(i, Slot::gate_up, Fusion::norm_and_gate, rows, &gate_plan);
    if (fused && fused_slot(i, Slot::down, Fusion::rows, rows, &down_plan)) {
      NIBBLE_TRY(run_fused(i, Slot::gate_up, norm, Fusion::norm_and_gate, *gate_plan, *fused,
                           gated_.as<>(), stream));
      gated.x = gated_.as<>();
      gated.floats = true;
      gated.ranges = ranges_of_gate(*gate_plan, *fused);
    } else {
      NIBBLE_TRY(run_slot(i, Slot::gate_up, norm, rows, gate_up_.as<>(), stream));
      gated.kind = Source::Kind::gate;
    }
    NIBBLE_TRY(run_slot(i, Slot::down, gated, rows, delta_.as<>(), stream));
  }
  return {};
}

Status Forward::finish(const int32_t* gather, int64_t count, cudaStream_t stream) {
  const ModelConfig& c = model_.config;
  HeadNormArgs args;
  args.hidden = residual();
  args.delta = delta_.as<>();
  args.delta_type = model_.type;
  args.post_norm = model_.layers.back().norms.post_mlp.as<float>();
  args.norm = model_.final_norm.as<float>();
  args.eps = static_cast<float>(c.norm_eps);
  args.rows = count;
  args.k = c.hidden;
  args.gather = gather;
  args.out = states();
  args.parts = {static_cast<Element>(model_.head_type()), high_.as<>(), low_.as<>()};
  args.programmatic = model_.device.programmatic();
  return to_status(launch_head_norm(args, stream), "norm before the head");
}

Status Forward::split_states(int64_t count, cudaStream_t stream) {
  const SplitRows to{static_cast<Element>(model_.head_type()), high_.as<>(), low_.as<>()};
  return to_status(launch_split(states(), count, model_.config.hidden, to, stream), "split");
}

Status Forward::head(int64_t first, int64_t count, cudaStream_t stream) {
  const ModelConfig& c = model_.config;
  const int64_t offset = first * c.hidden;
  if (model_.head_rows() == nullptr) {
    const Result<const Plan*> plan = plan_for(model_.head, LinearSpec{}, count, Dtype::f32);
    if (!plan.ok()) return plan.status();
    note((*plan)->kernel_name(), mode_name(Mode::w4a16));
    DeviceInput input;
    input.x = high_.as<uint16_t>() + offset;
    input.x_stride = c.hidden;
    return run_gemm(**plan, input, model_.head.weights, logits(), logits_stride(),
                    workspace_.as<>(), stream);
  }
  HeadArgs args;
  args.x = {static_cast<Element>(model_.head_type()), high_.as<uint16_t>() + offset,
            low_.as<uint16_t>() + offset};
  args.w = model_.head_rows();
  args.rows = count;
  args.n = c.vocab;
  args.k = c.hidden;
  args.y = logits();
  args.y_stride = logits_stride();
  args.programmatic = model_.device.programmatic();
  note("w16_head_mma_sm80");
  return to_status(launch_w16_head_mma_sm80(args, stream), "w16_head_mma_sm80");
}

}  // namespace nibble::cuda
