#include "model/plan_config.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>
#include <string_view>

#include "format/checkpoint.h"
#include "format/message.h"
#include "format/output_file.h"
#include "format/safetensors.h"

namespace nibble {
namespace {

using nlohmann::json;

constexpr const char* kBlockKey = "quantization_config";
constexpr const char* kPlanKey = "nibble";

// ---- reading -----------------------------------------------------------------------------------

/// What was found, short: a scalar as it is written, else its kind.
std::string found_text(const json& value) {
  if (value.is_structured()) {
    return fmt::format("{} of {}", value.is_array() ? "an array" : "an object", value.size());
  }
  if (value.is_string()) return quote_name(value.get_ref<const std::string&>());
  return value.dump(-1, ' ', true, json::error_handler_t::replace);
}

Status refuse(const std::string& where, const std::string& expected, const json& found) {
  return Status(Code::corrupt_file, fmt::format("config.json: {}: expected {}, found {}", where,
                                                expected, found_text(found)));
}

/// The first key of `object` that is not in `known`, as a refusal.
Status check_keys(const json& object, const std::string& where,
                  std::initializer_list<std::string_view> known) {
  for (const auto& item : object.items()) {
    bool found = false;
    for (const std::string_view key : known) found = found || item.key() == key;
    if (!found) {
      return Status(Code::corrupt_file,
                    fmt::format("config.json: {}: unknown key {}; known are {}", where,
                                quote_name(item.key()), joined(known, ", ")));
    }
  }
  return {};
}

/// The value whose name `name_of` gives is the text; the names are listed if it is none of them.
template <class T>
Result<T> parse_name(const json& value, const std::string& where, std::initializer_list<T> values,
                     const char* (*name_of)(T)) {
  std::string names;
  for (const T candidate : values) {
    if (value.is_string() && value.get_ref<const std::string&>() == name_of(candidate)) {
      return candidate;
    }
    names += (names.empty() ? "" : ", ") + std::string(name_of(candidate));
  }
  return refuse(where, "one of " + names, value);
}

/// A number that is finite, positive and no larger than `most`, as a float.
Result<float> parse_positive(const json& value, const std::string& where, double most) {
  if (value.is_number()) {
    const double number = value.get<double>();
    const auto rounded = static_cast<float>(number);
    if (number <= most && rounded > 0 && std::isfinite(rounded)) return rounded;
  }
  return refuse(where, most == 1 ? std::string("a number in (0, 1]") : "a positive float", value);
}

/// Static scales: one, or one per group of some group size.
Result<std::vector<float>> parse_scales(const json& value, const std::string& where,
                                        Granularity granularity, int64_t k) {
  const bool whole = granularity == Granularity::static_tensor;
  const auto count = static_cast<int64_t>(value.size());
  if (!value.is_array() || count == 0 || (whole ? count != 1 : k % count != 0)) {
    return refuse(where,
                  whole ? std::string("an array of 1")
                        : fmt::format("an array of K / group_size scales, K = {}", k),
                  value);
  }
  std::vector<float> scales;
  for (size_t i = 0; i < value.size(); ++i) {
    const auto scale = parse_positive(value[i], fmt::format("{}[{}]", where, i),
                                      std::numeric_limits<float>::max());
    if (!scale.ok()) return scale.status();
    scales.push_back(*scale);
  }
  return scales;
}

/// {"of": 9, "groups": [0, 4]} as nine flags.
Result<std::vector<uint8_t>> parse_wide_groups(const json& value, const std::string& where,
                                               int64_t k) {
  if (!value.is_object()) return refuse(where, "an object", value);
  NIBBLE_TRY(check_keys(value, where, {"of", "groups"}));
  const json of = value.value("of", json()), groups = value.value("groups", json());
  if (!of.is_number_unsigned() || of.get<uint64_t>() == 0 ||
      static_cast<uint64_t>(k) % of.get<uint64_t>() != 0) {
    return refuse(where + ".of", fmt::format("a divisor of K = {}", k), of);
  }
  if (!groups.is_array()) return refuse(where + ".groups", "an array", groups);
  std::vector<uint8_t> flags(of.get<size_t>(), 0);
  for (size_t i = 0, next = 0; i < groups.size(); ++i) {
    const json& group = groups[i];
    if (!group.is_number_unsigned() || group.get<uint64_t>() < next ||
        group.get<uint64_t>() >= flags.size()) {
      return refuse(fmt::format("{}.groups[{}]", where, i),
                    fmt::format("ascending integers below {}", flags.size()), group);
    }
    flags[group.get<size_t>()] = 1;
    next = group.get<size_t>() + 1;
  }
  return flags;
}

bool is_static(Granularity granularity) {
  return granularity == Granularity::static_tensor || granularity == Granularity::static_group;
}

Result<LinearSpec> parse_spec(const json& value, const std::string& where, int64_t k) {
  if (!value.is_object()) return refuse(where, "an object", value);
  NIBBLE_TRY(check_keys(
      value, where, {"mode", "granularity", "symmetric", "clip", "static_scales", "wide_groups"}));
  LinearSpec spec;
  const auto mode = parse_name(value.value("mode", json()), where + ".mode",
                               {Mode::w4a16, Mode::w4a8, Mode::w4a4}, mode_name);
  if (!mode.ok()) return mode.status();
  spec.mode = *mode;
  if (spec.mode == Mode::w4a16) {
    NIBBLE_TRY(check_keys(value, where + " of mode w4a16", {"mode"}));
    return spec;
  }
  const auto granularity = parse_name(value.value("granularity", json()), where + ".granularity",
                                      {Granularity::tensor, Granularity::token, Granularity::group,
                                       Granularity::static_tensor, Granularity::static_group},
                                      granularity_name);
  if (!granularity.ok()) return granularity.status();
  spec.granularity = *granularity;
  if (const auto at = value.find("symmetric"); at != value.end()) {
    const bool may_be_false = spec.mode == Mode::w4a4 && !is_static(spec.granularity);
    if (!at->is_boolean() || (!at->get<bool>() && !may_be_false)) {
      return refuse(
          where + ".symmetric",
          may_be_false ? "true or false" : "true (only w4a4 with dynamic scales has zero points)",
          *at);
    }
    spec.symmetric = at->get<bool>();
  }
  if (const auto at = value.find("clip"); at != value.end()) {
    const auto clip = parse_positive(*at, where + ".clip", 1);
    if (!clip.ok()) return clip.status();
    spec.clip = *clip;
  }
  const auto scales = value.find("static_scales");
  if ((scales != value.end()) != is_static(spec.granularity)) {
    return refuse(where + ".static_scales",
                  is_static(spec.granularity) ? "the scales of a static granularity"
                                              : "none with a dynamic granularity",
                  scales == value.end() ? json() : *scales);
  }
  if (scales != value.end()) {
    auto parsed = parse_scales(*scales, where + ".static_scales", spec.granularity, k);
    if (!parsed.ok()) return parsed.status();
    spec.static_scales = std::move(*parsed);
  }
  if (const auto at = value.find("wide_groups"); at != value.end()) {
    if (spec.mode != Mode::w4a4 || spec.granularity != Granularity::group) {
      return refuse(where + ".wide_groups", "none except in w4a4 per group", *at);
    }
    auto flags = parse_wide_groups(*at, where + ".wide_groups", k);
    if (!flags.ok()) return flags.status();
    spec.wide_groups = std::move(*flags);
  }
  return spec;
}

/// The object that holds quantization_config: the document, or its text part.
template <class Json>
Json* find_owner(Json& document) {
  if (!document.is_object()) return nullptr;
  if (document.contains(kBlockKey) && document[kBlockKey].is_object()) return &document;
  for (const char* part : {"text_config", "llm_config"}) {
    const auto at = document.find(part);
    if (at != document.end() && at->is_object() && at->contains(kBlockKey) &&
        (*at)[kBlockKey].is_object()) {
      return &*at;
    }
  }
  return nullptr;
}

// ---- writing -----------------------------------------------------------------------------------

json spec_to_json(const LinearSpec& spec) {
  json value = {{"mode", mode_name(spec.mode)}};
  if (spec.mode == Mode::w4a16) return value;
  value["granularity"] = granularity_name(spec.granularity);
  if (!spec.symmetric) value["symmetric"] = false;
  if (spec.clip != 1.0f) value["clip"] = spec.clip;
  if (!spec.static_scales.empty()) value["static_scales"] = spec.static_scales;
  json groups = json::array();
  for (size_t g = 0; g < spec.wide_groups.size(); ++g) {
    if (spec.wide_groups[g] != 0) groups.push_back(g);
  }
  if (!groups.empty()) {
    value["wide_groups"] = {{"of", spec.wide_groups.size()}, {"groups", std::move(groups)}};
  }
  return value;
}

}  // namespace

int64_t slot_channels(const ModelConfig& config, Slot slot) {
  switch (slot) {
    case Slot::qkv:
    case Slot::gate_up: return config.hidden;
    case Slot::o: return config.heads * config.head_dim;
    case Slot::down: return config.intermediate;
  }
  return 0;
}

bool can_hold_plan(const json& document) { return find_owner(document) != nullptr; }

bool has_plan(const json& document) {
  const json* owner = find_owner(document);
  return owner != nullptr && (*owner)[kBlockKey].contains(kPlanKey);
}

Result<ModelPlan> plan_from_config(const json& document, const ModelConfig& config) {
  const json* owner = find_owner(document);
  if (owner == nullptr || !(*owner)[kBlockKey].contains(kPlanKey)) {
    return Status(Code::invalid_argument,
                  "config.json has no plan (quantization_config.nibble); `nibble plan` makes one");
  }
  const std::string where = std::string(kBlockKey) + "." + kPlanKey;
  const json& block = (*owner)[kBlockKey][kPlanKey];
  if (!block.is_object()) return refuse(where, "an object", block);
  const json version = block.value("schema_version", json());
  if (!version.is_number_integer() || version != kPlanSchemaVersion) {
    return refuse(where + ".schema_version", std::to_string(kPlanSchemaVersion), version);
  }
  const json* layers = block.contains("layers") ? &block["layers"] : nullptr;
  if (layers == nullptr || !layers->is_array() ||
      static_cast<int64_t>(layers->size()) != config.layers) {
    return refuse(where + ".layers", fmt::format("an array of {}", config.layers),
                  layers == nullptr ? json() : *layers);
  }
  ModelPlan plan;
  for (size_t i = 0; i < layers->size(); ++i) {
    const json& layer = (*layers)[i];
    const std::string place = fmt::format("{}.layers[{}]", where, i);
    if (!layer.is_object()) return refuse(place, "an object", layer);
    NIBBLE_TRY(check_keys(layer, place,
                          {slot_name(Slot::qkv), slot_name(Slot::o), slot_name(Slot::gate_up),
                           slot_name(Slot::down)}));
    for (int s = 0; s < kSlots; ++s) {
      const auto slot = static_cast<Slot>(s);
      auto spec =
          parse_spec(layer.value(slot_name(slot), json()),
                     fmt::format("{}.{}", place, slot_name(slot)), slot_channels(config, slot));
      if (!spec.ok()) return spec.status();
      plan.specs.push_back(std::move(*spec));
    }
  }
  return plan;
}

json plan_to_json(const ModelPlan& plan) {
  json layers = json::array();
  for (size_t i = 0; i + kSlots <= plan.specs.size(); i += kSlots) {
    json layer;
    for (int s = 0; s < kSlots; ++s) {
      layer[slot_name(static_cast<Slot>(s))] = spec_to_json(plan.specs[i + static_cast<size_t>(s)]);
    }
    layers.push_back(std::move(layer));
  }
  return {{"schema_version", kPlanSchemaVersion}, {"layers", std::move(layers)}};
}

Status store_plan(const std::string& directory, const json& block) {
  const std::string path = (std::filesystem::path(directory) / "config.json").string();
  const auto file = MappedFile::open(path);
  if (!file.ok()) return file.status();
  const std::string_view text(reinterpret_cast<const char*>(file->bytes().data()),
                              file->bytes().size());
  // Checked by the parser for untrusted text first; then again, keeping the order of the keys.
  if (const auto checked = parse_json(text, "config.json"); !checked.ok()) return checked.status();
  auto document = nlohmann::ordered_json::parse(text);
  nlohmann::ordered_json* owner = find_owner(document);
  if (owner == nullptr) {
    return Status(Code::unsupported,
                  fmt::format("{}: expected an object quantization_config to put the plan in, "
                              "found none",
                              path));
  }
  (*owner)[kBlockKey][kPlanKey] = block;
  // What was there is valid UTF-8; names of texts in the block may be anything.
  const std::string output =
      document.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";

  return replace_file(path, [&](OutputFile& to) { return to.write(output.data(), output.size()); });
}

}  // namespace nibble
