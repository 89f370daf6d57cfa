// `nibble inspect DIR`: what a checkpoint holds, layer by layer, without multiplying anything.
// Every layer is looked at even after a bad one, so that one run lists all that is wrong.
// `--digest` gives numbers that do not depend on the layout, to compare a model in two formats.
#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <map>
#include <memory>
#include <new>

#include "base/cpu_features.h"
#include "base/thread_pool.h"
#include "cli.h"
#include "format/linear_format.h"
#include "text.h"

namespace nibble::cli {
namespace {

using nlohmann::json;

struct Options {
  std::string directory;
  bool as_json = false;
  bool digest = false;
  bool values = false;
};

/// 64-bit FNV-1a: offset basis 0xcbf29ce484222325, prime 0x100000001b3. Not a defence against
/// forgery: it answers whether two files hold the same weights.
class Fnv1a {
 public:
  void add(const void* data, size_t bytes) {
    const auto* next = static_cast<const unsigned char*>(data);
    for (size_t i = 0; i < bytes; ++i) hash_ = (hash_ ^ next[i]) * 0x100000001b3u;
  }
  std::string text() const { return fmt::format("{:016x}", hash_); }

 private:
  uint64_t hash_ = 0xcbf29ce484222325u;
};

/// FNV-1a over, in this order: the codes (K, N) and zero points (G, N), one byte each; the scale
/// bits (G, N), two bytes each, little-endian; the scale type's name ("f16" or "bf16"). All
/// row-major; a symmetric layer without stored zero points counts as 8 everywhere.
std::string layer_digest(const QuantMatrix& matrix) {
  std::vector<uint8_t> codes(static_cast<size_t>(matrix.k * matrix.n));
  std::vector<uint8_t> zeros(static_cast<size_t>(matrix.groups() * matrix.n));
  std::vector<uint16_t> scales(zeros.size());
  unpack_codes(matrix, 0, matrix.n, codes.data());
  unpack_zeros(matrix, 0, matrix.n, zeros.data());
  unpack_scales(matrix, 0, matrix.n, scales.data());
  const std::string_view dtype = dtype_name(matrix.scale_dtype);
  Fnv1a hash;
  hash.add(codes.data(), codes.size());
  hash.add(zeros.data(), zeros.size());
  hash.add(scales.data(), scales.size() * sizeof(uint16_t));
  hash.add(dtype.data(), dtype.size());
  return hash.text();
}

struct LayerReport {
  uint64_t bytes = 0;  // of all tensors "<name>.*"
  ValueReport values;  // only of layers that can be read
  std::string digest;
};

struct Report {
  const Checkpoint* checkpoint = nullptr;
  std::vector<QuantizedLinear> linears;
  std::vector<LayerReport> layers;  // as linears
  std::vector<DenseLinear> dense;
  std::vector<std::string> notes;
  uint64_t quantized_bytes = 0;  // of the layers that can be read
  uint64_t parameters = 0;       // K * N of the same layers

  /// All bytes of the quantized linears, zero points, scales, padding and bias included.
  double bits_per_weight() const {
    return parameters == 0
               ? 0
               : 8 * static_cast<double>(quantized_bytes) / static_cast<double>(parameters);
  }
};

uint64_t bytes_of_layer(const TensorMap& tensors, const std::string& name) {
  const std::string prefix = name + ".";
  uint64_t bytes = 0;
  for (auto it = tensors.lower_bound(prefix); it != tensors.end(); ++it) {
    if (!it->first.starts_with(prefix)) break;
    if (it->first.find('.', prefix.size()) == std::string::npos) bytes += it->second.bytes;
  }
  return bytes;
}

/// Fills the parts of `layers` that read every value. Layers are independent; a digest needs the
/// unpacked layer in memory, so few are worked on at once.
void read_values(Report& report, bool digest) {
  constexpr int kMostAtOnce = 4;
  const int threads = std::min(available_cpus(), kMostAtOnce);
  std::atomic<bool> out_of_memory = false;
  parallel_for(threads, static_cast<int64_t>(report.linears.size()), [&](int64_t index) {
    const auto i = static_cast<size_t>(index);
    if (!report.linears[i].status.ok() || interrupted()) return;
    try {
      report.layers[i].values = inspect_values(report.linears[i].matrix);
      if (digest) report.layers[i].digest = layer_digest(report.linears[i].matrix);
    } catch (const std::bad_alloc&) {  // must not leave the task
      out_of_memory = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

Report make_report(const Checkpoint& checkpoint, bool digest) {
  Report report;
  report.checkpoint = &checkpoint;
  report.linears = find_quantized_linears(checkpoint);
  report.dense = find_dense_linears(checkpoint);
  report.layers.resize(report.linears.size());
  for (size_t i = 0; i < report.linears.size(); ++i) {
    const QuantizedLinear& linear = report.linears[i];
    report.layers[i].bytes = bytes_of_layer(checkpoint.tensors(), linear.name);
    if (!linear.status.ok()) continue;
    report.quantized_bytes += report.layers[i].bytes;
    report.parameters += static_cast<uint64_t>(linear.matrix.k * linear.matrix.n);
  }
  read_values(report, digest);

  report.notes = check_fused_siblings(report.linears, report.dense);
  std::vector<std::string> negative, subnormal;
  for (size_t i = 0; i < report.linears.size(); ++i) {
    const ValueReport& values = report.layers[i].values;
    if (values.negative_scales > 0) negative.push_back(report.linears[i].name);
    if (values.subnormal_scales > 0) subnormal.push_back(report.linears[i].name);
  }
  if (!negative.empty()) {
    report.notes.push_back(fmt::format(
        "negative scales in {}: {}. They are legal and computed right here; other int8 paths may "
        "print garbage.",
        plural(negative.size(), "layer"), some_of(negative)));
  }
  if (!subnormal.empty()) {
    report.notes.push_back(fmt::format(
        "subnormal scales in {}: {}. Code that flushes them to zero loses these groups.",
        plural(subnormal.size(), "layer"), some_of(subnormal)));
  }
  return report;
}

// ---- what is wrong -----------------------------------------------------------------------------

Status non_finite_status(const Report& report, size_t i) {
  const ValueReport& values = report.layers[i].values;
  return Status(Code::non_finite,
                fmt::format("{}: {} of the scales are NaN or infinite, first in {}",
                            quote_name(report.linears[i].name), values.non_finite_scales,
                            values.first_non_finite));
}

/// The layer's own status, or non_finite.
Status layer_status(const Report& report, size_t i) {
  if (!report.linears[i].status.ok()) return report.linears[i].status;
  return report.layers[i].values.non_finite_scales > 0 ? non_finite_status(report, i) : Status{};
}

const char* status_name(Code code) {
  switch (code) {
    case Code::ok: return "ok";
    case Code::unsupported: return "unsupported";
    case Code::non_finite: return "non-finite";
    default: return "corrupt";
  }
}

/// One sentence about all bad layers, with the code of the worst: corrupt counts before
/// unsupported. Their own messages are part of the report.
Status conclude(const Report& report) {
  std::map<std::string, std::vector<std::string>> names;  // by status
  Code worst = Code::ok;
  for (size_t i = 0; i < report.linears.size(); ++i) {
    const Code code = layer_status(report, i).code();
    if (code == Code::ok) continue;
    names[status_name(code)].push_back(report.linears[i].name);
    if (worst == Code::ok || worst == Code::unsupported) worst = code;
  }
  std::string text;
  for (const auto& [status, layers] : names) {
    text += fmt::format("{}{} {}: {}", text.empty() ? "" : "; ", plural(layers.size(), "layer"),
                        status, some_of(layers, 3));
  }
  return worst == Code::ok ? Status{} : Status(worst, text);
}

// ---- text --------------------------------------------------------------------------------------

std::map<std::string, size_t> count_formats(const Report& report) {
  std::map<std::string, size_t> counts;
  for (const QuantizedLinear& linear : report.linears) ++counts[linear_format_name(linear.format)];
  return counts;
}

std::string formats_text(const Report& report) {
  std::string text;
  for (const auto& [format, count] : count_formats(report)) {
    text += fmt::format("{}{} ({})", text.empty() ? "" : ", ", format, plural(count, "layer"));
  }
  return text.empty() ? "none: no quantized linear layer" : text;
}

std::string config_text(const QuantConfig& config) {
  if (!config.present) return "no quantization config";
  std::string text = printable(config.source) + ":";
  if (!config.method.empty()) text += " method " + printable(config.method);
  if (!config.version.empty()) text += " version " + printable(config.version);
  if (config.bits != 0) text += fmt::format(" bits {}", config.bits);
  if (config.group_size != 0) text += fmt::format(" group_size {}", config.group_size);
  if (config.zero_point_given) text += config.zero_point ? " zero_point" : " no zero_point";
  return text;
}

std::string zero_points_text(const Report& report) {
  size_t symmetric = 0, readable = 0;
  int low = 15, high = 0;
  for (size_t i = 0; i < report.linears.size(); ++i) {
    if (!report.linears[i].status.ok()) continue;
    ++readable;
    symmetric += report.linears[i].symmetric;
    low = std::min(low, report.layers[i].values.zero_point_min);
    high = std::max(high, report.layers[i].values.zero_point_max);
  }
  if (readable == symmetric) return "8 everywhere (symmetric)";
  const std::string range =
      low == high ? fmt::format("{} everywhere", low) : fmt::format("{}..{}", low, high);
  return symmetric == 0 ? range
                        : fmt::format("{}, {} of {} layers symmetric", range, symmetric, readable);
}

std::vector<std::string> names_of(const std::vector<DenseLinear>& dense) {
  std::vector<std::string> names;
  for (const DenseLinear& linear : dense) names.push_back(linear.name);
  return names;
}

std::string dimension_text(int64_t value) { return value == 0 ? "?" : fmt::format("{}", value); }

void print_summary(const Report& report) {
  const Checkpoint& checkpoint = *report.checkpoint;
  Table table("<<");
  table.add({"directory", printable(checkpoint.directory())});
  table.add({"architecture", printable(checkpoint.architecture())});
  table.add({"format", formats_text(report)});
  table.add({"config", config_text(checkpoint.quant_config())});
  table.add({"shards",
             fmt::format("{}: {}", checkpoint.shards().size(), some_of(checkpoint.shards(), 3))});
  table.add(
      {"size", fmt::format("{} in {}, {} of it in quantized layers", bytes_text(checkpoint.bytes()),
                           plural(checkpoint.tensors().size(), "tensor"),
                           bytes_text(report.quantized_bytes))});
  if (report.parameters > 0) {
    table.add({"weights", fmt::format("{} quantized, {:.4f} bits each with all their overhead",
                                      count_text(report.parameters), report.bits_per_weight())});
    table.add({"zero points", zero_points_text(report)});
  }
  const auto dense = names_of(report.dense);
  table.add({"not quantized", dense.empty() ? "no linear layer"
                                            : fmt::format("{}: {}", plural(dense.size(), "linear"),
                                                          some_of(dense, 4))});
  table.print(stdout);
}

void print_layers(const Report& report, const Options& options) {
  Table table("<<>>><<<<<>>>>");
  std::vector<std::string> head = {"layer", "format", "K",    "N",     "group",
                                   "zeros", "scales", "bias", "status"};
  if (options.digest) head.push_back("digest");
  if (options.values) {
    if (!options.digest) head.push_back("");  // keeps the alignment of the columns that follow
    head.insert(head.end(), {"zero points", "negative", "subnormal", "zero scales"});
  }
  table.add(head);
  for (size_t i = 0; i < report.linears.size(); ++i) {
    const QuantizedLinear& linear = report.linears[i];
    const ValueReport& values = report.layers[i].values;
    const bool ok = linear.status.ok();
    std::vector<std::string> row = {printable(linear.name),
                                    linear_format_name(linear.format),
                                    dimension_text(linear.matrix.k),
                                    dimension_text(linear.matrix.n),
                                    dimension_text(linear.matrix.group_size),
                                    !ok                ? "?"
                                    : linear.symmetric ? "sym"
                                                       : "asym",
                                    ok ? dtype_name(linear.matrix.scale_dtype) : "?",
                                    linear.bias == nullptr ? "-" : "bias",
                                    status_name(layer_status(report, i).code())};
    if (options.digest || options.values) row.push_back(report.layers[i].digest);
    if (options.values && ok) {
      row.insert(row.end(), {fmt::format("{}..{}", values.zero_point_min, values.zero_point_max),
                             fmt::format("{}", values.negative_scales),
                             fmt::format("{}", values.subnormal_scales),
                             fmt::format("{}", values.zero_scales)});
    }
    table.add(row);
  }
  fmt::print("\n");
  table.print(stdout);
}

void print_dense(const Report& report) {
  Table table("<>><");
  table.add({"linear", "K", "N", "type"});
  for (const DenseLinear& linear : report.dense) {
    table.add({printable(linear.name), fmt::format("{}", linear.k), fmt::format("{}", linear.n),
               tensor_dtype_name(linear.weight->dtype)});
  }
  fmt::print("\n");
  table.print(stdout);
}

void print_text(const Report& report, const Options& options) {
  print_summary(report);
  if (!report.linears.empty()) {
    print_layers(report, options);
  } else {
    fmt::print("\nThis checkpoint has no quantized linear layer; nibble quantize makes some.\n");
    if (!report.dense.empty()) print_dense(report);
  }
  for (const std::string& note : report.notes) fmt::print("\nnote: {}\n", note);
  for (size_t i = 0; i < report.linears.size(); ++i) {
    const Status status = layer_status(report, i);
    if (!status.ok()) fmt::print("\n{}: {}\n", status_name(status.code()), status.message());
  }
}

// ---- JSON --------------------------------------------------------------------------------------

json number_or_null(int64_t value) { return value == 0 ? json(nullptr) : json(value); }

json layer_json(const Report& report, size_t i, const Options& options) {
  const QuantizedLinear& linear = report.linears[i];
  const Status status = layer_status(report, i);
  const bool readable = linear.status.ok();
  json layer = {{"name", linear.name},
                {"format", linear_format_name(linear.format)},
                {"k", number_or_null(linear.matrix.k)},
                {"n", number_or_null(linear.matrix.n)},
                {"group_size", number_or_null(linear.matrix.group_size)},
                {"symmetric", readable ? json(linear.symmetric) : json(nullptr)},
                {"scale_dtype", readable ? json(dtype_name(linear.matrix.scale_dtype)) : json()},
                {"bias", linear.bias != nullptr},
                {"bytes", report.layers[i].bytes},
                {"status", status_name(status.code())}};
  if (!status.ok()) layer["problem"] = status.message();
  if (options.digest && readable) layer["digest"] = report.layers[i].digest;
  if (options.values && readable) {
    const ValueReport& values = report.layers[i].values;
    layer["values"] = {{"zero_point_min", values.zero_point_min},
                       {"zero_point_max", values.zero_point_max},
                       {"negative_scales", values.negative_scales},
                       {"subnormal_scales", values.subnormal_scales},
                       {"zero_scales", values.zero_scales},
                       {"non_finite_scales", values.non_finite_scales}};
  }
  return layer;
}

json config_json(const QuantConfig& config) {
  if (!config.present) return nullptr;
  return {{"source", config.source},
          {"method", config.method},
          {"version", config.version},
          {"bits", number_or_null(config.bits)},
          {"group_size", number_or_null(config.group_size)},
          {"zero_point", config.zero_point_given ? json(config.zero_point) : json(nullptr)}};
}

json report_json(const Report& report, const Options& options) {
  const Checkpoint& checkpoint = *report.checkpoint;
  std::string format;
  for (const auto& [name, count] : count_formats(report)) {
    format += (format.empty() ? "" : "+") + name;
  }
  json document = report_header();
  document["directory"] = checkpoint.directory();
  document["architecture"] = checkpoint.architecture();
  document["format"] = format.empty() ? "none" : format;
  document["quantization_config"] = config_json(checkpoint.quant_config());
  document["layers"] = json::array();
  for (size_t i = 0; i < report.linears.size(); ++i) {
    document["layers"].push_back(layer_json(report, i, options));
  }
  document["dense"] = json::array();
  for (const DenseLinear& linear : report.dense) {
    document["dense"].push_back({{"name", linear.name},
                                 {"k", linear.k},
                                 {"n", linear.n},
                                 {"dtype", tensor_dtype_name(linear.weight->dtype)}});
  }
  document["notes"] = report.notes;
  document["shards"] = checkpoint.shards();
  document["tensors"] = checkpoint.tensors().size();
  document["bytes"] = checkpoint.bytes();
  document["quantized_bytes"] = report.quantized_bytes;
  document["parameters"] = report.parameters;
  document["bits_per_weight"] =
      report.parameters == 0 ? json(nullptr) : json(report.bits_per_weight());
  return document;
}

int run_inspect(const Options& options) {
  const Result<Checkpoint> checkpoint = Checkpoint::open(options.directory);
  if (!checkpoint.ok()) return fail(checkpoint.status());
  const Report report = make_report(*checkpoint, options.digest);
  if (interrupted()) return fail(Status(Code::interrupted, "interrupted"));
  if (options.as_json) {
    // A path may hold any byte.
    fmt::print("{}\n",
               report_json(report, options).dump(2, ' ', false, json::error_handler_t::replace));
  } else {
    print_text(report, options);
  }
  const Status conclusion = conclude(report);
  return conclusion.ok() ? kExitOk : fail(conclusion);
}

}  // namespace

void add_inspect_command(CLI::App& app, int& exit_code) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("inspect", "Show what a checkpoint holds: formats, layers, sizes");
  command->add_option("DIR", options->directory, "directory with config.json and *.safetensors")
      ->required();
  command->add_flag("--json", options->as_json, "print one JSON document")->group("Output");
  command
      ->add_flag("--digest", options->digest,
                 "per layer a hash of its weights that is the same in every format")
      ->group("Output");
  command
      ->add_flag("--values", options->values,
                 "per layer the range of zero points and the unusual scales")
      ->group("Output");
  command->footer(
      "The digest is a 64-bit FNV-1a over the codes (K, N) and zero points (G, N), one byte each,\n"
      "the scale bits (G, N), two bytes each, all row-major, and the scale type's name.\n"
      "\nExit codes: 0 ok, 3 a layer's format is not supported, 4 a file is missing or corrupt.\n"
      "\nExample:\n  nibble inspect build/models/SmolLM2-135M-Instruct-AWQ --values");
  command->callback([options, &exit_code] { exit_code = run_inspect(*options); });
}

}  // namespace nibble::cli
