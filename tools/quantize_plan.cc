// The policy of `nibble quantize`: linears of the decoder layers, except routers and those skipped,
// if the AWQ layout and the group size can hold them. Reads the checkpoint's names and shapes and
// asks the system for room; writes nothing and looks at no weight.
#include "quantize_plan.h"

#include <fmt/format.h>
#include <sys/statvfs.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>
#include <tuple>

#include "base/cpu_features.h"
#include "base/memory.h"
#include "text.h"

namespace nibble::cli {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

// ---- which layers ------------------------------------------------------------------------------

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
    const bool number =
        i > 0 && !parts[i].empty() && parts[i].find_first_not_of("0123456789") == std::string::npos;
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
      lines += fmt::format("\n  {}: {}", printable(before + ranges_text(numbers_.at(key)) + after),
                           problem);
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

}  // namespace

std::vector<std::string> components(const std::string& name) {
  return CLI::detail::split(name, '.');
}

Result<QuantizePlan> make_quantize_plan(const Checkpoint& checkpoint, int64_t group_size,
                                        const std::vector<std::string>& skip) {
  const auto patterns = compile_patterns(skip);
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
    return Status(
        Code::unsupported,
        fmt::format("{}: no linear layer to quantize: {} outside decoder layers or "
                    "skipped{}{}",
                    checkpoint.directory(), plan.left.size(), plan.left.empty() ? "" : ", such as ",
                    plan.left.empty() ? "" : printable(plan.left[0].name)));
  }
  NIBBLE_TRY(check_shapes(plan, group_size));

  plan.input_bytes = plan.output_bytes = checkpoint.bytes();
  for (const auto& [name, view] : checkpoint.tensors()) {
    if (!quantized_tensors.contains(name)) plan.copied.push_back(name);
  }
  const auto threads = static_cast<uint64_t>(available_cpus());
  for (const DenseLinear& linear : plan.linears) {
    const uint64_t bytes = awq_bytes(linear, group_size);
    plan.output_bytes += bytes - linear.weight->bytes;
    plan.quantized_bytes += bytes + (linear.bias == nullptr ? 0 : linear.bias->bytes);
    plan.parameters += static_cast<uint64_t>(linear.k * linear.n);
    // The result, and per thread a block of columns as codes and as floats.
    const uint64_t block = static_cast<uint64_t>(linear.k * kSnrColumns) * 5 * threads;
    plan.memory_bytes = std::max(plan.memory_bytes, bytes + block);
  }
  return plan;
}

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

// ---- room --------------------------------------------------------------------------------------

Status check_directories(const std::string& directory, const std::string& out) {
  const auto refuse = [&](const char* reason) {
    return Status(Code::invalid_argument, fmt::format("OUT {}: {}", quote_name(out), reason));
  };
  std::error_code error;
  const fs::path source = fs::weakly_canonical(directory, error);
  const fs::path target = fs::weakly_canonical(out, error);
  for (fs::path at = target; !at.empty() && !source.empty(); at = at.parent_path()) {
    if (at == source) return refuse("is DIR or lies inside it");
    if (at == at.parent_path()) break;
  }
  if (!fs::exists(target, error)) return {};
  if (!fs::is_directory(target, error)) return refuse("exists and is not a directory");
  if (!fs::is_empty(target, error) || error) return refuse("exists and is not empty");
  return {};
}

std::optional<uint64_t> free_disk(const std::string& out) {
  std::error_code error;
  fs::path at = fs::absolute(out, error).lexically_normal();
  while (!error && !fs::exists(at, error) && at != at.parent_path()) at = at.parent_path();
  struct statvfs info {};
  if (error || ::statvfs(at.c_str(), &info) != 0) return std::nullopt;
  return static_cast<uint64_t>(info.f_bavail) * info.f_frsize;
}

uint64_t peak_disk(const QuantizePlan& plan) {
  return plan.output_bytes + std::min(plan.output_bytes, kShardBytes) + plan.work_bytes;
}

Status check_room(const QuantizePlan& plan, const std::string& out) {
  const auto disk = free_disk(out);
  if (disk && *disk < peak_disk(plan)) {
    return Status(Code::io_error,
                  fmt::format("not enough room for {}: {} needed while writing, {} free",
                              quote_name(out), bytes_text(peak_disk(plan)), bytes_text(*disk)));
  }
  const uint64_t memory = available_memory_bytes();  // 0: unknown
  if (memory > 0 && memory < plan.memory_bytes) {
    return Status(Code::out_of_memory,
                  fmt::format("not enough memory: {} needed, {} available",
                              bytes_text(plan.memory_bytes), bytes_text(memory)));
  }
  return {};
}

}  // namespace nibble::cli
