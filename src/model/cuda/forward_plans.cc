// What a pass needs before it is launched: buffers for the most rows that it may have, a plan for
// every product, workspace for the largest, and images of weights that plans want expanded.
#include "model/cuda/forward.h"

#include <fmt/format.h>

#include <algorithm>

#include "gemm/cuda/runtime.h"

namespace nibble::cuda {
namespace {

int64_t width16(const ModelConfig& c) {
  return std::max({c.hidden, c.intermediate, c.heads * c.head_dim});
}

}  // namespace

Forward::Forward(DeviceModel& model, const KvPool& pool, int64_t rows, bool expanded)
    : model_(model), pool_(pool), rows_(rows), expanded_(expanded) {}
Forward::~Forward() = default;

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
        const Result<const Plan*> plan = plan_for(part, spec, rows_, model_.dtype());
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

Result<const Plan*> Forward::plan_for(const DeviceLinear& linear, const LinearSpec& spec,
                                      int64_t rows, Dtype y_type) {
  Problem problem;
  problem.m = rows;
  problem.n = linear.n;
  problem.k = linear.k;
  problem.group_size = linear.weights.layout().group_size;
  problem.mode = spec.mode;
  problem.x_dtype = model_.dtype();
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
        NIBBLE_TRY(want(part, spec, rows, model_.dtype()));
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

}  // namespace nibble::cuda
