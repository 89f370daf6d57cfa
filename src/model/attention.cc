#include "model/attention.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "base/thread_pool.h"
#include "gemm/float_ops.h"

namespace nibble {
namespace {

// Rows (queries x heads of one KV head) that meet a block of keys together: the scratch of a task
// stays in L1 and L2.
constexpr int64_t kTaskRows = 48;

/// Stores `count` floats as elements 0, step, 2 * step, ... of a panel; false if one does not fit.
/// In its place a 0 is stored: a panel must stay finite, as positions that a query does not see are
/// multiplied by 0.
bool store_panel(const float* from, int64_t count, Dtype dtype, std::byte* to, int64_t step) {
  bool fits = true;
  const float largest = dtype == Dtype::f16 ? 65504.0f : 3.3895314e38f;
  for (int64_t i = 0; i < count; ++i) {
    const bool good = std::fabs(from[i]) <= largest;
    fits = fits && good;
    store_from_float(to, i * step, dtype, good ? from[i] : 0.0f);
  }
  return fits;
}

class Attention {
 public:
  explicit Attention(const AttentionInput& in)
      : in_(in),
        c_(*in.config),
        ops_(float_ops()),
        window_(c_.window[static_cast<size_t>(in.layer)]),
        slices_((c_.head_dim + 63) / 64) {}

  /// Row `row` of the batch, at `position` of its sequence: norms, rope, and into the cache.
  bool prepare(KvCache& cache, int64_t row, int64_t position, int64_t kv_head) const {
    const int64_t d = c_.head_dim, half = d / 2, groups = c_.groups();
    float* q = in_.qkv + row * in_.qkv_stride + kv_head * groups * d;
    float* k = in_.qkv + row * in_.qkv_stride + (c_.heads + kv_head) * d;
    const float* v = k + c_.kv_heads * d;
    const float* cosine = in_.cosine + row * half;
    const float* sine = in_.sine + row * half;
    const auto eps = static_cast<float>(c_.norm_eps);
    for (int64_t g = 0; g < groups; ++g) {
      if (in_.q_norm != nullptr) ops_.rms_norm(q + g * d, in_.q_norm, d, eps, q + g * d);
      ops_.rope(q + g * d, cosine, sine, half);
    }
    bool finite = true;
    for (int64_t i = 0; i < groups * d; ++i) finite = finite && std::isfinite(q[i]);
    if (in_.k_norm != nullptr) ops_.rms_norm(k, in_.k_norm, d, eps, k);
    ops_.rope(k, cosine, sine, half);
    const int64_t chunk = position / kChunkPositions, slot = position % kChunkPositions;
    const Dtype dtype = cache.dtype();
    std::byte* keys = cache.keys(chunk, in_.layer, kv_head) + slot * dtype_bytes(dtype);
    bool fits = store_panel(k, d, dtype, keys, kChunkPositions);
    for (int64_t s = 0; s < slices_; ++s) {
      std::byte* values = cache.values(chunk, in_.layer, kv_head) +
                          (s * kChunkPositions + slot) * 64 * dtype_bytes(dtype);
      fits = store_panel(v + s * 64, std::min<int64_t>(64, d - s * 64), dtype, values, 1) && fits;
    }
    return fits && finite;
  }

  /// Queries [first, first + count) of a span against everything they may see. False if a score was
  /// NaN or infinite, or if there is no memory for the scratch.
  bool run(const BatchSpan& span, int64_t kv_head, int64_t first, int64_t count) const {
    KvCache& cache = *span.cache;
    const int64_t d = c_.head_dim, groups = c_.groups(), rows = count * groups;
    const int64_t width = slices_ * 64;
    float* q = scratch(static_cast<size_t>(rows * (d + 64 + width + 2)));
    if (q == nullptr) return false;
    float* scores = q + rows * d;
    float* sums = scores + rows * 64;
    auto* states = reinterpret_cast<SoftmaxState*>(sums + rows * width);
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = in_.qkv + (span.row + first + r / groups) * in_.qkv_stride +
                          (kv_head * groups + r % groups) * d;
      std::copy_n(from, d, q + r * d);
      ops_.scale(q + r * d, d, static_cast<float>(c_.attention_scale));
      states[r] = {-INFINITY, 0};
    }
    std::fill_n(sums, rows * width, 0.0f);
    const int64_t position0 = cache.length() + first, last = position0 + count - 1;
    const int64_t start = window_ > 0 ? std::max<int64_t>(0, position0 - window_ + 1) : 0;
    for (int64_t chunk = start / kChunkPositions; chunk <= last / kChunkPositions; ++chunk) {
      ops_.panel_product(
          {q, d, cache.keys(chunk, in_.layer, kv_head), cache.dtype(), rows, d, scores, 64, true});
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t position = position0 + r / groups - chunk * kChunkPositions;
        const int64_t from = window_ > 0 ? std::max<int64_t>(0, position - window_ + 1) : 0;
        const float factor =
            ops_.softmax_block(scores + r * 64, std::min<int64_t>(from, 64),
                               std::clamp<int64_t>(position + 1, 0, 64), &states[r]);
        if (factor != 1.0f) ops_.scale(sums + r * width, width, factor);
      }
      for (int64_t s = 0; s < slices_; ++s) {
        const std::byte* values = cache.values(chunk, in_.layer, kv_head) +
                                  s * kChunkPositions * 64 * dtype_bytes(cache.dtype());
        ops_.panel_product({scores, 64, values, cache.dtype(), rows, kChunkPositions, sums + s * 64,
                            width, false});
      }
    }
    bool finite = true;
    for (int64_t r = 0; r < rows; ++r) {
      finite = finite && std::isfinite(states[r].max) && states[r].sum > 0;
      float* to = in_.out + (span.row + first + r / groups) * c_.heads * d +
                  (kv_head * groups + r % groups) * d;
      ops_.scale(sums + r * width, d, 1.0f / states[r].sum);
      std::copy_n(sums + r * width, d, to);
    }
    return finite;
  }

  int64_t queries_per_task() const { return std::max<int64_t>(1, kTaskRows / c_.groups()); }

 private:
  /// Of this thread, kept between calls; null if there is no memory.
  static float* scratch(size_t floats) {
    thread_local AlignedBuffer buffer;
    if (buffer.bytes() < floats * sizeof(float)) {
      Result<AlignedBuffer> larger = AlignedBuffer::zeroed(floats * sizeof(float));
      if (!larger.ok()) return nullptr;
      buffer = std::move(*larger);
    }
    return buffer.as<float>();
  }

  const AttentionInput& in_;
  const ModelConfig& c_;
  const FloatOps& ops_;
  int64_t window_, slices_;
};

struct Task {
  const BatchSpan* span;
  int64_t kv_head, first, count;
};

}  // namespace

Status attend(const AttentionInput& in) {
  const Attention attention(in);
  const int64_t kv_heads = in.config->kv_heads;
  const bool single = std::all_of(in.batch.begin(), in.batch.end(),
                                  [](const BatchSpan& span) { return span.count == 1; });
  std::vector<Task> tasks;
  std::vector<Task> rows;
  for (const BatchSpan& span : in.batch) {
    const int64_t step = attention.queries_per_task();
    for (int64_t first = 0; first < span.count; first += step) {
      for (int64_t head = 0; head < kv_heads; ++head) {
        tasks.push_back({&span, head, first, std::min(step, span.count - first)});
      }
    }
    for (int64_t i = 0; !single && i < span.count; ++i) rows.push_back({&span, 0, i, 1});
  }
  std::atomic<bool> fits = true, scored = true;
  const auto prepare = [&](const Task& task, int64_t head) {
    KvCache& cache = *task.span->cache;
    if (!attention.prepare(cache, task.span->row + task.first, cache.length() + task.first, head)) {
      fits = false;
    }
  };
  parallel_for(in.threads, static_cast<int64_t>(rows.size()), [&](int64_t index) {
    for (int64_t head = 0; head < kv_heads; ++head) prepare(rows[static_cast<size_t>(index)], head);
  });
  // The longest contexts, at the end of a prompt, first: the short ones fill the gaps.
  parallel_for(in.threads, static_cast<int64_t>(tasks.size()), [&](int64_t index) {
    const Task& task = tasks[tasks.size() - 1 - static_cast<size_t>(index)];
    if (single) prepare(task, task.kv_head);
    if (!attention.run(*task.span, task.kv_head, task.first, task.count)) scored = false;
  });
  if (!scored) {
    return Status(Code::non_finite,
                  "an attention score is NaN or infinite, or there is no memory for the scores");
  }
  if (fits) return {};
  return Status(
      Code::non_finite,
      fmt::format("a query, key or value is NaN, infinite or beyond the range of a KV cache in "
                  "{}",
                  dtype_name(in.batch.front().cache->dtype())));
}

}  // namespace nibble
