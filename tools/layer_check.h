// The central check of `nibble verify`, one layer at a time: run every mode's real kernel, prove
// the integer sums and the epilogue against the oracle, measure the error against FP16 and W4A16,
// and time it against "dequantize + matmul".
#pragma once

#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "format/linear_format.h"
#include "gemm/gemm.h"
#include "synthetic.h"

namespace nibble {

/// How activations are quantized in a mode. `mix`: per group for down_proj and o_proj, whose inputs
/// AWQ has not smoothed, per token for the rest.
struct ActivationChoice {
  bool mix = true;
  Granularity granularity = Granularity::token;  // when not mix
};

/// Rows that are compared with the oracle bit for bit, spread over the batch.
inline constexpr int64_t kOracleRows = 4;

struct CheckOptions {
  std::vector<Mode> modes = {Mode::w4a16, Mode::w4a8, Mode::w4a4};
  ActivationChoice activations;
  int64_t rows = 32;
  int threads = 0;  // <= 0: all
  uint64_t seed = 1;
  InputKind input = InputKind::normal;
  bool timing = true;
  double seconds_per_layer = 0.05;  // for timing, all modes and baselines of a layer together
};

/// One layer to check.
struct LayerToCheck {
  std::string name;
  const QuantMatrix* matrix = nullptr;
  std::vector<float> bias;            // (n) or empty
  const TensorView* dense = nullptr;  // (n, k) floats, the original weight; or null
};

struct ModeResult {
  Mode mode = Mode::w4a16;
  std::string kernel;      // the receipt: the kernel that ran
  std::string activation;  // "f16", "token", "group", "group-asym", ...
  double snr_vs_fp16 = 0, snr_vs_w4a16 = 0, snr_vs_exact = 0;  // dB; infinite if equal
  double rel_err = 0;                                          // rms error / rms of the FP16 result
  double max_err = 0;  // largest error / rms of the FP16 result
  double cosine = 0;   // against the FP16 result
  double us_median = 0, us_min = 0;
  double baseline_us_median = 0;
  std::string baseline;               // name of the best baseline, empty if none was timed
  std::vector<std::string> failures;  // empty: passed

  double speedup() const { return us_median > 0 ? baseline_us_median / us_median : 0; }
};

struct LayerResult {
  std::string name;
  int64_t k = 0, n = 0, group_size = 0;
  bool symmetric = false;
  Dtype scale_dtype = Dtype::f16;
  double weight_snr = 0;              // dequantized against `dense`, dB; 0 without one
  std::vector<std::string> notes;     // legal but worth knowing
  std::vector<std::string> failures;  // of the layer itself: NaN scales, wrong weights
  std::vector<ModeResult> modes;
};

/// Lowest SNR against W4A16 that passes on normal input; nothing for modes without a gate.
std::optional<double> snr_gate(Mode mode, Granularity granularity, InputKind input);

/// Adds a failure to `result` if its SNR is below the gate of its problem.
void check_gate(const Problem& problem, InputKind input, ModeResult& result);

Result<LayerResult> check_layer(const LayerToCheck& layer, const CheckOptions& options);

nlohmann::json to_json(const LayerResult& result);

/// "12.3", or "inf" where a result is equal to the reference.
std::string decibels(double snr);

/// Signal-to-noise ratio in dB; infinity if equal.
double snr_db(const std::vector<double>& reference, const std::vector<double>& value);

}  // namespace nibble
