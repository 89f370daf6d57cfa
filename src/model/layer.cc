// The forward pass of one layer. Norms, residual adds and activation functions run inside the
// row source of the next product, so each row is normalized and quantized while it is in L1.
#include "model/layer.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/cpu_features.h"
#include "base/thread_pool.h"
#include "gemm/cpu/packed_weights.h"
#include "gemm/float_ops.h"
#include "model/rope.h"

namespace nibble {
namespace {

/// What makes a cached plan valid.
struct PlanKey {
  int64_t m = -1, n = 0, k = 0, group_size = 0;
  Mode mode = Mode::w4a16;
  Granularity granularity = Granularity::token;
  bool symmetric = true, mixed = false;
  bool operator==(const PlanKey&) const = default;
};

struct CachedPlan {
  PlanKey key;
  Plan plan;
};

/// A buffer that only grows.
Status grow(AlignedBuffer& buffer, size_t bytes) {
  if (buffer.bytes() >= bytes) return {};
  Result<AlignedBuffer> larger = AlignedBuffer::zeroed(bytes);
  if (!larger.ok()) return larger.status();
  buffer = std::move(*larger);
  return {};
}

/// One row on demand: what comes before a slot's linears.
struct Source {
  enum class Kind { norm, copy, gate } kind = Kind::copy;
  const FloatOps* ops = &float_ops();
  // norm: hidden += post_norm(delta) if there is a delta; the row is norm(hidden)
  float* hidden = nullptr;
  float* delta = nullptr;  // changed if post_norm is set
  const float* norm = nullptr;
  const float* post_norm = nullptr;
  float eps = 0;
  // copy: rows of x; gate: act(x[0..width)) * x[width..2*width)
  const float* x = nullptr;
  int64_t stride = 0;
  Activation activation = Activation::silu;
  int64_t width = 0;

  const float* make(int64_t row, float* scratch) const {
    switch (kind) {
      case Kind::copy: return x + row * stride;
      case Kind::gate: {
        const float* gate = x + row * stride;
        const auto function = activation == Activation::silu ? ops->silu_mul : ops->gelu_tanh_mul;
        function(gate, gate + width, width, scratch);
        return scratch;
      }
      case Kind::norm: break;
    }
    float* h = hidden + row * width;
    if (delta != nullptr) add_delta(row, h);
    ops->rms_norm(h, norm, width, eps, scratch);
    return scratch;
  }

  void add_delta(int64_t row, float* h) const {
    float* d = delta + row * width;
    if (post_norm != nullptr) ops->rms_norm(d, post_norm, width, eps, d);
    ops->add(h, d, width);
  }

  RowSource row_source() {
    return {[](void* context, int64_t row, float* scratch) {
              return static_cast<const Source*>(context)->make(row, scratch);
            },
            this};
  }
};

}  // namespace

struct LayerRunner::State {
  ModelConfig config;
  int threads;
  std::vector<float> frequencies[2];  // full attention, sliding
  std::vector<int64_t> positions;     // of the batch the angles are for
  std::vector<float> cosine[2], sine[2];
  AlignedBuffer qkv, attention, delta, gate_up, input, workspace;
  CachedPlan plans[kSlots];
  std::vector<std::string> kernels;

  State(const ModelConfig& c, int t) : config(c), threads(t > 0 ? t : available_cpus()) {
    frequencies[0] = rope_frequencies(config.rope, config.head_dim);
    frequencies[1] = rope_frequencies(config.local_rope, config.head_dim);
  }

  void set_positions(std::span<const BatchSpan> batch, int64_t rows) {
    std::vector<int64_t> now(static_cast<size_t>(rows));
    for (const BatchSpan& span : batch) {
      for (int64_t i = 0; i < span.count; ++i) {
        now[static_cast<size_t>(span.row + i)] = span.cache->length() + i;
      }
    }
    if (now == positions) return;
    positions.clear();
    const int64_t half = config.head_dim / 2;
    for (int kind = 0; kind < 2; ++kind) {
      cosine[kind].resize(static_cast<size_t>(rows * half));
      sine[kind].resize(static_cast<size_t>(rows * half));
      parallel_for(threads, rows, [&](int64_t row) {
        rope_angles(frequencies[kind], now[static_cast<size_t>(row)],
                    &cosine[kind][static_cast<size_t>(row * half)],
                    &sine[kind][static_cast<size_t>(row * half)]);
      });
    }
    positions = std::move(now);  // last: an allocation above may fail
  }

  Status reserve(int64_t rows) {
    const auto floats = [rows](int64_t width) {
      return static_cast<size_t>(rows * width) * sizeof(float);
    };
    const int64_t q = config.heads * config.head_dim, kv = config.kv_heads * config.head_dim;
    NIBBLE_TRY(grow(qkv, floats(q + 2 * kv)));
    NIBBLE_TRY(grow(attention, floats(q)));
    NIBBLE_TRY(grow(delta, floats(config.hidden)));
    return grow(gate_up, floats(2 * config.intermediate));
  }

  void note_kernel(const std::string& name) {
    if (std::find(kernels.begin(), kernels.end(), name) == kernels.end()) kernels.push_back(name);
  }

  /// Runs the linears of a group on rows that `source` makes; their outputs lie side by side in y.
  Status run_group(const LinearGroup& group, Slot slot, const LinearSpec& spec, Source& source,
                   int64_t rows, float* y, const SlotObserver& observer) {
    const int64_t k = group.linears.front().k;
    int64_t stride = 0;
    bool one_call = !observer && spec.granularity != Granularity::tensor;
    for (const Linear& linear : group.linears) {
      stride += linear.n;
      one_call = one_call && linear.quantized != nullptr &&
                 linear.quantized->group_size == group.linears.front().quantized->group_size;
    }
    if (!one_call) {
      NIBBLE_TRY(grow(input, static_cast<size_t>(rows * k) * sizeof(float)));
      float* x = input.as<float>();
      parallel_for(threads, rows, [&](int64_t row) {
        const float* made = source.make(row, x + row * k);
        if (made != x + row * k) std::copy_n(made, k, x + row * k);
      });
      source = Source{};
      source.x = x;
      source.stride = k;
      if (observer) observer(slot, x, rows, k);
    }
    // Neighbours that can share one quantized input go together.
    for (size_t first = 0; first < group.linears.size();) {
      const Linear& linear = group.linears[first];
      size_t last = first + 1;
      while (linear.quantized != nullptr && last < group.linears.size() &&
             group.linears[last].quantized != nullptr &&
             group.linears[last].quantized->group_size == linear.quantized->group_size) {
        ++last;
      }
      const std::span<const Linear> part(&linear, last - first);
      if (linear.quantized != nullptr) {
        NIBBLE_TRY(run_quantized(part, slot, spec, source, rows, y, stride));
      } else {
        run_dense(*linear.dense, rows, source.x, source.stride, y, stride, threads);
        note_kernel(dense_kernel_name());
      }
      for (const Linear& done : part) y += done.n;
      first = last;
    }
    return {};
  }

  Status run_quantized(std::span<const Linear> part, Slot slot, const LinearSpec& spec,
                       Source& source, int64_t rows, float* y, int64_t stride) {
    std::vector<GemmTarget> targets;
    int64_t n = 0;
    for (const Linear& linear : part) {
      targets.push_back({linear.quantized.get(), y + n, stride, nullptr});
      n += linear.n;
    }
    const PackedWeights& weights = *part.front().quantized;
    const bool mixed = std::any_of(spec.wide_groups.begin(), spec.wide_groups.end(),
                                   [](uint8_t wide) { return wide != 0; });
    const PlanKey key{
        rows, n, weights.k, weights.group_size, spec.mode, spec.granularity, spec.symmetric, mixed};
    CachedPlan& cached = plans[static_cast<int>(slot)];
    if (cached.key != key) {
      Problem problem;
      problem.m = rows;
      problem.n = n;
      problem.k = weights.k;
      problem.group_size = weights.group_size;
      problem.mode = spec.mode;
      problem.granularity = spec.granularity;
      problem.symmetric = spec.mode == Mode::w4a16 || spec.symmetric;
      problem.mixed_groups = mixed;
      Result<Plan> plan = plan_gemm(problem, nullptr, threads);
      if (!plan.ok()) return named(part, plan.status());
      cached = {key, *plan};
      note_kernel(plan->kernel_name());
    }
    NIBBLE_TRY(check_spec(part, spec, weights));
    NIBBLE_TRY(grow(workspace, cached.plan.workspace_bytes));
    GemmInput in;
    if (source.kind == Source::Kind::copy) {
      in.x = source.x;
      in.x_stride = source.stride;
    } else {
      in.rows = source.row_source();
    }
    in.clip = spec.clip;
    in.static_scales = spec.static_scales.data();
    in.wide_groups = spec.wide_groups.data();
    Status status = run_gemm(cached.plan, in, targets, workspace.data());
    return status.ok() ? status : named(part, status);
  }

  static Status check_spec(std::span<const Linear> part, const LinearSpec& spec,
                           const PackedWeights& weights) {
    const auto groups = static_cast<size_t>(weights.groups);
    const size_t scales = spec.granularity == Granularity::static_tensor ? 1
                          : spec.granularity == Granularity::static_group
                              ? groups
                              : spec.static_scales.size();
    if (spec.mode != Mode::w4a16 && spec.static_scales.size() != scales) {
      return named(part, Status(Code::invalid_argument,
                                fmt::format("the plan has {} static scales, expected {}",
                                            spec.static_scales.size(), scales)));
    }
    if (!spec.wide_groups.empty() && spec.wide_groups.size() != groups) {
      return named(
          part, Status(Code::invalid_argument, fmt::format("the plan has {} groups, the weights {}",
                                                           spec.wide_groups.size(), groups)));
    }
    return {};
  }

  static Status named(std::span<const Linear> part, const Status& status) {
    return Status(status.code(), fmt::format("{}: {}", part.front().name, status.message()));
  }
};

LayerRunner::LayerRunner(const ModelConfig& config, int threads)
    : state_(std::make_unique<State>(config, threads)) {}
LayerRunner::~LayerRunner() = default;
LayerRunner::LayerRunner(LayerRunner&&) noexcept = default;

const std::vector<std::string>& LayerRunner::kernels() const { return state_->kernels; }

Status LayerRunner::run(const LayerWeights& weights, int64_t layer_index,
                        std::span<const LinearSpec> specs, std::span<const BatchSpan> batch,
                        int64_t rows, float* hidden, const SlotObserver& observer) {
  State& s = *state_;
  const ModelConfig& c = s.config;
  if (rows == 0) return {};
  NIBBLE_TRY(s.reserve(rows));
  s.set_positions(batch, rows);
  const auto spec = [&](Slot slot) -> const LinearSpec& {
    return specs[static_cast<size_t>(slot)];
  };
  const auto group = [&](Slot slot) -> const LinearGroup& {
    return weights.groups[static_cast<int>(slot)];
  };
  Source norm;
  norm.kind = Source::Kind::norm;
  norm.hidden = hidden;
  norm.width = c.hidden;
  norm.eps = static_cast<float>(c.norm_eps);

  Source before_attention = norm;
  before_attention.norm = weights.norms.input.data();
  NIBBLE_TRY(s.run_group(group(Slot::qkv), Slot::qkv, spec(Slot::qkv), before_attention, rows,
                         s.qkv.as<float>(), observer));

  const int kind = c.window[static_cast<size_t>(layer_index)] > 0 ? 1 : 0;
  AttentionInput attention;
  attention.config = &c;
  attention.layer = layer_index;
  attention.batch = batch;
  attention.qkv = s.qkv.as<float>();
  attention.qkv_stride = (c.heads + 2 * c.kv_heads) * c.head_dim;
  attention.q_norm = weights.norms.q.empty() ? nullptr : weights.norms.q.data();
  attention.k_norm = weights.norms.k.empty() ? nullptr : weights.norms.k.data();
  attention.cosine = s.cosine[kind].data();
  attention.sine = s.sine[kind].data();
  attention.out = s.attention.as<float>();
  attention.threads = s.threads;
  if (Status status = attend(attention); !status.ok()) {
    return Status(status.code(), fmt::format("layer {}: {}", layer_index, status.message()));
  }

  Source attended;
  attended.x = s.attention.as<float>();
  attended.stride = c.heads * c.head_dim;
  NIBBLE_TRY(s.run_group(group(Slot::o), Slot::o, spec(Slot::o), attended, rows,
                         s.delta.as<float>(), observer));

  Source before_mlp = norm;
  before_mlp.norm = weights.norms.mlp.data();
  before_mlp.delta = s.delta.as<float>();
  before_mlp.post_norm =
      weights.norms.post_attention.empty() ? nullptr : weights.norms.post_attention.data();
  NIBBLE_TRY(s.run_group(group(Slot::gate_up), Slot::gate_up, spec(Slot::gate_up), before_mlp, rows,
                         s.gate_up.as<float>(), observer));

  Source gated;
  gated.kind = Source::Kind::gate;
  gated.x = s.gate_up.as<float>();
  gated.stride = 2 * c.intermediate;
  gated.width = c.intermediate;
  gated.activation = c.activation;
  NIBBLE_TRY(s.run_group(group(Slot::down), Slot::down, spec(Slot::down), gated, rows,
                         s.delta.as<float>(), observer));

  Source last = norm;
  last.delta = s.delta.as<float>();
  last.post_norm = weights.norms.post_mlp.empty() ? nullptr : weights.norms.post_mlp.data();
  parallel_for(rows >= 16 ? s.threads : 1, rows,
               [&](int64_t row) { last.add_delta(row, hidden + row * c.hidden); });
  return {};
}

}  // namespace nibble
