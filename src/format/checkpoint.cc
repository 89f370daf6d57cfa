// Reading a model directory. Everything in it is untrusted: JSON is checked for nesting before a
// document is built (building and destroying one may recurse), shard names must stay inside the
// directory, and index and shards must tell the same story.
#include "format/checkpoint.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>

#include "format/message.h"

namespace nibble {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr const char* kConfigName = "config.json";
constexpr const char* kIndexName = "model.safetensors.index.json";
constexpr const char* kSingleName = "model.safetensors";
constexpr std::array kOlderConfigNames = {"quant_config.json", "quantize_config.json"};
constexpr size_t kMaxJsonBytes = 100'000'000;
constexpr int kMaxNesting = 128;

bool path_exists(const fs::path& path) {
  std::error_code ignored;
  return fs::exists(path, ignored);
}

/// First offset at which `text` nests deeper than kMaxNesting.
std::optional<size_t> too_deep_at(std::string_view text) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      if (++depth > kMaxNesting) return i;
    } else if (c == '}' || c == ']') {
      --depth;
    }
  }
  return std::nullopt;
}

Result<json> read_json(const fs::path& path) {
  auto file = MappedFile::open(path.string());
  if (!file.ok()) return file.status();
  const auto bytes = file->bytes();
  return parse_json({reinterpret_cast<const char*>(bytes.data()), bytes.size()},
                    path.filename().string());
}

/// The member `key` of `object`, or null if it is absent, null, or `object` is no object.
const json* member(const json& object, const char* key) {
  if (!object.is_object()) return nullptr;
  const auto found = object.find(key);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

std::string lower_case(std::string text) {
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
}

/// Reads members by their alternative names; of several the first that is present counts.
class BlockReader {
 public:
  BlockReader(const json& block, std::string where) : block_(block), where_(std::move(where)) {}

  Status text(std::initializer_list<const char*> keys, std::string& out) const {
    const auto [key, value] = first(keys);
    if (value == nullptr) return {};
    if (!value->is_string()) return wrong(key, "a string", *value);
    out = lower_case(value->get<std::string>());
    return {};
  }

  Status integer(std::initializer_list<const char*> keys, int64_t smallest, int64_t& out) const {
    const auto [key, value] = first(keys);
    if (value == nullptr) return {};
    const bool fits = value->is_number_integer() &&
                      (!value->is_number_unsigned() || value->get<uint64_t>() <= INT32_MAX) &&
                      value->get<int64_t>() >= smallest && value->get<int64_t>() != 0;
    if (!fits) {
      return wrong(key, smallest < 0 ? "-1 or a positive integer" : "a positive integer", *value);
    }
    out = value->get<int64_t>();
    return {};
  }

  Status boolean(std::initializer_list<const char*> keys, std::optional<bool>& out) const {
    const auto [key, value] = first(keys);
    if (value == nullptr) return {};
    if (!value->is_boolean()) return wrong(key, "true or false", *value);
    out = value->get<bool>();
    return {};
  }

  Status strings(std::initializer_list<const char*> keys, std::vector<std::string>& out) const {
    const auto [key, value] = first(keys);
    if (value == nullptr) return {};
    if (!value->is_array()) return wrong(key, "a list of strings", *value);
    for (const json& item : *value) {
      if (!item.is_string()) return wrong(key, "a list of strings", *value);
      out.push_back(item.get<std::string>());
    }
    return {};
  }

  Status wrong(const std::string& key, const char* expected, const json& found) const {
    // A number is shown, a container only by its type: it may be large.
    const std::string shown = found.is_number() ? found.dump() : found.type_name();
    return Status(Code::corrupt_file, fmt::format("{}: key {}: expected {}, found {}", where_,
                                                  quote_name(key), expected, shown));
  }

 private:
  std::pair<const char*, const json*> first(std::initializer_list<const char*> keys) const {
    for (const char* key : keys) {
      if (const json* value = member(block_, key)) return {key, value};
    }
    return {"", nullptr};
  }

  const json& block_;
  std::string where_;
};

/// compressed-tensors keeps the numbers per group of layers; they are a hint only if all agree.
Status read_config_groups(const json& groups, const std::string& where, QuantConfig& config) {
  if (!groups.is_object())
    return BlockReader(groups, where).wrong("config_groups", "an object", groups);
  std::optional<QuantConfig> common;
  for (const auto& [name, group] : groups.items()) {
    const json* weights = member(group, "weights");
    if (weights == nullptr) continue;
    const BlockReader reader(*weights, fmt::format("{}: {}", where, quote_name(name)));
    QuantConfig here;
    std::optional<bool> symmetric;
    std::string strategy;
    NIBBLE_TRY(reader.integer({"num_bits"}, 1, here.bits));
    NIBBLE_TRY(reader.integer({"group_size"}, -1, here.group_size));
    NIBBLE_TRY(reader.boolean({"symmetric"}, symmetric));
    NIBBLE_TRY(reader.text({"strategy"}, strategy));
    if (strategy == "channel" && here.group_size == 0) here.group_size = -1;
    here.zero_point_given = symmetric.has_value();
    here.zero_point = !symmetric.value_or(false);
    if (!common) common = here;
    if (common->bits != here.bits) common->bits = 0;
    if (common->group_size != here.group_size) common->group_size = 0;
    if (common->zero_point != here.zero_point) common->zero_point_given = false;
  }
  if (!common) return {};
  config.bits = common->bits;
  config.group_size = common->group_size;
  config.zero_point_given = common->zero_point_given;
  config.zero_point = !common->zero_point_given || common->zero_point;
  return {};
}

/// The quantization block of `document` and its path in messages; null if there is none.
std::pair<const json*, std::string> find_block(const json& document, const std::string& source) {
  if (const json* block = member(document, "quantization_config")) {
    return {block, source + ": quantization_config"};
  }
  for (const char* outer : {"text_config", "llm_config"}) {
    const json* inner = member(document, outer);
    const json* block = inner == nullptr ? nullptr : member(*inner, "quantization_config");
    if (block != nullptr) return {block, fmt::format("{}: {}.quantization_config", source, outer)};
  }
  if (const json* block = member(document, "compression_config")) {
    return {block, source + ": compression_config"};
  }
  // The older files are the block itself.
  if (source != kConfigName) return {&document, source};
  return {nullptr, {}};
}

/// weight_map of the index: tensor name -> shard name, all of them plain file names.
Result<std::map<std::string, std::string, std::less<>>> read_index(const fs::path& directory) {
  const auto corrupt = [](const std::string& reason) {
    return Status(Code::corrupt_file, fmt::format("{}: {}", kIndexName, reason));
  };
  auto document = read_json(directory / kIndexName);
  if (!document.ok()) return document.status();
  const json* weight_map = member(*document, "weight_map");
  if (weight_map == nullptr || !weight_map->is_object()) return corrupt("weight_map is no object");
  std::map<std::string, std::string, std::less<>> shard_of;
  for (const auto& [tensor, value] : weight_map->items()) {
    const std::string shard = value.is_string() ? value.get<std::string>() : "";
    if (shard.empty() || shard == "." || shard == ".." ||
        shard.find_first_of(std::string_view("/\\\0", 3)) != std::string::npos) {
      return corrupt(fmt::format("shard of {} is {}, not the name of a file in this directory",
                                 quote_name(tensor),
                                 value.is_string() ? quote_name(shard) : value.type_name()));
    }
    shard_of[tensor] = shard;
  }
  if (shard_of.empty()) return corrupt("weight_map is empty");
  return shard_of;
}

Status no_weights(const std::string& directory) {
  std::error_code error;
  std::string other_safetensors, other_weights;
  for (fs::directory_iterator entry(directory, error), end; !error && entry != end;
       entry.increment(error)) {
    const std::string extension = entry->path().extension().string();
    const std::string name = entry->path().filename().string();
    if (extension == ".safetensors") other_safetensors = name;
    if (extension == ".pt" || extension == ".pth" || extension == ".bin") other_weights = name;
  }
  if (other_safetensors.empty() && !other_weights.empty()) {
    return Status(Code::unsupported,
                  fmt::format("{} holds weights as {}; only safetensors files are read", directory,
                              quote_name(other_weights)));
  }
  return Status(Code::io_error,
                fmt::format("{} has neither {} nor {}{}", directory, kSingleName, kIndexName,
                            other_safetensors.empty()
                                ? ""
                                : fmt::format(" (found {})", quote_name(other_safetensors))));
}

}  // namespace

Result<json> parse_json(std::string_view text, const std::string& file_name) {
  const auto corrupt = [&](const std::string& reason) {
    return Status(Code::corrupt_file, fmt::format("{}: {}", file_name, reason));
  };
  if (text.size() > kMaxJsonBytes) {
    return corrupt(fmt::format("{} bytes of JSON exceed {}", text.size(), kMaxJsonBytes));
  }
  // The lexer takes a zero byte for the end of its input and would ignore what follows.
  if (const size_t zero = text.find('\0'); zero != std::string_view::npos) {
    return corrupt(fmt::format("zero byte at offset {}", zero));
  }
  if (const auto offset = too_deep_at(text)) {
    return corrupt(fmt::format("more than {} levels of nesting at byte {}", kMaxNesting, *offset));
  }
  try {
    return json::parse(text.begin(), text.end());
  } catch (const json::parse_error& error) {
    return corrupt(fmt::format("invalid JSON at byte {}", error.byte));
  } catch (const json::exception& error) {
    return corrupt("invalid JSON: " + quote_name(error.what()));
  }
}

Result<QuantConfig> parse_quant_config(const json& document, const std::string& source) {
  QuantConfig config;
  const auto [block, where] = find_block(document, source);
  if (block == nullptr) return config;
  if (!block->is_object()) {
    return Status(Code::corrupt_file,
                  fmt::format("{}: expected an object, found {}", where, block->type_name()));
  }
  config.present = true;
  config.source = source;
  const BlockReader reader(*block, where);
  std::optional<bool> zero_point, symmetric;
  NIBBLE_TRY(reader.text({"quant_method", "method"}, config.method));
  NIBBLE_TRY(reader.text({"version", "format", "checkpoint_format"}, config.version));
  NIBBLE_TRY(reader.integer({"bits", "w_bit"}, 1, config.bits));
  NIBBLE_TRY(reader.integer({"group_size", "q_group_size"}, -1, config.group_size));
  NIBBLE_TRY(reader.boolean({"zero_point"}, zero_point));
  NIBBLE_TRY(reader.boolean({"sym"}, symmetric));
  NIBBLE_TRY(reader.strings({"modules_to_not_convert", "ignore"}, config.modules_to_not_convert));
  if (zero_point || symmetric) {
    config.zero_point_given = true;
    config.zero_point = zero_point ? *zero_point : !*symmetric;
  }
  if (const json* groups = member(*block, "config_groups")) {
    NIBBLE_TRY(read_config_groups(*groups, where, config));
  }
  return config;
}

struct Checkpoint::State {
  std::string directory;
  json config;
  QuantConfig quant;
  std::vector<std::string> shards;
  std::vector<MappedFile> files;
  TensorMap tensors;
  uint64_t bytes = 0;

  Status read_configs();
  Status read_tensors();
};

Status Checkpoint::State::read_configs() {
  const fs::path root = directory;
  if (path_exists(root / kConfigName)) {
    auto document = read_json(root / kConfigName);
    if (!document.ok()) return document.status();
    if (!document->is_object()) {
      return Status(Code::corrupt_file, fmt::format("{}: expected an object, found {}", kConfigName,
                                                    document->type_name()));
    }
    config = std::move(*document);
    auto parsed = parse_quant_config(config, kConfigName);
    if (!parsed.ok()) return parsed.status();
    quant = std::move(*parsed);
  }
  for (const char* name : kOlderConfigNames) {
    if (quant.present || !path_exists(root / name)) continue;
    auto document = read_json(root / name);
    if (!document.ok()) return document.status();
    auto parsed = parse_quant_config(*document, name);
    if (!parsed.ok()) return parsed.status();
    quant = std::move(*parsed);
  }
  return {};
}

Status Checkpoint::State::read_tensors() {
  const fs::path root = directory;
  std::map<std::string, std::string, std::less<>> index;
  const bool has_index = path_exists(root / kIndexName);
  if (has_index) {
    auto shard_of = read_index(root);
    if (!shard_of.ok()) return shard_of.status();
    index = std::move(*shard_of);
    for (const auto& [tensor, shard] : index) shards.push_back(shard);
    std::sort(shards.begin(), shards.end());
    shards.erase(std::unique(shards.begin(), shards.end()), shards.end());
  } else if (path_exists(root / kSingleName)) {
    shards.push_back(kSingleName);
  } else {
    return no_weights(directory);
  }

  for (const std::string& shard : shards) {
    auto file = MappedFile::open((root / shard).string());
    if (!file.ok()) return file.status();
    auto parsed = parse_safetensors(file->bytes(), shard);
    if (!parsed.ok()) return parsed.status();
    files.push_back(std::move(*file));
    for (auto& [name, view] : parsed->tensors) {
      const auto listed = index.find(name);
      if (has_index && (listed == index.end() || listed->second != shard)) {
        return Status(
            Code::corrupt_file,
            fmt::format("{}: holds tensor {}, which {} {}", shard, quote_name(name), kIndexName,
                        listed == index.end() ? "does not list"
                                              : "places in " + quote_name(listed->second)));
      }
      bytes += view.bytes;
      tensors.emplace(name, std::move(view));
    }
  }
  for (const auto& [name, shard] : index) {
    if (tensors.contains(name)) continue;
    return Status(Code::corrupt_file, fmt::format("{}: places tensor {} in {}, which lacks it",
                                                  kIndexName, quote_name(name), quote_name(shard)));
  }
  return {};
}

Result<Checkpoint> Checkpoint::open(const std::string& directory) {
  std::error_code ignored;
  if (!fs::is_directory(directory, ignored)) {
    return Status(Code::io_error, directory + " is not a directory");
  }
  auto state = std::make_unique<State>();
  state->directory = directory;
  NIBBLE_TRY(state->read_configs());
  NIBBLE_TRY(state->read_tensors());
  return Checkpoint(std::move(state));
}

Checkpoint::Checkpoint(std::unique_ptr<State> state) : state_(std::move(state)) {}
Checkpoint::Checkpoint(Checkpoint&&) noexcept = default;
Checkpoint& Checkpoint::operator=(Checkpoint&&) noexcept = default;
Checkpoint::~Checkpoint() = default;

const std::string& Checkpoint::directory() const { return state_->directory; }
const json& Checkpoint::config() const { return state_->config; }
const QuantConfig& Checkpoint::quant_config() const { return state_->quant; }
const TensorMap& Checkpoint::tensors() const { return state_->tensors; }
const std::vector<std::string>& Checkpoint::shards() const { return state_->shards; }
uint64_t Checkpoint::bytes() const { return state_->bytes; }

std::string Checkpoint::architecture() const {
  const json* list = member(state_->config, "architectures");
  if (list != nullptr && list->is_array() && !list->empty() && list->front().is_string()) {
    return list->front().get<std::string>();
  }
  const json* type = member(state_->config, "model_type");
  return type != nullptr && type->is_string() ? type->get<std::string>() : "unknown";
}

const TensorView* Checkpoint::find(std::string_view name) const {
  const auto found = state_->tensors.find(name);
  return found == state_->tensors.end() ? nullptr : &found->second;
}

}  // namespace nibble
