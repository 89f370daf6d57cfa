// `nibble quantize DIR OUT`: a 16/32-bit checkpoint to AutoAWQ's 4-bit layout by round-to-nearest.
// Everything that can be refused is refused before the first byte is written: plan, sizes, room on
// disk. Then one layer at a time, so memory use is that of the largest layer.
// The arithmetic is in format/round_to_nearest.h; which layers are taken is decided here.
#include <fmt/format.h>
#include <sys/statvfs.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <regex>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "base/cpu_features.h"
#include "cli.h"
#include "format/checkpoint.h"
#include "format/linear_format.h"
#include "format/round_to_nearest.h"
#include "text.h"

namespace nibble::cli {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr uint64_t kShardBytes = uint64_t{5} << 30;
constexpr int64_t kSnrColumns = 32;  // output channels compared at once, per thread

struct Options {
  std::string directory, out;
  std::string method = "rtn";
  int64_t group_size = 128;
  bool symmetric = false;
  std::string scale_dtype = "f16";
  std::vector<std::string> skip;
  bool as_json = false;
  ProgressMode progress = ProgressMode::automatic;

  RoundToNearestOptions rounding() const {
    return {group_size, symmetric, scale_dtype == "bf16" ? Dtype::bf16 : Dtype::f16};
  }
};

struct LayerResult {
  uint64_t bytes = 0;
  double snr_db = 0;  // infinite if the layer is reproduced exactly
};

struct QuantizePlan {
  std::vector<DenseLinear> linears;      // to be quantized
  std::vector<DenseLinear> left;         // linears that stay as they are
  std::vector<std::string> copied;       // names of all tensors that stay as they are
  uint64_t input_bytes = 0, output_bytes = 0, quantized_bytes = 0, parameters = 0;
  uint64_t memory_bytes = 0;             // beside the mapped input
};

// ---- which layers ------------------------------------------------------------------------------

/// The parts of "model.layers.0.mlp.down_proj" between the dots.
std::vector<std::string> components(const std::string& name) {
  return CLI::detail::split(name, '.');
}

/// Is `name` a linear of the language model's decoder layers? Not those of a vision or audio
/// encoder beside it, which no AWQ reader expects in 4 bits, and not the router of a mixture of
/// experts: it is small and decides everything.
bool in_decoder_layer(const std::string& name) {
  static const std::set<std::string, std::less<>> kStacks = {"layers", "h", "blocks"};
  static const std::set<std::string, std::less<>> kRouters = {"gate", "router",
                                                              "shared_expert_gate"};
  const auto parts = components(name);
  bool in_stack = false;
  for (size_t i = 0; i < parts.size(); ++i) {
    if (parts[i].find("vision") != std::string::npos || parts[i].find("visual") == 0 ||
        parts[i].find("audio") != std::string::npos || parts[i] == "encoder") {
      return false;
    }
    const bool number = i > 0 && !parts[i].empty() &&
                        parts[i].find_first_not_of("0123456789") == std::string::npos;
    in_stack |= number && kStacks.contains(parts[i - 1]);
  }
  return in_stack && !kRouters.contains(parts.back());
}

std::vector<std::regex> compile_patterns(const std::vector<std::string>& patterns) {
  std::vector<std::regex> compiled;
  for (const std::string& pattern : patterns) {
    try {
      compiled.emplace_back(pattern, std::regex::ECMAScript | std::regex::optimize);
    } catch (const std::regex_error& error) {
      throw CLI::ValidationError("--skip", fmt::format("{}: {}", pattern, error.what()));
    }
  }
  return compiled;
}

/// Sizes of quantize's choice that divide every K in `linears`; -1 always does.
std::string dividing_sizes(const std::vector<DenseLinear>& linears) {
  std::string text;
  for (const int64_t size : {128, 64, 32}) {
    const bool divides = std::all_of(linears.begin(), linears.end(),
                                     [&](const DenseLinear& l) { return l.k % size == 0; });
    if (divides) text += fmt::format("{}, ", size);
  }
  return text.empty() ? "only -1" : text + "-1";
}

/// Problems of layers, one line for those that differ in the number of their decoder layer only:
/// "model.layers.0-29.mlp.down_proj: K = 576".
class ProblemList {
 public:
  void add(const std::string& layer, const std::string& problem) {
    std::string before, number, after;
    for (const std::string& part : components(layer)) {
      const bool digits = part.find_first_not_of("0123456789") == std::string::npos;
      if (number.empty() && digits && !part.empty() && part.size() < 10) {
        number = part;
      } else {
        std::string& text = number.empty() ? before : after;
        text += number.empty() ? part + "." : "." + part;
      }
    }
    if (number.empty()) before.pop_back();
    const auto key = std::tuple(before, after, problem);
    if (!numbers_.contains(key)) order_.push_back(key);
    auto& numbers = numbers_[key];
    if (!number.empty()) numbers.push_back(std::stoi(number));
  }

  bool empty() const { return order_.empty(); }

  std::string text() const {
    std::string lines;
    for (const auto& key : order_) {
      const auto& [before, after, problem] = key;
      lines += fmt::format("\n  {}: {}",
                           printable(before + ranges_text(numbers_.at(key)) + after), problem);
    }
    return lines;
  }

 private:
  using Key = std::tuple<std::string, std::string, std::string>;

  /// "0-3,5" of ascending numbers.
  static std::string ranges_text(const std::vector<int>& numbers) {
    std::string text;
    for (size_t i = 0; i < numbers.size();) {
      size_t end = i + 1;
      while (end < numbers.size() && numbers[end] == numbers[end - 1] + 1) ++end;
      text += fmt::format("{}{}", text.empty() ? "" : ",", numbers[i]);
      if (end - i > 1) text += fmt::format("-{}", numbers[end - 1]);
      i = end;
    }
    return text;
  }

  std::map<Key, std::vector<int>> numbers_;
  std::vector<Key> order_;
};

/// Layers the layout or the group size cannot hold, all of them in one message.
Status check_shapes(const QuantizePlan& plan, int64_t group_size) {
  ProblemList problems;
  bool bad_k = false;
  for (const DenseLinear& linear : plan.linears) {
    const bool k_fits = group_size == -1 || linear.k % group_size == 0;
    if (!k_fits) problems.add(linear.name, fmt::format("K = {}", linear.k));
    if (linear.n % 8 != 0) {
      problems.add(linear.name, fmt::format("N = {} is not a multiple of 8", linear.n));
    }
    bad_k |= !k_fits;
  }
  if (problems.empty()) return {};
  const std::string head =
      bad_k ? fmt::format("group size {} does not divide K of these layers", group_size)
            : "the AWQ layout cannot hold these layers";
  const std::string advice =
      bad_k ? "\ngroup sizes that divide every layer: " + dividing_sizes(plan.linears) : "";
  return Status(Code::invalid_argument,
                fmt::format("{}:{}{}\nor leave layers out with --skip; nothing was written", head,
                            problems.text(), advice));
}

Status check_source(const Checkpoint& checkpoint) {
  const auto refuse = [&](const std::string& reason) {
    return Status(Code::unsupported, fmt::format("{}: {}", checkpoint.directory(), reason));
  };
  const auto quantized = find_quantized_linears(checkpoint);
  if (!quantized.empty()) {
    return refuse(fmt::format("is quantized already: {} ({})", quote_name(quantized[0].name),
                              linear_format_name(quantized[0].format)));
  }
  if (checkpoint.quant_config().present) {
    return refuse(fmt::format("is quantized already: {} has a quantization config",
                              checkpoint.quant_config().source));
  }
  if (!checkpoint.config().is_object()) {
    return Status(Code::io_error, checkpoint.directory() + " has no config.json");
  }
  // Its linears are stored (K, N), so nothing in the shapes would show that K is the wrong axis.
  const json& type = checkpoint.config().value("model_type", json());
  if (type == "gpt2") return refuse("GPT-2's transposed linear layers are not supported");
  return {};
}

uint64_t awq_bytes(const DenseLinear& linear, int64_t group_size) {
  const auto k = static_cast<uint64_t>(linear.k), n = static_cast<uint64_t>(linear.n);
  const uint64_t groups = group_size == -1 ? 1 : k / static_cast<uint64_t>(group_size);
  return k * n / 2 + groups * (n / 2 + n * 2);
}

Result<QuantizePlan> make_plan(const Checkpoint& checkpoint, const Options& options) {
  const auto patterns = compile_patterns(options.skip);
  NIBBLE_TRY(check_source(checkpoint));
  QuantizePlan plan;
  std::set<std::string> quantized_tensors;
  for (DenseLinear& linear : find_dense_linears(checkpoint)) {
    // std::regex recurses once per character: a name from a hostile file could end the stack.
    constexpr size_t kLongestName = 1000;
    if (linear.name.size() > kLongestName) {
      return Status(Code::corrupt_file, "a layer's name is too long: " + quote_name(linear.name));
    }
    const bool skipped = std::any_of(patterns.begin(), patterns.end(), [&](const std::regex& p) {
      return std::regex_search(linear.name, p);
    });
    if (!in_decoder_layer(linear.name) || skipped) {
      plan.left.push_back(std::move(linear));
      continue;
    }
    quantized_tensors.insert(linear.name + ".weight");
    plan.linears.push_back(std::move(linear));
  }
  if (plan.linears.empty()) {
    return Status(Code::unsupported,
                  fmt::format("{}: no linear layer to quantize: {} outside decoder layers or "
                              "skipped{}{}",
                              checkpoint.directory(), plan.left.size(),
                              plan.left.empty() ? "" : ", such as ",
                              plan.left.empty() ? "" : printable(plan.left[0].name)));
  }
  NIBBLE_TRY(check_shapes(plan, options.group_size));

  plan.input_bytes = plan.output_bytes = checkpoint.bytes();
  for (const auto& [name, view] : checkpoint.tensors()) {
    if (!quantized_tensors.contains(name)) plan.copied.push_back(name);
  }
  const auto threads = static_cast<uint64_t>(available_cpus());
  for (const DenseLinear& linear : plan.linears) {
    const uint64_t bytes = awq_bytes(linear, options.group_size);
    plan.output_bytes += bytes - linear.weight->bytes;
    plan.quantized_bytes += bytes + (linear.bias == nullptr ? 0 : linear.bias->bytes);
    plan.parameters += static_cast<uint64_t>(linear.k * linear.n);
    // The result, and per thread a block of columns as codes and as floats.
    const uint64_t block = static_cast<uint64_t>(linear.k * kSnrColumns) * 5 * threads;
    plan.memory_bytes = std::max(plan.memory_bytes, bytes + block);
  }
  return plan;
}

// ---- room --------------------------------------------------------------------------------------

Status check_directories(const Options& options) {
  const auto refuse = [&](const char* reason) {
    return Status(Code::invalid_argument,
                  fmt::format("OUT {}: {}", quote_name(options.out), reason));
  };
  std::error_code error;
  const fs::path source = fs::weakly_canonical(options.directory, error);
  const fs::path out = fs::weakly_canonical(options.out, error);
  for (fs::path at = out; !at.empty() && !source.empty(); at = at.parent_path()) {
    if (at == source) return refuse("is DIR or lies inside it");
    if (at == at.parent_path()) break;
  }
  if (!fs::exists(out, error)) return {};
  if (!fs::is_directory(out, error)) return refuse("exists and is not a directory");
  if (!fs::is_empty(out, error) || error) return refuse("exists and is not empty");
  return {};
}

/// Bytes this user may write where `out` will be; nothing if the system does not say.
std::optional<uint64_t> free_disk(const std::string& out) {
  std::error_code error;
  fs::path at = fs::absolute(out, error).lexically_normal();
  while (!error && !fs::exists(at, error) && at != at.parent_path()) at = at.parent_path();
  struct statvfs info {};
  if (error || ::statvfs(at.c_str(), &info) != 0) return std::nullopt;
  return static_cast<uint64_t>(info.f_bavail) * info.f_frsize;
}

std::optional<uint64_t> available_memory() {
  std::ifstream file("/proc/meminfo");
  for (std::string line; std::getline(file, line);) {
    unsigned long long kib = 0;
    if (std::sscanf(line.c_str(), "MemAvailable: %llu kB", &kib) == 1) return kib * 1024;
  }
  return std::nullopt;
}

/// The writer keeps one shard twice while it gives it its header.
uint64_t peak_disk(const QuantizePlan& plan) {
  return plan.output_bytes + std::min(plan.output_bytes, kShardBytes);
}

Status check_room(const QuantizePlan& plan, const Options& options) {
  const auto disk = free_disk(options.out);
  if (disk && *disk < peak_disk(plan)) {
    return Status(Code::io_error,
                  fmt::format("not enough room for {}: {} needed while writing, {} free",
                              quote_name(options.out), bytes_text(peak_disk(plan)),
                              bytes_text(*disk)));
  }
  const auto memory = available_memory();
  if (memory && *memory < plan.memory_bytes) {
    return Status(Code::out_of_memory,
                  fmt::format("not enough memory: {} needed for the largest layer, {} available",
                              bytes_text(plan.memory_bytes), bytes_text(*memory)));
  }
  return {};
}

// ---- the work ----------------------------------------------------------------------------------

/// Signal-to-noise ratio of the quantized weight against the original, all sums in double.
double weight_snr_db(const DenseLinear& linear, const QuantMatrix& matrix) {
  const Dtype dtype = *float_dtype(linear.weight->dtype);
  const int64_t blocks = (linear.n + kSnrColumns - 1) / kSnrColumns;
  // Per block and added up in order: the same number for any number of threads.
  std::vector<double> signal(static_cast<size_t>(blocks)), noise(signal.size());
#pragma omp parallel for schedule(dynamic)
  for (int64_t block = 0; block < blocks; ++block) {
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
  }
  double total_signal = 0, total_noise = 0;
  for (size_t i = 0; i < signal.size(); ++i) {
    total_signal += signal[i];
    total_noise += noise[i];
  }
  if (total_noise == 0) return std::numeric_limits<double>::infinity();
  return 10 * std::log10(total_signal / total_noise);
}

TensorView view_of(TensorDtype dtype, std::vector<int64_t> shape, const void* data) {
  TensorView view{dtype, std::move(shape), static_cast<const std::byte*>(data), 0};
  view.bytes = static_cast<size_t>(view.elements() * tensor_dtype_bytes(dtype));
  return view;
}

Result<LayerResult> quantize_layer(const DenseLinear& linear, const Options& options,
                                   CheckpointWriter& writer) {
  const auto tensors = quantize_round_to_nearest(linear.name, *linear.weight, options.rounding());
  if (!tensors.ok()) return tensors.status();
  const int64_t groups = tensors->k / tensors->group_size, words = tensors->n / 8;
  const TensorDtype scale_dtype =
      tensors->scale_dtype == Dtype::bf16 ? TensorDtype::bf16 : TensorDtype::f16;
  const TensorView parts[] = {
      view_of(TensorDtype::i32, {tensors->k, words}, tensors->qweight.data()),
      view_of(TensorDtype::i32, {groups, words}, tensors->qzeros.data()),
      view_of(scale_dtype, {groups, tensors->n}, tensors->scales.data())};
  LayerResult result;
  const char* const suffixes[] = {".qweight", ".qzeros", ".scales"};
  for (size_t i = 0; i < std::size(parts); ++i) {
    NIBBLE_TRY(writer.add(linear.name + suffixes[i], parts[i]));
    result.bytes += parts[i].bytes;
  }
  result.snr_db = weight_snr_db(linear, tensors->view());
  return result;
}

json quantized_config(const Checkpoint& checkpoint, const QuantizePlan& plan,
                      const Options& options) {
  // Other readers convert every linear that is not listed, except lm_head.
  json left = json::array();
  for (const DenseLinear& linear : plan.left) {
    if (components(linear.name).back() != "lm_head") left.push_back(linear.name);
  }
  json config = checkpoint.config();
  config["quantization_config"] = {{"quant_method", "awq"},
                                   {"zero_point", !options.symmetric},
                                   {"group_size", options.group_size},
                                   {"bits", 4},
                                   {"version", "gemm"},
                                   {"modules_to_not_convert", left.empty() ? json() : left}};
  return config;
}

Status interrupted_status() {
  return Status(Code::interrupted, "interrupted; nothing was written");
}

Result<std::vector<LayerResult>> write_output(const Checkpoint& checkpoint,
                                              const QuantizePlan& plan, const Options& options) {
  auto writer = CheckpointWriter::create(options.out, kShardBytes);
  if (!writer.ok()) return writer.status();
  NIBBLE_TRY(writer->write_config(quantized_config(checkpoint, plan, options)));
  NIBBLE_TRY(writer->copy_side_files(options.directory));
  for (const std::string& name : plan.copied) {
    if (interrupted()) return interrupted_status();
    NIBBLE_TRY(writer->add(name, *checkpoint.find(name)));
  }
  std::vector<LayerResult> results;
  {
    Progress progress(options.progress, "layer", static_cast<int64_t>(plan.linears.size()));
    for (const DenseLinear& linear : plan.linears) {
      if (interrupted()) return interrupted_status();
      const auto result = quantize_layer(linear, options, *writer);
      if (!result.ok()) return result.status();
      results.push_back(*result);
      progress.advance(fmt::format("{} {:.1f} dB", printable(components(linear.name).back()),
                                   result->snr_db));
    }
  }
  if (interrupted()) return interrupted_status();
  // From here on the output is completed even if a signal comes.
  NIBBLE_TRY(writer->commit());
  return results;
}

// ---- what is said ------------------------------------------------------------------------------

/// Layers that an engine fuses and that would no longer be alike, and names that another reader
/// would take for more than they are.
std::vector<std::string> notes_on(const QuantizePlan& plan) {
  std::vector<QuantizedLinear> quantized(plan.linears.size());
  for (size_t i = 0; i < quantized.size(); ++i) {
    quantized[i].name = plan.linears[i].name;
    quantized[i].format = LinearFormat::awq_gemm;
  }
  std::vector<std::string> notes = check_fused_siblings(quantized, plan.left);
  for (const DenseLinear& left : plan.left) {
    for (const DenseLinear& linear : plan.linears) {
      if (linear.name.find(left.name) == std::string::npos) continue;
      notes.push_back(fmt::format(
          "modules_to_not_convert holds {}, which is part of the name {}: readers that compare "
          "substrings will expect the latter in 16 bits, too.",
          printable(left.name), printable(linear.name)));
      break;
    }
  }
  return notes;
}

void print_plan(const Checkpoint& checkpoint, const QuantizePlan& plan, const Options& options) {
  const auto disk = free_disk(options.out);
  const auto memory = available_memory();
  std::vector<std::string> left;
  for (const DenseLinear& linear : plan.left) left.push_back(linear.name);
  Table table("<<");
  table.add({"input", fmt::format("{}, {}, {}", printable(options.directory),
                                  printable(checkpoint.architecture()),
                                  bytes_text(plan.input_bytes))});
  table.add({"method", fmt::format("round to nearest, group size {}, {}, {} scales",
                                   options.group_size,
                                   options.symmetric ? "symmetric" : "zero points",
                                   options.scale_dtype)});
  table.add({"quantized", fmt::format("{} with {} weights", plural(plan.linears.size(), "layer"),
                                      count_text(plan.parameters))});
  table.add({"left as they are", left.empty() ? "no linear layer"
                                              : fmt::format("{}: {}", plural(left.size(), "linear"),
                                                            some_of(left, 4))});
  table.add({"output", fmt::format("{}, {}", printable(options.out),
                                   bytes_text(plan.output_bytes))});
  table.add({"disk", fmt::format("{} at most while writing, {} free", bytes_text(peak_disk(plan)),
                                 disk ? bytes_text(*disk) : "unknown")});
  table.add({"memory", fmt::format("{} beside the mapped input, {} available",
                                   bytes_text(plan.memory_bytes),
                                   memory ? bytes_text(*memory) : "unknown")});
  table.print(stdout);
  for (const std::string& note : notes_on(plan)) fmt::print("note: {}\n", note);
  fmt::print("\n");
  std::fflush(stdout);
}

/// One row per kind of layer: "q_proj".
void print_results(const QuantizePlan& plan, const std::vector<LayerResult>& results) {
  struct Kind {
    size_t layers = 0, worst = 0;
    double sum = 0;
    uint64_t bytes = 0;
  };
  std::map<std::string, Kind> kinds;
  for (size_t i = 0; i < results.size(); ++i) {
    Kind& kind = kinds[components(plan.linears[i].name).back()];
    if (kind.layers++ == 0 || results[i].snr_db < results[kind.worst].snr_db) kind.worst = i;
    kind.sum += results[i].snr_db;
    kind.bytes += results[i].bytes;
  }
  Table table("<>>><");
  table.add({"kind", "layers", "size", "mean SNR", "lowest SNR"});
  for (const auto& [name, kind] : kinds) {
    table.add({printable(name), fmt::format("{}", kind.layers), bytes_text(kind.bytes),
               fmt::format("{:.1f} dB", kind.sum / static_cast<double>(kind.layers)),
               fmt::format("{:.1f} dB in {}", results[kind.worst].snr_db,
                           printable(plan.linears[kind.worst].name))});
  }
  table.print(stdout);
}

double bits_per_weight(const QuantizePlan& plan) {
  return 8 * static_cast<double>(plan.quantized_bytes) / static_cast<double>(plan.parameters);
}

json results_json(const QuantizePlan& plan, const Options& options,
                  const std::vector<LayerResult>& results, double seconds) {
  json document = report_header();
  document["input"] = options.directory;
  document["output"] = options.out;
  document["method"] = options.method;
  document["group_size"] = options.group_size;
  document["symmetric"] = options.symmetric;
  document["scale_dtype"] = options.scale_dtype;
  document["notes"] = notes_on(plan);
  document["layers"] = json::array();
  for (size_t i = 0; i < results.size(); ++i) {
    const DenseLinear& linear = plan.linears[i];
    const double snr = results[i].snr_db;
    document["layers"].push_back({{"name", linear.name}, {"k", linear.k}, {"n", linear.n},
                                  {"bytes", results[i].bytes},
                                  {"snr_db", std::isfinite(snr) ? json(snr) : json(nullptr)}});
  }
  document["input_bytes"] = plan.input_bytes;
  document["bytes"] = plan.output_bytes;
  document["bits_per_weight"] = bits_per_weight(plan);
  document["seconds"] = seconds;
  return document;
}

int run_quantize(const Options& options) {
  const auto start = std::chrono::steady_clock::now();
  const Result<Checkpoint> checkpoint = Checkpoint::open(options.directory);
  if (!checkpoint.ok()) return fail(checkpoint.status());
  if (const Status status = check_directories(options); !status.ok()) return fail(status);
  const Result<QuantizePlan> plan = make_plan(*checkpoint, options);
  if (!plan.ok()) return fail(plan.status());
  if (!options.as_json) print_plan(*checkpoint, *plan, options);
  if (const Status status = check_room(*plan, options); !status.ok()) return fail(status);

  const auto results = write_output(*checkpoint, *plan, options);
  if (!results.ok()) return fail(results.status());
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (options.as_json) {
    // A path may hold any byte.
    fmt::print("{}\n", results_json(*plan, options, *results, seconds)
                           .dump(2, ' ', false, json::error_handler_t::replace));
    return kExitOk;
  }
  print_results(*plan, *results);
  fmt::print("\n{}: {} from {} in {:.1f} s, {:.4f} bits per quantized weight\n",
             printable(options.out), bytes_text(plan->output_bytes), bytes_text(plan->input_bytes),
             seconds, bits_per_weight(*plan));
  return kExitOk;
}

}  // namespace

void add_quantize_command(CLI::App& app, int& exit_code) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("quantize", "Quantize a 16-bit checkpoint to AutoAWQ's 4-bit layout");
  command->add_option("DIR", options->directory, "checkpoint in F16, BF16 or F32")->required();
  command->add_option("OUT", options->out, "directory to make; must not exist or be empty")
      ->required();
  command->add_option("--method", options->method, "rtn: round to nearest")
      ->check(CLI::IsMember({"rtn"}))
      ->capture_default_str()
      ->group("Quantization");
  command
      ->add_option("--group-size", options->group_size,
                   "input channels that share a scale; -1: all of K")
      ->check(CLI::IsMember({128, 64, 32, -1}))
      ->capture_default_str()
      ->group("Quantization");
  command
      ->add_flag("--symmetric", options->symmetric, "zero point 8 everywhere, not one a group")
      ->group("Quantization");
  command->add_option("--scale-dtype", options->scale_dtype, "type of the scales")
      ->check(CLI::IsMember({"f16", "bf16"}))
      ->capture_default_str()
      ->group("Quantization");
  command
      ->add_option("--skip", options->skip,
                   "leave layers whose name holds a match as they are; may be repeated")
      ->allow_extra_args(false)
      ->type_name("REGEX")
      ->group("Quantization");
  command->add_flag("--json", options->as_json, "print one JSON document at the end")
      ->group("Output");
  add_progress_option(*command, options->progress);
  command->footer(
      "Every linear inside the decoder layers is quantized; lm_head, embeddings, expert routers\n"
      "and encoders for images or audio are copied, like all other tensors and side files.\n"
      "OUT appears when it is complete; a failure or Ctrl-C leaves nothing.\n"
      "\nExample:\n"
      "  nibble quantize build/models/SmolLM2-135M-Instruct /tmp/SmolLM2-AWQ --group-size 64");
  command->callback([options, &exit_code] { exit_code = run_quantize(*options); });
}

}  // namespace nibble::cli
