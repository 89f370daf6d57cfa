// What the inputs of a model's linears look like on a text, per layer and slot: how large each
// channel, each K-group and each token is, and how far 4-bit codes should be clipped. From it come
// static activation scales, clip ratios and the automatic plan.
//
// Statistics add up exactly. Each call of add() sums its rows in double, in their order, rounds
// that sum once to a fixed grid (2^-60; 2^-40 for fourth powers), and adds it to an integer of 128
// bits. So a merge of two runs has the same bits as one run over both texts, in any order, as long
// as the calls are the same ones; counts, minima and maxima are exact anyway.
//
// On disk: a safetensors file, tensors "nibble.calibration.layers.<i>.<slot>.<what>", sums as F64
// (2, ...): row 0 the sum, row 1 what it lacks. Not here: running the model (tools/calibrate.cc).
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "format/checkpoint.h"
#include "model/linear.h"

namespace nibble {

/// A sum of doubles on the grid 2^-kFraction. Beyond +-2^(126 - kFraction) it stays there.
template <int kFraction>
struct ExactSum {
  __extension__ __int128 units = 0;

  void add(double value);
  void add(const ExactSum& other);
  double value() const;      // rounded once
  double remainder() const;  // what value() lacks; exact while |sum| < 2^(106 - kFraction)
  /// False if the two are not what value() and remainder() gave.
  bool set(double value, double remainder);
  bool operator==(const ExactSum&) const = default;
};
using Sum = ExactSum<60>;
using FourthPowerSum = ExactSum<40>;

/// Counts of positive floats in bins of fixed edges, 8 an octave from 2^-20 to 2^20: a quantile is
/// known within 12.5 %. What is smaller or larger counts in the outermost bins.
inline constexpr int kHistogramBins = 320;
int histogram_bin(float value);       // value >= 0
float histogram_upper_edge(int bin);  // no value of the bin is larger, but for the last bin
/// The upper edge of the bin in which `quantile` (0..1) of all counts is reached; 0 if there are
/// none.
float histogram_quantile(std::span<const uint64_t> bins, double quantile);

/// Clip ratios that are tried for w4a4 per group: 0.85, 0.86, ..., 1.
inline constexpr int kClipRatios = 16;
inline float clip_ratio(int index) { return static_cast<float>(85 + index) / 100.0f; }

struct SlotStatistics {
  int64_t channels = 0, group_size = 0;
  uint64_t tokens = 0;
  std::vector<Sum> sum_abs, sum_squares;         // (channels)
  std::vector<float> max_abs, minimum, maximum;  // (channels)
  FourthPowerSum sum_fourth;                     // of all elements
  Sum sum_token_amax;
  std::vector<Sum> sum_group_amax;   // (groups)
  std::vector<uint64_t> token_amax;  // (kHistogramBins) tokens by their largest |x|
  std::vector<uint64_t> group_amax;  // (groups, kHistogramBins)
  // Squared error of w4a4 per group with zero points, on rows picked evenly from each call.
  std::vector<Sum> clip_error;  // (kClipRatios)
  uint64_t clip_rows = 0;

  SlotStatistics() = default;
  SlotStatistics(int64_t channels, int64_t group_size);
  int64_t groups() const { return channels / group_size; }
  bool operator==(const SlotStatistics&) const = default;
};

/// A few numbers of one slot, for people.
struct SlotSummary {
  float amax = 0;          // largest |x|
  float token_median = 0;  // of the tokens' largest |x|
  float token_p99 = 0;
  double channel_ratio = 0;  // largest channel maximum over the median one: fixed outlier channels
  double kurtosis = 0;       // E[x^4] / E[x^2]^2: 3 for a Gaussian
  float clip = 1;            // best of the clip ratios
};
SlotSummary summarize(const SlotStatistics& statistics);
float best_clip(const SlotStatistics& statistics);

/// Scales for LinearSpec::static_scales: the `percentile` (0..100; 100: the maximum) of the tokens'
/// largest |x|, of all of K or per group, over the largest code of `mode`. invalid_argument for
/// w4a16, for another granularity, or if nothing was counted.
Result<std::vector<float>> static_scales(const SlotStatistics& statistics, Mode mode,
                                         Granularity granularity, double percentile);

/// A text whose first chunks are counted.
struct CalibrationText {
  std::string name, digest;  // SHA-256 of its bytes
  int64_t context = 0;       // tokens a chunk
  int64_t chunks_done = 0, chunks_total = 0;
  bool operator==(const CalibrationText&) const = default;
};

class Calibration {
 public:
  /// slots: layers * kSlots, with their shapes and no counts.
  Calibration(std::string model_digest, std::vector<SlotStatistics> slots);

  /// Counts x (rows, k) row-major, the input of one slot. invalid_argument if k is not the slot's;
  /// non_finite names the place, and the statistics are then to be thrown away.
  Status add(int64_t layer, Slot slot, const float* x, int64_t rows, int64_t k, int threads);

  /// Adds another run on the same model. invalid_argument, and nothing added, if the model or a
  /// shape differs, or a text is in both.
  Status merge(const Calibration& other);

  Status save(const std::string& path) const;
  /// corrupt_file names what is wrong; invalid_argument for a safetensors file of another kind.
  static Result<Calibration> load(const std::string& path);

  const std::string& model_digest() const { return model_digest_; }
  int64_t layers() const { return static_cast<int64_t>(slots_.size()) / kSlots; }
  const SlotStatistics& at(int64_t layer, Slot slot) const {
    return slots_[static_cast<size_t>(layer * kSlots + static_cast<int>(slot))];
  }
  uint64_t tokens() const;
  const std::vector<CalibrationText>& texts() const { return texts_; }
  /// The entry of a text, made if there is none; the order stays that of the digests.
  CalibrationText& text(const std::string& digest);
  bool operator==(const Calibration&) const = default;

 private:
  std::string model_digest_;
  std::vector<CalibrationText> texts_;  // by digest
  std::vector<SlotStatistics> slots_;
};

/// SHA-256 over name, dtype, shape and the first and last 4 KiB of every tensor: tells models apart
/// without reading all of them. Does not see config.json, so a plan does not change it.
std::string model_digest(const Checkpoint& checkpoint);

}  // namespace nibble
