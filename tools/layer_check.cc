#include "layer_check.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/cpu_features.h"
#include "base/thread_pool.h"
#include "baseline.h"
#include "gemm/cpu/packed_weights.h"
#include "gemm/ref.h"
#include "oracle_check.h"
#include "timing.h"

namespace nibble {
namespace {

// Below this the weights are not those of the reference checkpoint at all. Round-to-nearest to 4
// bits gives about 20 dB.
constexpr double kSameWeightsDb = 6.0;
// Fitting factors to weights that have none folded in gains hundredths of a dB.
constexpr double kFoldedGainDb = 1.0;

std::vector<double> widen(const std::vector<float>& values) {
  return {values.begin(), values.end()};
}

/// x * W^T + bias in double with W (n, k) given as float: the FP16 reference.
std::vector<double> multiply_dense(const std::vector<float>& weight, int64_t n, int64_t k,
                                   const std::vector<float>& x, int64_t rows,
                                   const std::vector<float>& bias) {
  std::vector<double> y(static_cast<size_t>(rows * n));
  parallel_for(available_cpus(), n, [&](int64_t column) {
    for (int64_t row = 0; row < rows; ++row) {
      double sum[4] = {};  // four chains, in a fixed order
      const float* w = &weight[column * k];
      const float* v = &x[row * k];
      int64_t i = 0;
      for (; i + 4 <= k; i += 4) {
        for (int j = 0; j < 4; ++j) sum[j] += static_cast<double>(w[i + j]) * v[i + j];
      }
      for (; i < k; ++i) sum[0] += static_cast<double>(w[i]) * v[i];
      y[row * n + column] = sum[0] + sum[1] + sum[2] + sum[3] + (bias.empty() ? 0.0 : bias[column]);
    }
  });
  return y;
}

/// Dequantized weights (n, k), exact.
std::vector<float> dequantize_rows(const ref::Weights& w) {
  std::vector<float> full(static_cast<size_t>(w.n * w.k));
  parallel_for(available_cpus(), w.n, [&](int64_t n) {
    for (int64_t k = 0; k < w.k; ++k) {
      const int64_t at = n * w.groups + k / w.group_size;
      full[n * w.k + k] = static_cast<float>(w.codes[n * w.k + k] - w.zeros[at]) * w.scales[at];
    }
  });
  return full;
}

std::vector<float> dense_values(const TensorView& tensor) {
  const Dtype dtype = *float_dtype(tensor.dtype);
  std::vector<float> values(static_cast<size_t>(tensor.elements()));
  constexpr int64_t kRun = 1 << 16;
  const int64_t count = tensor.elements();
  parallel_for(available_cpus(), (count + kRun - 1) / kRun, [&](int64_t run) {
    for (int64_t i = run * kRun; i < std::min(count, (run + 1) * kRun); ++i) {
      values[i] = load_as_float(tensor.data, i, dtype);
    }
  });
  return values;
}

Granularity granularity_of(const std::string& layer, Mode mode, const ActivationChoice& choice) {
  if (!choice.mix) return choice.granularity;
  // int4 codes need a scale per group in any layer; the outputs of attention and of the gated MLP
  // are what AWQ could not smooth
  const bool rough = layer.ends_with("down_proj") || layer.ends_with("o_proj");
  return mode == Mode::w4a4 || rough ? Granularity::group : Granularity::token;
}

bool is_static(Granularity granularity) {
  return granularity == Granularity::static_tensor || granularity == Granularity::static_group;
}

/// Everything about one layer that its modes share.
struct Context {
  const LayerToCheck& layer;
  const CheckOptions& options;
  ref::Weights reference;
  PackedWeights packed;
  std::vector<uint16_t> x16;  // input rounded to f16, as a model would pass it
  std::vector<float> x;       // the same values
  std::vector<double> exact;  // fp64 of the same 4-bit weights
  std::vector<double> fp16;   // the FP16 model's result
  std::vector<double> w4a16;  // our W4A16 kernel's result
  std::vector<std::unique_ptr<Baseline>> baselines;
};

/// One mode, planned and runnable any number of times.
struct ModeRun {
  Plan plan;
  AlignedBuffer workspace;
  std::vector<float> y;
  std::vector<float> static_scales;
  GemmInput input;
  GemmTarget target;

  Status operator()() { return run_gemm(plan, input, {&target, 1}, workspace.data()); }
};

/// Static scales as calibration would find them: the largest magnitude over other rows.
std::vector<float> calibrate(const Context& c, const Problem& p) {
  const int64_t groups = p.k / p.group_size, rows = 64;
  const std::vector<float> sample = make_input(c.options.input, rows, p.k, c.options.seed + 1);
  std::vector<float> amax(static_cast<size_t>(groups), 1e-6f);
  for (int64_t i = 0; i < rows * p.k; ++i) {
    float& largest = amax[i % p.k / p.group_size];
    largest = std::max(largest, std::fabs(sample[i]));
  }
  const float limit = p.mode == Mode::w4a4 ? 7.0f : 127.0f;
  for (float& scale : amax) scale /= limit;
  if (p.granularity == Granularity::static_group) return amax;
  return {*std::max_element(amax.begin(), amax.end())};
}

Status prepare(const Context& c, Mode mode, ModeRun& run) {
  Problem p;
  p.m = c.options.rows;
  p.n = c.packed.n;
  p.k = c.packed.k;
  p.group_size = c.packed.group_size;
  p.mode = mode;
  p.x_dtype = Dtype::f16;
  p.y_dtype = Dtype::f32;
  p.granularity = granularity_of(c.layer.name, mode, c.options.activations);
  p.symmetric = mode != Mode::w4a4 || is_static(p.granularity);
  Result<Plan> plan = plan_gemm(p, nullptr, c.options.threads);
  if (!plan.ok()) return plan.status();
  run.plan = *plan;
  Result<AlignedBuffer> workspace = AlignedBuffer::zeroed(plan->workspace_bytes);
  if (!workspace.ok()) return workspace.status();
  run.workspace = std::move(*workspace);
  run.y.assign(static_cast<size_t>(p.m * p.n), std::numeric_limits<float>::quiet_NaN());
  if (is_static(p.granularity) && mode != Mode::w4a16) run.static_scales = calibrate(c, p);
  run.input.x = c.x16.data();
  run.input.x_stride = p.k;
  run.input.static_scales = run.static_scales.empty() ? nullptr : run.static_scales.data();
  run.target = {&c.packed, run.y.data(), p.n, nullptr};
  return {};
}

/// Outputs, and in integer modes all sums, of some rows, bit for bit.
void compare_with_oracle(const Context& c, ModeRun& run, ModeResult& result) {
  const Problem& p = run.plan.problem;
  std::vector<int32_t> partials;
  if (p.mode != Mode::w4a16) {
    partials.resize(static_cast<size_t>(p.m * c.packed.groups * p.n));
    run.target.partials = partials.data();
  }
  const Status status = run();
  run.target.partials = nullptr;
  if (!status.ok()) {
    result.failures.push_back(status.message());
    return;
  }
  const FinishedRun finished{p, run.input, run.y.data(),
                             partials.empty() ? nullptr : partials.data()};
  const float* bias = c.layer.bias.empty() ? nullptr : c.layer.bias.data();
  const std::string difference = first_difference(finished, c.reference, bias, kOracleRows);
  if (!difference.empty()) result.failures.push_back(difference);
}

void measure_error(const Context& c, const ModeRun& run, ModeResult& result) {
  const std::vector<double> y = widen(run.y);
  for (size_t i = 0; i < y.size(); ++i) {
    if (std::isfinite(y[i])) continue;
    result.failures.push_back(fmt::format("output of row {}, column {} is {}",
                                          static_cast<int64_t>(i) / c.packed.n,
                                          static_cast<int64_t>(i) % c.packed.n, y[i]));
    return;
  }
  result.snr_vs_fp16 = snr_db(c.fp16, y);
  result.snr_vs_w4a16 = snr_db(c.w4a16, y);
  result.snr_vs_exact = snr_db(c.exact, y);
  double signal = 0, noise = 0, largest = 0, dot = 0, norm = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    const double error = y[i] - c.fp16[i];
    signal += c.fp16[i] * c.fp16[i];
    noise += error * error;
    largest = std::max(largest, std::fabs(error));
    dot += y[i] * c.fp16[i];
    norm += y[i] * y[i];
  }
  result.rel_err = signal > 0 ? std::sqrt(noise / signal) : 0;
  result.max_err = signal > 0 ? largest / std::sqrt(signal / static_cast<double>(y.size())) : 0;
  result.cosine = signal > 0 && norm > 0 ? dot / std::sqrt(signal * norm) : 0;
}

/// All modes and all baselines in turn, weights cold.
void time_modes(Context& c, std::vector<ModeRun>& runs, LayerResult& result) {
  std::vector<Contender> contenders;
  for (size_t i = 0; i < runs.size(); ++i) {
    contenders.push_back(
        {mode_name(runs[i].plan.problem.mode),
         [&c] { flush_from_caches(c.packed.storage.data(), c.packed.storage.bytes()); },
         [&runs, &result, i] {
           const Status status = runs[i]();
           if (!status.ok()) result.modes[i].failures.push_back(status.message());
         },
         {}});
  }
  for (const auto& baseline : c.baselines) {
    contenders.push_back({baseline->name(),
                          [&baseline] { baseline->flush_weight(); },
                          [&baseline] {
                            baseline->dequantize();
                            baseline->multiply();
                          },
                          {}});
  }
  time_interleaved(contenders, {.threads = runs.empty() ? 1 : runs[0].plan.threads,
                                .min_rounds = 5,
                                .seconds = c.options.seconds_per_layer});
  const Contender* best = nullptr;
  for (size_t i = runs.size(); i < contenders.size(); ++i) {
    if (best == nullptr || contenders[i].samples.median() < best->samples.median()) {
      best = &contenders[i];
    }
  }
  for (size_t i = 0; i < runs.size(); ++i) {
    result.modes[i].us_median = contenders[i].samples.median();
    result.modes[i].us_min = contenders[i].samples.min();
    if (best == nullptr) continue;
    result.modes[i].baseline = best->name;
    result.modes[i].baseline_us_median = best->samples.median();
  }
}

void check_values(const Context& c, LayerResult& result) {
  const ValueReport report = inspect_values(*c.layer.matrix);
  if (report.non_finite_scales > 0) {
    result.failures.push_back(fmt::format("{} scales are NaN or infinite, first at {}",
                                          report.non_finite_scales, report.first_non_finite));
  }
  if (report.negative_scales > 0) {
    result.notes.push_back(fmt::format("{} negative scales", report.negative_scales));
  }
  if (report.subnormal_scales > 0) {
    result.notes.push_back(fmt::format("{} subnormal scales", report.subnormal_scales));
  }
  result.symmetric = report.zero_point_min == 8 && report.zero_point_max == 8;
  if (report.zero_point_min == 7 && report.zero_point_max == 7) {
    result.notes.push_back("every zero point is 7: GPTQ files store 8 like this");
  }
}

/// AWQ folds scales into its neighbours: a quantized weight is then diag(b) W diag(a) of the
/// original (n, k) W. Multiplies W with the factors that fit `folded` best (alternating least
/// squares); they are n + k numbers against n * k, so next to nothing of the quantization error
/// goes into them.
void fit_folded_scales(const std::vector<float>& folded, int64_t n, int64_t k,
                       std::vector<float>& weight) {
  std::vector<double> a(static_cast<size_t>(k), 1.0), b(static_cast<size_t>(n), 1.0);
  for (int round = 0; round < 4; ++round) {
    parallel_for(available_cpus(), n, [&](int64_t row) {
      double cross = 0, square = 0;
      for (int64_t i = 0; i < k; ++i) {
        const double w = a[i] * weight[row * k + i];
        cross += w * folded[row * k + i];
        square += w * w;
      }
      if (square > 0) b[row] = cross / square;
    });
    parallel_for(available_cpus(), k, [&](int64_t i) {
      double cross = 0, square = 0;
      for (int64_t row = 0; row < n; ++row) {
        const double w = b[row] * weight[row * k + i];
        cross += w * folded[row * k + i];
        square += w * w;
      }
      if (square > 0) a[i] = cross / square;
    });
  }
  for (int64_t i = 0; i < n * k; ++i) {
    weight[i] = static_cast<float>(b[i / k] * a[i % k] * weight[i]);
  }
}

/// The FP16 model: the original weights if given, else the dequantized ones rounded to fp16.
Status make_references(Context& c, LayerResult& result) {
  std::vector<float> full = dequantize_rows(c.reference);
  const float* bias = c.layer.bias.empty() ? nullptr : c.layer.bias.data();
  c.exact = ref::multiply_fp64(c.reference, c.x.data(), c.options.rows, bias);
  if (c.layer.dense != nullptr) {
    std::vector<float> dense = dense_values(*c.layer.dense);
    if (dense.size() != full.size()) {
      return Status(Code::corrupt_file,
                    fmt::format("{}: the reference weight has shape {}, expected [{}, {}]",
                                c.layer.name, c.layer.dense->shape_text(), c.packed.n, c.packed.k));
    }
    result.weight_snr = snr_db(widen(dense), widen(full));
    std::vector<float> scaled = dense;
    fit_folded_scales(full, c.packed.n, c.packed.k, scaled);
    const double scaled_snr = snr_db(widen(scaled), widen(full));
    if (scaled_snr > result.weight_snr + kFoldedGainDb) {
      result.weight_snr = scaled_snr;
      dense = std::move(scaled);
      result.notes.push_back(
          "AWQ scales are folded in: the reference weight is compared times the input and output "
          "factors that fit best");
    }
    if (!(result.weight_snr >= kSameWeightsDb)) {
      result.failures.push_back(fmt::format("dequantized weights do not match the reference: {} dB",
                                            decibels(result.weight_snr)));
    }
    full = dense;
  } else {
    for (float& w : full) w = float_from_f16(f16_from_float(w));
  }
  c.fp16 = multiply_dense(full, c.packed.n, c.packed.k, c.x, c.options.rows, c.layer.bias);
  return {};
}

std::string activation_text(const Problem& p) {
  if (p.mode == Mode::w4a16) return dtype_name(p.x_dtype);
  return fmt::format("{}{}", granularity_name(p.granularity), p.symmetric ? "" : "-asym");
}

}  // namespace

std::optional<double> snr_gate(Mode mode, Granularity granularity, InputKind input) {
  if (mode == Mode::w4a16) return 45.0;
  // int8 on normal input; int4 is reported, not gated, and outliers are shown, not judged
  if (mode != Mode::w4a8 || input != InputKind::normal) return std::nullopt;
  switch (granularity) {
    case Granularity::group: return 34.0;
    case Granularity::token: return 28.0;
    default: return std::nullopt;
  }
}

void check_gate(const Problem& p, InputKind input, ModeResult& result) {
  const double snr = p.mode == Mode::w4a16 ? result.snr_vs_exact : result.snr_vs_w4a16;
  const auto gate = snr_gate(p.mode, p.granularity, input);
  if (gate.has_value() && !(snr >= *gate)) {
    result.failures.push_back(fmt::format("SNR {} dB is below {:.0f} dB", decibels(snr), *gate));
  }
}

double snr_db(const std::vector<double>& reference, const std::vector<double>& value) {
  double signal = 0, noise = 0;
  for (size_t i = 0; i < reference.size(); ++i) {
    const double error = value[i] - reference[i];
    signal += reference[i] * reference[i];
    noise += error * error;
  }
  if (noise == 0) return std::numeric_limits<double>::infinity();
  return 10.0 * std::log10(signal / noise);
}

std::string decibels(double snr) {
  return std::isinf(snr) && snr > 0 ? "inf" : fmt::format("{:.1f}", snr);
}

Result<LayerResult> check_layer(const LayerToCheck& layer, const CheckOptions& options) {
  if (layer.matrix->n % 8 != 0) {
    return Status(Code::unsupported,
                  fmt::format("{}: N = {} is not a multiple of 8", layer.name, layer.matrix->n));
  }
  LayerResult result;
  result.name = layer.name;
  result.k = layer.matrix->k;
  result.n = layer.matrix->n;
  result.group_size = layer.matrix->group_size;
  result.scale_dtype = layer.matrix->scale_dtype;
  Context c{layer, options, ref::unpack(*layer.matrix), {}, {}, {}, {}, {}, {}, {}};
  check_values(c, result);
  if (!result.failures.empty()) return result;
  const void* bias = layer.bias.empty() ? nullptr : layer.bias.data();
  Result<PackedWeights> packed = pack_weights(*layer.matrix, bias, Dtype::f32, options.threads);
  if (!packed.ok()) return packed.status();
  c.packed = std::move(*packed);
  for (const float value : make_input(options.input, options.rows, result.k, options.seed)) {
    c.x16.push_back(f16_from_float(value));
    c.x.push_back(float_from_f16(c.x16.back()));
  }
  NIBBLE_TRY(make_references(c, result));

  // W4A16 always runs: the other modes are measured against it.
  ModeRun reference_run;
  NIBBLE_TRY(prepare(c, Mode::w4a16, reference_run));
  NIBBLE_TRY(reference_run());
  c.w4a16 = widen(reference_run.y);

  std::vector<ModeRun> runs(options.modes.size());
  for (size_t i = 0; i < runs.size(); ++i) {
    NIBBLE_TRY(prepare(c, options.modes[i], runs[i]));
    ModeResult mode;
    mode.mode = options.modes[i];
    mode.kernel = runs[i].plan.kernel_name();
    mode.activation = activation_text(runs[i].plan.problem);
    compare_with_oracle(c, runs[i], mode);
    measure_error(c, runs[i], mode);
    if (mode.failures.empty()) check_gate(runs[i].plan.problem, options.input, mode);
    result.modes.push_back(std::move(mode));
  }
  if (options.timing) {
    const AwqTensors file_layout = to_awq_gemm(*layer.matrix);
    const int threads = options.threads > 0 ? options.threads : available_cpus();
    c.baselines = make_baselines(file_layout, c.x.data(), options.rows, threads);
    time_modes(c, runs, result);
    c.baselines.clear();
  }
  return result;
}

nlohmann::json to_json(const LayerResult& result) {
  // JSON has no infinity: equal results are null
  const auto db = [](double snr) {
    return std::isfinite(snr) ? nlohmann::json(snr) : nlohmann::json(nullptr);
  };
  nlohmann::json modes = nlohmann::json::object();
  for (const ModeResult& mode : result.modes) {
    modes[mode_name(mode.mode)] = {{"kernel", mode.kernel},
                                   {"activation", mode.activation},
                                   {"snr_db_vs_fp16", db(mode.snr_vs_fp16)},
                                   {"snr_db_vs_w4a16", db(mode.snr_vs_w4a16)},
                                   {"snr_db_vs_exact", db(mode.snr_vs_exact)},
                                   {"rel_err", mode.rel_err},
                                   {"max_err", mode.max_err},
                                   {"cosine", mode.cosine},
                                   {"us_median", mode.us_median},
                                   {"us_min", mode.us_min},
                                   {"dequant_matmul", mode.baseline},
                                   {"dequant_matmul_us_median", mode.baseline_us_median},
                                   {"speedup", mode.speedup()},
                                   {"passed", mode.failures.empty()},
                                   {"failures", mode.failures}};
  }
  return {{"name", result.name},
          {"k", result.k},
          {"n", result.n},
          {"group_size", result.group_size},
          {"symmetric", result.symmetric},
          {"scale_dtype", dtype_name(result.scale_dtype)},
          {"weight_snr_db", db(result.weight_snr)},
          {"notes", result.notes},
          {"failures", result.failures},
          {"modes", modes}};
}

}  // namespace nibble
