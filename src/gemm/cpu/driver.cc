// Runs a plan: quantizes a block of rows into the workspace, multiplies it with every target, goes
// on to the next rows. Each output element is computed by one kernel call.
#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/check.h"
#include "base/thread_pool.h"
#include "gemm/cpu/plan.h"
#include "gemm/cpu/quantize.h"

namespace nibble {
namespace {

constexpr int64_t kNoRow = std::numeric_limits<int64_t>::max();

/// The smallest row that any thread has reported, or kNoRow.
class FirstRow {
 public:
  void report(int64_t row) {
    int64_t first = row_.load(std::memory_order_relaxed);
    while (row < first && !row_.compare_exchange_weak(first, row)) {
    }
  }
  int64_t get() const { return row_.load(std::memory_order_relaxed); }

 private:
  std::atomic<int64_t> row_{kNoRow};
};

/// Mutable view of one block's workspace.
struct BlockBuffers {
  std::byte* base = nullptr;
  WorkspaceLayout layout;

  int8_t* codes() const { return reinterpret_cast<int8_t*>(base); }
  float* floats() const { return reinterpret_cast<float*>(base); }
  float* scales() const { return reinterpret_cast<float*>(base + layout.scales_offset); }
  int32_t* sums() const { return reinterpret_cast<int32_t*>(base + layout.sums_offset); }
};

struct Shape {
  int64_t groups = 0, quads = 0, steps = 0;
  explicit Shape(const Problem& p)
      : groups(p.k / p.group_size), quads(quads_of(p.group_size)), steps(steps_of(p.group_size)) {}
};

/// Row `row` of a block that has `rows`.
RowDestination row_destination(const Plan& plan, const BlockBuffers& buffers, int64_t row,
                               int64_t rows) {
  const Shape shape(plan.problem);
  RowDestination to;
  if (plan.kernel->layout == ActivationLayout::tiles) {
    const int64_t tile_bytes = shape.steps * kTileRows * kTileDepth;
    to.codes = buffers.codes() + row / kTileRows * tile_bytes + row % kTileRows * kTileDepth;
    to.group_stride = (rows + kTileRows - 1) / kTileRows * tile_bytes;
    to.step_stride = kTileRows * kTileDepth;
    to.padded_group = shape.steps * kTileDepth;
  } else {
    to.codes = buffers.codes() + row * shape.groups * shape.quads * 4;
    to.group_stride = to.padded_group = shape.quads * 4;
    to.step_stride = kTileDepth;
  }
  const bool by_group = scales_per_group(plan.problem.granularity);
  to.scales = buffers.scales() + row * (by_group ? shape.groups : 1);
  to.sums = buffers.sums() + row * shape.groups;
  return to;
}

/// Copies one row that is quantized already; false if a code does not fit the mode.
bool place_row(const Plan& plan, const QuantizedInput& input, int64_t row,
               const RowDestination& to) {
  const Problem& p = plan.problem;
  const int64_t groups = p.k / p.group_size;
  const bool by_group = scales_per_group(p.granularity);
  for (int64_t g = 0; g < groups; ++g) {
    const int8_t* from = input.codes + row * input.code_stride + g * p.group_size;
    int32_t sum = 0;
    for (int64_t i = 0; i < to.padded_group; ++i) {
      const int8_t code = i < p.group_size ? from[i] : int8_t{0};
      if (p.kernel_mode() == Mode::w4a4 && (code < -15 || code > 15)) return false;
      to.codes[g * to.group_stride + i / kTileDepth * to.step_stride + i % kTileDepth] = code;
      sum += code;
    }
    to.sums[g] = sum;
    if (by_group) to.scales[g] = input.scales[row * groups + g];
  }
  if (!by_group) to.scales[0] = input.scales[row];
  return true;
}

/// Column blocks of all targets as one list of tasks.
struct TaskList {
  std::span<const GemmTarget> targets;
  int64_t blocks_per_task = 1;

  int64_t tasks_of(const GemmTarget& target) const {
    return (target.weights->blocks + blocks_per_task - 1) / blocks_per_task;
  }
  int64_t size() const {
    int64_t total = 0;
    for (const GemmTarget& target : targets) total += tasks_of(target);
    return total;
  }
};

void run_task(const Plan& plan, const TaskList& list, int64_t task, int64_t row0, int64_t rows,
              const BlockBuffers& buffers) {
  size_t index = 0;
  while (task >= list.tasks_of(list.targets[index])) task -= list.tasks_of(list.targets[index++]);
  const GemmTarget& target = list.targets[index];
  const Problem& p = plan.problem;
  GemmBlock block;
  block.weights = target.weights;
  block.rows = rows;
  block.block0 = task * list.blocks_per_task;
  block.block1 = std::min(block.block0 + list.blocks_per_task, target.weights->blocks);
  if (plan.kernel->layout == ActivationLayout::floats) {
    block.activations.floats = buffers.floats();
  } else {
    block.activations = {buffers.codes(), nullptr, buffers.scales(), buffers.sums()};
  }
  block.group_scales = scales_per_group(p.granularity);
  block.y = static_cast<std::byte*>(target.y) + row0 * target.y_stride * dtype_bytes(p.y_dtype);
  block.y_stride = target.y_stride;
  block.y_dtype = p.y_dtype;
  if (target.partials != nullptr) {
    block.partials = target.partials + row0 * target.weights->groups * target.weights->n;
  }
  plan.kernel->run(block);
}

/// Every row block in turn: fill(row, row in block, rows of block) puts one row into the workspace,
/// then the tasks. Returns the first row that fill refused, or kNoRow.
template <class Fill>
int64_t run_row_blocks(const Plan& plan, std::span<const GemmTarget> targets,
                       const BlockBuffers& buffers, const Fill& fill) {
  NIBBLE_CHECK(plan.block_rows >= 1 && plan.block_rows <= kMaxBlockRows);
  const TaskList list{targets, plan.blocks_per_task};
  const int64_t m = plan.problem.m, num_tasks = list.size();
  FirstRow refused;
  for (int64_t row0 = 0; row0 < m; row0 += plan.block_rows) {
    const int64_t rows = std::min(plan.block_rows, m - row0);
    // Whole AMX tiles where there are enough of them: two threads in one tile share cache lines.
    const int64_t chunk = rows >= 4 * kTileRows ? kTileRows : 1;
    parallel_for(plan.threads, (rows + chunk - 1) / chunk, [&](int64_t index) {
      for (int64_t row = index * chunk; row < std::min(rows, (index + 1) * chunk); ++row) {
        if (!fill(row0 + row, row, rows)) refused.report(row0 + row);
      }
    });
    if (refused.get() != kNoRow) break;
    parallel_for(plan.threads, num_tasks,
                 [&](int64_t task) { run_task(plan, list, task, row0, rows, buffers); });
  }
  return refused.get();
}

const std::byte* row_of(const GemmInput& input, const Problem& p, int64_t row) {
  return static_cast<const std::byte*>(input.x) + row * input.x_stride * dtype_bytes(p.x_dtype);
}

/// Scratch of this thread for one row of k floats, kept between calls.
float* row_scratch(int64_t k) {
  thread_local AlignedBuffer buffer;
  const size_t bytes = static_cast<size_t>(k) * sizeof(float);
  if (buffer.bytes() < bytes) {
    Result<AlignedBuffer> larger = AlignedBuffer::zeroed(bytes);
    if (!larger.ok()) return nullptr;
    buffer = std::move(*larger);
  }
  return buffer.as<float>();
}

/// Row `row` of x, made now if it has a source. Null: no memory for a scratch row.
const void* input_row(const GemmInput& input, const Problem& p, int64_t row) {
  if (input.rows.make == nullptr) return row_of(input, p, row);
  float* scratch = row_scratch(p.k);
  return scratch == nullptr ? nullptr : input.rows.make(input.rows.context, row, scratch);
}

Status check_targets(const Problem& p, std::span<const GemmTarget> targets) {
  for (const GemmTarget& target : targets) {
    if (target.weights == nullptr || (target.y == nullptr && p.m > 0)) {
      return Status(Code::invalid_argument, "a target has no weights or no y");
    }
    const PackedWeights& w = *target.weights;
    if (w.k != p.k || w.group_size != p.group_size) {
      return Status(Code::invalid_argument,
                    fmt::format("weights have K={} and group size {}, the plan K={} and {}", w.k,
                                w.group_size, p.k, p.group_size));
    }
    if (target.y_stride < w.n) {
      return Status(Code::invalid_argument,
                    fmt::format("y row stride {} is below N={}", target.y_stride, w.n));
    }
    if (target.partials != nullptr && p.mode == Mode::w4a16) {
      return Status(Code::invalid_argument, "w4a16 has no integer partial sums");
    }
  }
  return {};
}

Status check_static_scale(float scale, int64_t index) {
  if (std::isfinite(scale) && scale >= kSmallestRange) return {};
  return Status(Code::invalid_argument,
                fmt::format("static activation scale {} is {}: expected a finite value of at least "
                            "2^-100",
                            index, scale));
}

Status check_input(const Problem& p, const GemmInput& input) {
  if (input.rows.make != nullptr) {
    if (p.x_dtype != Dtype::f32 || p.granularity == Granularity::tensor) {
      return Status(Code::invalid_argument, "a row source gives f32, and not one scale per tensor");
    }
  } else if (input.x == nullptr && p.m > 0) {
    return Status(Code::invalid_argument, "x is null");
  } else if (input.x_stride < p.k) {
    return Status(Code::invalid_argument,
                  fmt::format("x row stride {} is below K={}", input.x_stride, p.k));
  }
  if (p.mode == Mode::w4a16) return {};
  if (p.mixed_groups && input.wide_groups == nullptr) {
    return Status(Code::invalid_argument, "mixed groups need wide_groups");
  }
  if (!(input.clip > 0.0f && input.clip <= 1.0f)) {
    return Status(Code::invalid_argument, fmt::format("clip {} is outside (0, 1]", input.clip));
  }
  int64_t count = 0;
  if (p.granularity == Granularity::static_tensor) count = 1;
  if (p.granularity == Granularity::static_group) count = p.k / p.group_size;
  if (count > 0 && input.static_scales == nullptr) {
    return Status(Code::invalid_argument, fmt::format("granularity {} needs {} static scales",
                                                      granularity_name(p.granularity), count));
  }
  for (int64_t i = 0; i < count; ++i) NIBBLE_TRY(check_static_scale(input.static_scales[i], i));
  return {};
}

Status non_finite_row(int64_t row) {
  return Status(Code::non_finite, fmt::format("x has a NaN or infinity in row {}", row));
}

/// Scaling of all of x for Granularity::tensor; an empty one otherwise.
Result<Scaling> tensor_scaling(const Plan& plan, const QuantizerOps& ops, const GemmInput& input) {
  const Problem& p = plan.problem;
  if (p.granularity != Granularity::tensor) return Scaling{};
  const int64_t parts = std::min<int64_t>(p.m, plan.threads);
  std::vector<ElementRange> ranges(static_cast<size_t>(parts));
  parallel_for(plan.threads, parts, [&](int64_t part) {
    ElementRange mine;
    for (int64_t row = part; row < p.m; row += parts) {
      mine = merge_ranges(mine, ops.range(row_of(input, p, row), p.x_dtype, p.k));
    }
    ranges[static_cast<size_t>(part)] = mine;
  });
  ElementRange all;
  for (const ElementRange& range : ranges) all = merge_ranges(all, range);
  if (all.max_abs_bits >= kInfinityBits) {
    for (int64_t row = 0; row < p.m; ++row) {
      const ElementRange range = ops.range(row_of(input, p, row), p.x_dtype, p.k);
      if (range.max_abs_bits >= kInfinityBits) return non_finite_row(row);
    }
  }
  return dynamic_scaling(all, p, input.clip);
}

BlockBuffers block_buffers(const Plan& plan, void* workspace) {
  return {static_cast<std::byte*>(workspace),
          workspace_layout(plan.problem, plan.kernel->layout, plan.block_rows)};
}

Status check_workspace(const Plan& plan, const void* workspace) {
  if (plan.workspace_bytes > 0 && workspace == nullptr) {
    return Status(Code::invalid_argument, "workspace is null");
  }
  if (reinterpret_cast<uintptr_t>(workspace) % kCacheLineBytes != 0) {
    return Status(Code::invalid_argument, "workspace is not 64-byte aligned");
  }
  return {};
}

}  // namespace

Status run_gemm(const Plan& plan, const GemmInput& input, std::span<const GemmTarget> targets,
                void* workspace) {
  const Problem& p = plan.problem;
  NIBBLE_TRY(check_targets(p, targets));
  NIBBLE_TRY(check_input(p, input));
  if (p.m == 0) return {};
  NIBBLE_TRY(check_workspace(plan, workspace));
  const BlockBuffers buffers = block_buffers(plan, workspace);
  const QuantizerOps& ops = quantizer_ops_for(plan.kernel->isa);
  if (plan.kernel->layout == ActivationLayout::floats) {
    run_row_blocks(plan, targets, buffers, [&](int64_t row, int64_t in_block, int64_t) {
      float* to = buffers.floats() + in_block * p.k;
      if (input.rows.make == nullptr) {
        ops.to_float(row_of(input, p, row), p.x_dtype, p.k, to);
      } else if (const float* made = input.rows.make(input.rows.context, row, to); made != to) {
        std::memcpy(to, made, static_cast<size_t>(p.k) * sizeof(float));
      }
      return true;
    });
    return {};
  }
  Result<Scaling> scaling = tensor_scaling(plan, ops, input);
  if (!scaling.ok()) return scaling.status();
  std::atomic<bool> no_memory = false;
  const int64_t refused =
      run_row_blocks(plan, targets, buffers, [&](int64_t row, int64_t in_block, int64_t rows) {
        const void* x = input_row(input, p, row);
        if (x == nullptr) no_memory = true;
        return x != nullptr && quantize_row(ops, p, input, *scaling, x,
                                            row_destination(plan, buffers, in_block, rows));
      });
  if (no_memory) return Status(Code::out_of_memory, "cannot allocate a row of activations");
  return refused == kNoRow ? Status{} : non_finite_row(refused);
}

Status run_gemm_quantized(const Plan& plan, const QuantizedInput& input,
                          std::span<const GemmTarget> targets, void* workspace) {
  const Problem& p = plan.problem;
  NIBBLE_TRY(check_targets(p, targets));
  if (p.mode == Mode::w4a16) {
    return Status(Code::invalid_argument, "w4a16 takes floating-point activations");
  }
  if (p.m == 0) return {};
  if (input.codes == nullptr || input.scales == nullptr || input.code_stride < p.k) {
    return Status(Code::invalid_argument,
                  fmt::format("quantized input: codes or scales are null, or the row stride {} is "
                              "below K={}",
                              input.code_stride, p.k));
  }
  NIBBLE_TRY(check_workspace(plan, workspace));
  const BlockBuffers buffers = block_buffers(plan, workspace);
  const int64_t refused =
      run_row_blocks(plan, targets, buffers, [&](int64_t row, int64_t in_block, int64_t rows) {
        return place_row(plan, input, row, row_destination(plan, buffers, in_block, rows));
      });
  if (refused == kNoRow) return {};
  return Status(
      Code::invalid_argument,
      fmt::format("row {} has an activation code outside -15..15, the range of w4a4", refused));
}

Status quantize_activations(const Plan& plan, const GemmInput& input, int8_t* codes, float* scales,
                            int32_t* sums) {
  const Problem& p = plan.problem;
  if (p.mode == Mode::w4a16) {
    return Status(Code::invalid_argument, "w4a16 does not quantize activations");
  }
  NIBBLE_TRY(check_input(p, input));
  if (p.m == 0) return {};
  if (codes == nullptr || scales == nullptr || input.rows.make != nullptr) {
    return Status(Code::invalid_argument, "codes or scales are null, or rows come from a source");
  }
  const QuantizerOps& ops = quantizer_ops_for(plan.kernel->isa);
  Result<Scaling> scaling = tensor_scaling(plan, ops, input);
  if (!scaling.ok()) return scaling.status();
  const int64_t groups = p.k / p.group_size;
  const int64_t per_row = scales_per_group(p.granularity) ? groups : 1;
  FirstRow refused;
  parallel_for(plan.threads, p.m, [&](int64_t row) {
    RowDestination to{
        codes + row * p.k, p.group_size,           kTileDepth,
        p.group_size,      scales + row * per_row, sums == nullptr ? nullptr : sums + row * groups};
    if (!quantize_row(ops, p, input, *scaling, row_of(input, p, row), to)) refused.report(row);
  });
  return refused.get() == kNoRow ? Status{} : non_finite_row(refused.get());
}

}  // namespace nibble
