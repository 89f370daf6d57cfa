// `nibble quantize --method rtn`: round to nearest, one layer at a time, so memory use is that of
// the largest layer. Not here: the arithmetic (format/round_to_nearest.h).
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/cpu_features.h"
#include "base/thread_pool.h"
#include "quantize_run.h"
#include "text.h"

namespace nibble::cli {
namespace {

using nlohmann::json;

/// Signal-to-noise ratio of the quantized weight against the original, all sums in double.
double weight_snr_db(const DenseLinear& linear, const QuantMatrix& matrix) {
  const Dtype dtype = *float_dtype(linear.weight->dtype);
  const int64_t blocks = (linear.n + kSnrColumns - 1) / kSnrColumns;
  // Per block and added up in order: the same number for any number of threads.
  std::vector<double> signal(static_cast<size_t>(blocks)), noise(signal.size());
  parallel_for(available_cpus(), blocks, [&](int64_t block) {
    const int64_t n0 = block * kSnrColumns;
    const int64_t count = std::min(kSnrColumns, linear.n - n0);
    std::vector<float> values(static_cast<size_t>(linear.k * count));
    dequantize(matrix, n0, count, values.data());
    double block_signal = 0, block_noise = 0;
    for (int64_t c = 0; c < count; ++c) {
      for (int64_t k = 0; k < linear.k; ++k) {
        const double exact = load_as_float(linear.weight->data, (n0 + c) * linear.k + k, dtype);
        const double error = exact - values[static_cast<size_t>(k * count + c)];
        block_signal += exact * exact;
        block_noise += error * error;
      }
    }
    signal[static_cast<size_t>(block)] = block_signal;
    noise[static_cast<size_t>(block)] = block_noise;
  });
  double total_signal = 0, total_noise = 0;
  for (size_t i = 0; i < signal.size(); ++i) {
    total_signal += signal[i];
    total_noise += noise[i];
  }
  if (total_noise == 0) return std::numeric_limits<double>::infinity();
  return 10 * std::log10(total_signal / total_noise);
}

Result<LayerResult> quantize_layer(const DenseLinear& linear, const QuantizeArguments& arguments,
                                   CheckpointWriter& writer) {
  const RoundToNearestOptions rounding{arguments.group_size, arguments.symmetric,
                                       arguments.scale_type()};
  const auto tensors = quantize_round_to_nearest(linear.name, *linear.weight, rounding);
  if (!tensors.ok()) return tensors.status();
  LayerResult result;
  for (const auto& [name, view] : views_of(linear.name, *tensors)) {
    NIBBLE_TRY(writer.add(name, view));
    result.bytes += view.bytes;
  }
  result.snr_db = weight_snr_db(linear, tensors->view());
  return result;
}

Status interrupted_status() {
  return Status(Code::interrupted, "interrupted; nothing was written");
}

}  // namespace

Result<std::vector<LayerResult>> run_rtn(const Checkpoint& checkpoint, const QuantizePlan& plan,
                                         const QuantizeArguments& arguments) {
  auto writer = CheckpointWriter::create(arguments.out, kShardBytes);
  if (!writer.ok()) return writer.status();
  NIBBLE_TRY(writer->write_config(quantized_config(checkpoint, plan, arguments)));
  NIBBLE_TRY(writer->copy_side_files(arguments.directory));
  for (const std::string& name : plan.copied) {
    if (interrupted()) return interrupted_status();
    NIBBLE_TRY(writer->add(name, *checkpoint.find(name)));
  }
  std::vector<LayerResult> results;
  {
    Progress progress(arguments.progress, "layer", static_cast<int64_t>(plan.linears.size()));
    for (const DenseLinear& linear : plan.linears) {
      if (interrupted()) return interrupted_status();
      const auto result = quantize_layer(linear, arguments, *writer);
      if (!result.ok()) return result.status();
      results.push_back(*result);
      progress.advance(
          fmt::format("{} {:.1f} dB", printable(components(linear.name).back()), result->snr_db));
    }
  }
  if (interrupted()) return interrupted_status();
  // From here on the output is completed even if a signal comes.
  NIBBLE_TRY(writer->commit());
  return results;
}

}  // namespace nibble::cli
