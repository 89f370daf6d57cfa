#include "model/calibration.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "base/sha256.h"
#include "base/thread_pool.h"
#include "format/message.h"

namespace nibble {
namespace {

constexpr int64_t kClipRows = 8;  // of each call
constexpr int kBinsPerOctave = 8;
// Bits of 2^-20, without the 20 mantissa bits below an eighth of an octave.
constexpr uint32_t kFirstBin = std::bit_cast<uint32_t>(0x1p-20f) >> 20;
static_assert(kHistogramBins == 40 * kBinsPerOctave);

using Wide = __int128;

size_t at_index(int64_t index) { return static_cast<size_t>(index); }

// ---- counting one call -------------------------------------------------------------------------

/// Sums of one call for the channels of one group, in double and in the order of the rows.
struct GroupSums {
  std::vector<double> abs, squares, fourth;
  double amax = 0;
  explicit GroupSums(int64_t size)
      : abs(at_index(size)), squares(at_index(size)), fourth(at_index(size)) {}
};

/// Counts the columns of one group of x into `s`, except fourth powers, which the caller gets. amax
/// (rows) gets each row's largest |x|. Returns the row of the first NaN or infinity, or -1.
int64_t count_group(SlotStatistics& s, int64_t group, const float* x, int64_t rows, float* amax,
                    double* fourth) {
  const int64_t size = s.group_size, first = group * size;
  GroupSums sums(size);
  uint64_t* const bins = s.group_amax.data() + group * kHistogramBins;
  for (int64_t r = 0; r < rows; ++r) {
    const float* const row = x + r * s.channels + first;
    float largest = 0;
    bool finite = true;
    for (int64_t c = 0; c < size; ++c) {
      const float a = std::fabs(row[c]);
      finite = finite && a <= std::numeric_limits<float>::max();
      largest = std::max(largest, a);
      const double square = static_cast<double>(a) * a;
      sums.abs[at_index(c)] += a;
      sums.squares[at_index(c)] += square;
      sums.fourth[at_index(c)] += square * square;
      s.max_abs[at_index(first + c)] = std::max(s.max_abs[at_index(first + c)], a);
      s.minimum[at_index(first + c)] = std::min(s.minimum[at_index(first + c)], row[c]);
      s.maximum[at_index(first + c)] = std::max(s.maximum[at_index(first + c)], row[c]);
    }
    if (!finite) return r;
    amax[r] = largest;
    sums.amax += largest;
    ++bins[histogram_bin(largest)];
  }
  for (int64_t c = 0; c < size; ++c) {
    s.sum_abs[at_index(first + c)].add(sums.abs[at_index(c)]);
    s.sum_squares[at_index(first + c)].add(sums.squares[at_index(c)]);
    *fourth += sums.fourth[at_index(c)];
  }
  s.sum_group_amax[at_index(group)].add(sums.amax);
  return -1;
}

/// Adds the squared error of every clip ratio on a few rows, through the real quantizer.
Status count_clip_errors(SlotStatistics& s, const float* x, int64_t rows) {
  const int64_t picked = std::min(rows, kClipRows);
  std::vector<float> sample;
  for (int64_t i = 0; i < picked; ++i) {
    // The middles of equal parts: the first token of a chunk, unlike all others, is left out.
    const float* const row = x + (2 * i + 1) * rows / (2 * picked) * s.channels;
    sample.insert(sample.end(), row, row + s.channels);
  }
  const Problem problem{.m = picked,
                        .n = 32,  // of no product
                        .k = s.channels,
                        .group_size = s.group_size,
                        .mode = Mode::w4a4,
                        .granularity = Granularity::group,
                        .symmetric = false};
  const Result<Plan> plan = plan_gemm(problem, nullptr, 1);
  if (!plan.ok()) return plan.status();
  std::vector<int8_t> codes(sample.size());
  std::vector<float> scales(at_index(picked * s.groups()));
  for (int ratio = 0; ratio < kClipRatios; ++ratio) {
    GemmInput input;
    input.x = sample.data();
    input.x_stride = s.channels;
    input.clip = clip_ratio(ratio);
    NIBBLE_TRY(quantize_activations(*plan, input, codes.data(), scales.data(), nullptr));
    double error = 0;
    for (size_t i = 0; i < sample.size(); ++i) {
      const double back = static_cast<double>(codes[i]) * scales[i / at_index(s.group_size)];
      error += (sample[i] - back) * (sample[i] - back);
    }
    s.clip_error[at_index(ratio)].add(error);
  }
  s.clip_rows += static_cast<uint64_t>(picked);
  return {};
}

// ---- merging -----------------------------------------------------------------------------------

template <class T, class Combine>
void combine(std::vector<T>& to, const std::vector<T>& from, Combine&& function) {
  for (size_t i = 0; i < to.size(); ++i) function(to[i], from[i]);
}

void merge_slot(SlotStatistics& to, const SlotStatistics& from) {
  const auto add_sum = [](auto& a, const auto& b) { a.add(b); };
  const auto add_count = [](uint64_t& a, uint64_t b) { a += b; };
  to.tokens += from.tokens;
  to.clip_rows += from.clip_rows;
  combine(to.sum_abs, from.sum_abs, add_sum);
  combine(to.sum_squares, from.sum_squares, add_sum);
  combine(to.sum_group_amax, from.sum_group_amax, add_sum);
  combine(to.clip_error, from.clip_error, add_sum);
  to.sum_fourth.add(from.sum_fourth);
  to.sum_token_amax.add(from.sum_token_amax);
  combine(to.token_amax, from.token_amax, add_count);
  combine(to.group_amax, from.group_amax, add_count);
  combine(to.max_abs, from.max_abs, [](float& a, float b) { a = std::max(a, b); });
  combine(to.minimum, from.minimum, [](float& a, float b) { a = std::min(a, b); });
  combine(to.maximum, from.maximum, [](float& a, float b) { a = std::max(a, b); });
}

double median(std::vector<float> values) {
  if (values.empty()) return 0;
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace

// ---- exact sums --------------------------------------------------------------------------------

template <int kFraction>
void ExactSum<kFraction>::add(double value) {
  // Far from the end of the range, so that the conversion is defined.
  const double scaled = std::clamp(std::nearbyint(std::ldexp(value, kFraction)), -0x1p125, 0x1p125);
  add(ExactSum{static_cast<Wide>(scaled)});
}

template <int kFraction>
void ExactSum<kFraction>::add(const ExactSum& other) {
  constexpr Wide kMost = Wide{1} << 126;
  Wide sum = 0;
  if (__builtin_add_overflow(units, other.units, &sum)) sum = other.units > 0 ? kMost : -kMost;
  units = std::clamp(sum, -kMost, kMost);
}

template <int kFraction>
double ExactSum<kFraction>::value() const {
  return std::ldexp(static_cast<double>(units), -kFraction);
}

template <int kFraction>
double ExactSum<kFraction>::remainder() const {
  const auto rounded = static_cast<Wide>(static_cast<double>(units));  // at most 2^126: it fits
  return std::ldexp(static_cast<double>(units - rounded), -kFraction);
}

template <int kFraction>
bool ExactSum<kFraction>::set(double value, double remainder) {
  const double whole = std::ldexp(value, kFraction), rest = std::ldexp(remainder, kFraction);
  if (!(std::fabs(whole) <= 0x1p126) || !(std::fabs(rest) <= 0x1p74)) return false;
  if (whole != std::nearbyint(whole) || rest != std::nearbyint(rest)) return false;
  units = static_cast<Wide>(whole) + static_cast<Wide>(rest);
  return this->value() == value;
}

template struct ExactSum<60>;
template struct ExactSum<40>;

// ---- histograms --------------------------------------------------------------------------------

int histogram_bin(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value) >> 20;  // exponent and 3 mantissa bits
  return std::clamp(static_cast<int>(bits) - static_cast<int>(kFirstBin), 0, kHistogramBins - 1);
}

float histogram_upper_edge(int bin) {
  return std::bit_cast<float>((kFirstBin + static_cast<uint32_t>(bin) + 1) << 20);
}

float histogram_quantile(std::span<const uint64_t> bins, double quantile) {
  uint64_t count = 0;
  for (const uint64_t bin : bins) count += bin;
  if (count == 0) return 0;
  const double wanted = std::max(1.0, std::ceil(quantile * static_cast<double>(count)));
  double seen = 0;
  for (size_t i = 0; i < bins.size(); ++i) {
    seen += static_cast<double>(bins[i]);
    if (seen >= wanted) return histogram_upper_edge(static_cast<int>(i));
  }
  return histogram_upper_edge(static_cast<int>(bins.size()) - 1);
}

// ---- one slot ----------------------------------------------------------------------------------

SlotStatistics::SlotStatistics(int64_t channel_count, int64_t size)
    : channels(channel_count),
      group_size(size),
      sum_abs(at_index(channels)),
      sum_squares(at_index(channels)),
      max_abs(at_index(channels)),
      minimum(at_index(channels), std::numeric_limits<float>::max()),
      maximum(at_index(channels), std::numeric_limits<float>::lowest()),
      sum_group_amax(at_index(groups())),
      token_amax(kHistogramBins),
      group_amax(at_index(groups() * kHistogramBins)),
      clip_error(kClipRatios) {}

float best_clip(const SlotStatistics& statistics) {
  int best = kClipRatios - 1;  // ties keep the range whole
  for (int i = kClipRatios - 2; i >= 0; --i) {
    const auto& error = statistics.clip_error;
    if (error[at_index(i)].units < error[at_index(best)].units) best = i;
  }
  return clip_ratio(best);
}

SlotSummary summarize(const SlotStatistics& s) {
  SlotSummary summary;
  if (s.tokens == 0) return summary;
  summary.amax = *std::max_element(s.max_abs.begin(), s.max_abs.end());
  summary.token_median = std::min(summary.amax, histogram_quantile(s.token_amax, 0.5));
  summary.token_p99 = std::min(summary.amax, histogram_quantile(s.token_amax, 0.99));
  const double middle = median(s.max_abs);
  summary.channel_ratio = middle > 0 ? summary.amax / middle : 0;
  double squares = 0;
  for (const Sum& sum : s.sum_squares) squares += sum.value();
  const double elements = static_cast<double>(s.tokens) * static_cast<double>(s.channels);
  const double variance = squares / elements;
  summary.kurtosis = variance > 0 ? s.sum_fourth.value() / elements / (variance * variance) : 0;
  summary.clip = best_clip(s);
  return summary;
}

Result<std::vector<float>> static_scales(const SlotStatistics& s, Mode mode,
                                         Granularity granularity, double percentile) {
  const bool whole = granularity == Granularity::static_tensor;
  if (mode == Mode::w4a16 || (!whole && granularity != Granularity::static_group)) {
    return Status(Code::invalid_argument,
                  fmt::format("static scales: expected w4a8 or w4a4 and static-tensor or "
                              "static-group, found {} {}",
                              mode_name(mode), granularity_name(granularity)));
  }
  if (s.tokens == 0 || !(percentile > 0 && percentile <= 100)) {
    return Status(Code::invalid_argument,
                  fmt::format("static scales: expected counted tokens and a percentile in (0, 100],"
                              " found {} and {}",
                              s.tokens, percentile));
  }
  const float codes = mode == Mode::w4a8 ? 127.0f : 7.0f;
  const int64_t count = whole ? 1 : s.groups();
  const auto size = static_cast<std::ptrdiff_t>(s.channels / count);
  std::vector<float> scales;
  for (int64_t i = 0; i < count; ++i) {
    const auto first = s.max_abs.begin() + i * size;
    float range = *std::max_element(first, first + size);
    if (percentile < 100) {
      const std::span<const uint64_t> bins = whole ? s.token_amax : s.group_amax;
      range = std::min(
          range, histogram_quantile(bins.subspan(at_index(i * kHistogramBins), kHistogramBins),
                                    percentile / 100));
    }
    // A group that is always 0 still needs a scale that can be divided by.
    scales.push_back(std::max(range, 0x1p-20f) / codes);
  }
  return scales;
}

// ---- the whole model ---------------------------------------------------------------------------

Calibration::Calibration(std::string digest, std::vector<SlotStatistics> slots)
    : model_digest_(std::move(digest)), slots_(std::move(slots)) {}

Status Calibration::add(int64_t layer, Slot slot, const float* x, int64_t rows, int64_t k,
                        int threads) {
  SlotStatistics& s = slots_[at_index(layer * kSlots + static_cast<int>(slot))];
  const std::string place = fmt::format("calibration: layer {}, {}", layer, slot_name(slot));
  if (k != s.channels) {
    return Status(Code::invalid_argument,
                  fmt::format("{}: expected {} channels, found {}", place, s.channels, k));
  }
  if (rows <= 0) return {};
  const int64_t groups = s.groups();
  std::vector<float> amax(at_index(groups * rows));  // (groups, rows)
  std::vector<double> fourth(at_index(groups));
  std::vector<int64_t> bad(at_index(groups), -1);
  parallel_for(threads, groups, [&](int64_t g) {
    bad[at_index(g)] = count_group(s, g, x, rows, amax.data() + g * rows, &fourth[at_index(g)]);
  });
  for (int64_t g = 0; g < groups; ++g) {
    if (bad[at_index(g)] < 0) continue;
    return Status(Code::non_finite,
                  fmt::format("{}: NaN or infinity in row {}, channels {} to {}", place,
                              bad[at_index(g)], g * s.group_size, (g + 1) * s.group_size - 1));
  }
  double token_sum = 0, fourth_sum = 0;
  for (const double part : fourth) fourth_sum += part;
  for (int64_t r = 0; r < rows; ++r) {
    float largest = 0;
    for (int64_t g = 0; g < groups; ++g) {
      largest = std::max(largest, amax[at_index(g * rows + r)]);
    }
    token_sum += largest;
    ++s.token_amax[at_index(histogram_bin(largest))];
  }
  s.sum_fourth.add(fourth_sum);
  s.sum_token_amax.add(token_sum);
  s.tokens += static_cast<uint64_t>(rows);
  return count_clip_errors(s, x, rows);
}

Status Calibration::merge(const Calibration& other) {
  const auto refuse = [](const std::string& what) {
    return Status(Code::invalid_argument, "calibrations cannot be merged: " + what);
  };
  if (other.model_digest_ != model_digest_) {
    return refuse(fmt::format("expected the model {}, found {}", model_digest_.substr(0, 16),
                              other.model_digest_.substr(0, 16)));
  }
  if (other.slots_.size() != slots_.size()) {
    return refuse(fmt::format("expected {} layers, found {}", layers(), other.layers()));
  }
  for (size_t i = 0; i < slots_.size(); ++i) {
    const SlotStatistics &a = slots_[i], &b = other.slots_[i];
    if (a.channels == b.channels && a.group_size == b.group_size) continue;
    return refuse(
        fmt::format("layer {}, {}: expected {} channels in groups of {}, found {} in groups of {}",
                    i / kSlots, slot_name(static_cast<Slot>(i % kSlots)), a.channels, a.group_size,
                    b.channels, b.group_size));
  }
  for (const CalibrationText& text : other.texts_) {
    for (const CalibrationText& own : texts_) {
      if (own.digest != text.digest) continue;
      return refuse(fmt::format("the text {} (SHA-256 {}...) is in both, and would count twice",
                                quote_name(text.name), text.digest.substr(0, 16)));
    }
  }
  for (size_t i = 0; i < slots_.size(); ++i) merge_slot(slots_[i], other.slots_[i]);
  for (const CalibrationText& added : other.texts_) text(added.digest) = added;
  return {};
}

uint64_t Calibration::tokens() const { return slots_.empty() ? 0 : slots_.front().tokens; }

CalibrationText& Calibration::text(const std::string& digest) {
  auto at = std::lower_bound(
      texts_.begin(), texts_.end(), digest,
      [](const CalibrationText& text, const std::string& wanted) { return text.digest < wanted; });
  if (at == texts_.end() || at->digest != digest) {
    at = texts_.insert(at, CalibrationText{});
    at->digest = digest;
  }
  return *at;
}

std::string model_digest(const Checkpoint& checkpoint) {
  constexpr size_t kEnd = 4096;
  Sha256 hash;
  for (const auto& [name, tensor] : checkpoint.tensors()) {
    hash.update(
        fmt::format("{}\n{} {}\n", name, tensor_dtype_name(tensor.dtype), tensor.shape_text()));
    const size_t bytes = std::min(tensor.bytes, kEnd);
    hash.update(tensor.data, bytes);
    hash.update(tensor.data + (tensor.bytes - bytes), bytes);
  }
  return hash.finish();
}

}  // namespace nibble
