// Blocks of output channels are independent; within one, panels of 64 input channels are rounded in
// order, each after the errors of all earlier ones were fed back into it.
#include "awq/rounding.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <utility>

#include "awq/feedback.h"
#include "base/thread_pool.h"
#include "format/message.h"

namespace nibble::awq {
namespace {

constexpr double kDamping = 0.01;  // of the mean diagonal, as GPTQ's

/// What one call of round_linear writes to; blocks write to disjoint parts.
struct Codes {
  std::vector<uint8_t> codes;         // (k, n)
  std::vector<uint8_t> zeros;         // (groups, n)
  std::vector<uint16_t> scales;       // (groups, n) bits
  std::vector<double> signal, noise;  // per block
  std::mutex mutex;
  std::pair<int64_t, int64_t> first_bad{-1, -1};  // (n, k) of the first bad group
  bool finite = true;
};

/// One block of at most kErrorRows output channels.
class RowBlock {
 public:
  RowBlock(const RoundingContext& context, const float* weight, int64_t n, int64_t row0)
      : context_(context),
        grid_options_(context.options().grid),
        weight_(weight),
        n_(n),
        k_(context.moment().size()),
        row0_(row0),
        rows_(std::min(kErrorRows, n - row0)),
        target_(weight + row0 * k_, weight + (row0 + rows_) * k_),
        errors_(static_cast<size_t>(rows_ * k_)),
        grids_(static_cast<size_t>(rows_)) {}

  void run(Codes& out) {
    for (int64_t k0 = 0; k0 < k_; k0 += kPanelColumns) {
      const int64_t columns = std::min(kPanelColumns, k_ - k0);
      if (context_.feedback() != nullptr) start_panel(k0);
      for (int64_t k = k0; k < k0 + columns;) {
        if (k % grid_options_.group_size == 0) start_group(k / grid_options_.group_size, out);
        const int64_t group_end = (k / grid_options_.group_size + 1) * grid_options_.group_size;
        const int64_t end = std::min(k0 + columns, group_end);
        for (int64_t r = 0; r < rows_; ++r) round_row(r, k, end, k0, columns, out);
        k = end;
      }
    }
    measure(out);
  }

 private:
  /// Brings the panel at k0 up to date with all errors before it. The panels of a group are brought
  /// up to date with what comes before the group together, since its range is chosen at its start.
  void start_panel(int64_t k0) {
    const int64_t size = grid_options_.group_size, group = k0 / size * size;
    const bool spans_panels = size > kPanelColumns && group % kPanelColumns == 0;
    if (!spans_panels) return feed_back(k0, 0, k0);
    if (k0 != group) return feed_back(k0, group, k0);
    for (int64_t k = group; k < group + size; k += kPanelColumns) feed_back(k, 0, group);
  }

  /// Adds to the 64 columns from k0 what the errors of columns [first, last) ask for.
  void feed_back(int64_t k0, int64_t first, int64_t last) {
    if (first == last) return;
    alignas(64) float sums[kErrorRows * kPanelColumns];
    PanelProduct product;
    product.a = errors_.data() + first;
    product.a_stride = k_;
    product.panel = context_.feedback()->panel(k0 / kPanelColumns) + first * kPanelColumns;
    product.rows = rows_;
    product.depth = last - first;
    product.c = sums;
    product.c_stride = kPanelColumns;
    product.start_from_zero = true;
    float_ops().panel_product(product);
    const int64_t columns = std::min(kPanelColumns, k_ - k0);
    for (int64_t r = 0; r < rows_; ++r) {
      float* const target = target_.data() + r * k_ + k0;
      for (int64_t c = 0; c < columns; ++c) target[c] += sums[r * kPanelColumns + c];
    }
  }

  void start_group(int64_t group, Codes& out) {
    const int64_t k0 = group * grid_options_.group_size;
    Range ranges[kErrorRows];
    const float* const first = target_.data() + k0;
    if (context_.options().clip) {
      search_ranges(context_.group_moment(group), first, rows_, k_, grid_options_, ranges);
    } else {
      for (int64_t r = 0; r < rows_; ++r) {
        ranges[r] = range_of(first + r * k_, grid_options_.group_size);
      }
    }
    for (int64_t r = 0; r < rows_; ++r) {
      const Grid grid = grid_for(ranges[r], grid_options_);
      grids_[static_cast<size_t>(r)] = grid;
      const auto at = static_cast<size_t>(group * n_ + row0_ + r);
      store_from_float(&out.scales[at], 0, grid_options_.scale_dtype, grid.scale);
      out.zeros[at] = static_cast<uint8_t>(grid.zero);
      const float* const weight = weight_ + (row0_ + r) * k_ + k0;
      const bool finite = std::all_of(weight, weight + grid_options_.group_size,
                                      [](float w) { return std::isfinite(w); });
      if (!finite || !std::isfinite(grid.scale)) report(out, row0_ + r, k0, finite);
    }
  }

  static void report(Codes& out, int64_t n, int64_t k, bool finite) {
    const std::lock_guard lock(out.mutex);
    if (out.first_bad.first >= 0 && out.first_bad < std::pair(n, k)) return;
    out.first_bad = {n, k};
    out.finite = finite;
  }

  /// Rounds columns [first, last) of row r, all in one group and one panel.
  void round_row(int64_t r, int64_t first, int64_t last, int64_t k0, int64_t columns, Codes& out) {
    const Grid grid = grids_[static_cast<size_t>(r)];
    float* const target = target_.data() + r * k_;
    float* const error = errors_.data() + r * k_;
    const float* const weight = weight_ + (row0_ + r) * k_;
    const float* const panel =
        context_.feedback() != nullptr ? context_.feedback()->panel(k0 / kPanelColumns) : nullptr;
    for (int64_t k = first; k < last; ++k) {
      const float code = grid.code(target[k]);
      out.codes[static_cast<size_t>(k * n_ + row0_ + r)] =
          static_cast<uint8_t>(static_cast<int>(code));
      error[k] = weight[k] - grid.value(code);
      if (panel == nullptr) continue;
      const float* const row = panel + k * kPanelColumns;
      for (int64_t c = k - k0 + 1; c < columns; ++c) target[k0 + c] += error[k] * row[c];
    }
  }

  void measure(Codes& out) {
    double signal[kErrorRows], noise[kErrorRows];
    quadratic_forms(context_.moment(), weight_ + row0_ * k_, rows_, k_, signal);
    quadratic_forms(context_.moment(), errors_.data(), rows_, k_, noise);
    const auto block = static_cast<size_t>(row0_ / kErrorRows);
    for (int64_t r = 0; r < rows_; ++r) {
      out.signal[block] += signal[r];
      out.noise[block] += noise[r];
    }
  }

  const RoundingContext& context_;
  const GridOptions grid_options_;
  const float* const weight_;
  const int64_t n_, k_, row0_, rows_;
  std::vector<float> target_;  // (rows, k) weights, from the current panel on with feedback
  std::vector<float> errors_;  // (rows, k) weight - rounded
  std::vector<Grid> grids_;    // (rows) of the current group
};

}  // namespace

Result<RoundingContext> RoundingContext::create(const PanelMatrix& moment,
                                                const RoundingOptions& options) {
  RoundingContext context;
  context.options_ = options;
  context.moment_ = &moment;
  const int64_t size = options.grid.group_size, groups = moment.size() / size;
  context.whole_ = groups == 1;
  if (options.clip && !context.whole_) {
    for (int64_t group = 0; group < groups; ++group) {
      Result<PanelMatrix> part = PanelMatrix::zeroed(size);
      if (!part.ok()) return part.status();
      for (int64_t i = 0; i < size; ++i) {
        for (int64_t j = 0; j < size; ++j) {
          part->at(i, j) = moment.at(group * size + i, group * size + j);
        }
      }
      context.group_moments_.push_back(std::move(*part));
    }
  }
  if (options.rounding == Rounding::compensated) {
    Result<PanelMatrix> feedback = feedback_matrix(moment, kDamping, options.threads);
    if (!feedback.ok()) return feedback.status();
    context.feedback_ = std::move(*feedback);
  }
  return context;
}

uint64_t RoundingContext::bytes_for(int64_t k, const RoundingOptions& options) {
  const int64_t size = options.grid.group_size;
  uint64_t bytes = 0;
  if (options.clip && size < k)
    bytes += static_cast<uint64_t>(k / size) * PanelMatrix::bytes_for(size);
  if (options.rounding == Rounding::compensated) bytes += PanelMatrix::bytes_for(k);
  return bytes;
}

Result<RoundedLinear> round_linear(const std::string& name, const float* weight, int64_t n,
                                   const RoundingContext& context) {
  const GridOptions& grid = context.options().grid;
  const int64_t k = context.moment().size(), groups = k / grid.group_size;
  const int64_t blocks = (n + kErrorRows - 1) / kErrorRows;
  Codes out;
  out.codes.resize(static_cast<size_t>(k * n));
  out.zeros.resize(static_cast<size_t>(groups * n));
  out.scales.resize(out.zeros.size());
  out.signal.resize(static_cast<size_t>(blocks));
  out.noise.resize(out.signal.size());
  parallel_for(context.options().threads, blocks,
               [&](int64_t block) { RowBlock(context, weight, n, block * kErrorRows).run(out); });
  if (out.first_bad.first >= 0) {
    const auto [row, column] = out.first_bad;
    const std::string where = fmt::format("in output channel {}, input channels {}..{}", row,
                                          column, column + grid.group_size - 1);
    if (!out.finite) {
      return Status(Code::non_finite,
                    fmt::format("{}: NaN or infinity {}", quote_name(name), where));
    }
    return Status(Code::invalid_argument,
                  fmt::format("{}: weights {} need a scale beyond the range of {}",
                              quote_name(name), where, dtype_name(grid.scale_dtype)));
  }
  RoundedLinear rounded;
  rounded.tensors = pack_awq_gemm(k, n, grid.group_size, out.codes.data(), out.zeros.data(),
                                  out.scales.data(), grid.scale_dtype);
  for (const double part : out.signal) rounded.signal += part;
  for (const double part : out.noise) rounded.noise += part;
  return rounded;
}

}  // namespace nibble::awq
