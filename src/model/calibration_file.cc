// Calibrations as safetensors files. Reading one trusts nothing: every tensor's type and shape, and
// that counts agree with each other, as far as a plan or a scale could be wrong because of it.
#include <fmt/format.h>

#include <cmath>
#include <deque>
#include <map>
#include <nlohmann/json.hpp>

#include "format/message.h"
#include "format/safetensors.h"
#include "model/calibration.h"

namespace nibble {
namespace {

using nlohmann::json;

constexpr const char* kFormat = "nibble.calibration";
constexpr const char* kSchemaVersion = "1";
constexpr size_t kMostSlots = 4 * 4096;
constexpr int64_t kMostChannels = int64_t{1} << 24;

std::string tensor_name(size_t slot, const char* what) {
  return fmt::format("nibble.calibration.layers.{}.{}.{}", slot / kSlots,
                     slot_name(static_cast<Slot>(slot % kSlots)), what);
}

// ---- writing -----------------------------------------------------------------------------------

/// Tensors that own their bytes.
class Tensors {
 public:
  template <class T>
  void add(const std::string& name, TensorDtype dtype, std::vector<int64_t> shape,
           const std::vector<T>& values) {
    const auto* data = reinterpret_cast<const std::byte*>(values.data());
    bytes_.emplace_back(data, data + values.size() * sizeof(T));
    map_[name] = {dtype, std::move(shape), bytes_.back().data(), bytes_.back().size()};
  }
  template <class S>
  void add_sums(const std::string& name, std::span<const S> sums) {
    std::vector<double> values;
    for (const S& sum : sums) values.push_back(sum.value());
    for (const S& sum : sums) values.push_back(sum.remainder());
    add(name, TensorDtype::f64, {2, static_cast<int64_t>(sums.size())}, values);
  }
  const TensorMap& map() const { return map_; }

 private:
  std::deque<std::vector<std::byte>> bytes_;
  TensorMap map_;
};

void add_slot(Tensors& tensors, size_t index, const SlotStatistics& s) {
  const auto name = [&](const char* what) { return tensor_name(index, what); };
  tensors.add(name("counts"), TensorDtype::i64, {4},
              std::vector<int64_t>{s.channels, s.group_size, static_cast<int64_t>(s.tokens),
                                   static_cast<int64_t>(s.clip_rows)});
  tensors.add_sums<Sum>(name("channel_sum_abs"), s.sum_abs);
  tensors.add_sums<Sum>(name("channel_sum_squares"), s.sum_squares);
  tensors.add(name("channel_max_abs"), TensorDtype::f32, {s.channels}, s.max_abs);
  tensors.add(name("channel_min"), TensorDtype::f32, {s.channels}, s.minimum);
  tensors.add(name("channel_max"), TensorDtype::f32, {s.channels}, s.maximum);
  tensors.add_sums<FourthPowerSum>(name("sum_fourth"), {&s.sum_fourth, 1});
  tensors.add_sums<Sum>(name("token_sum_amax"), {&s.sum_token_amax, 1});
  tensors.add_sums<Sum>(name("group_sum_amax"), s.sum_group_amax);
  tensors.add(name("token_amax_histogram"), TensorDtype::u64, {kHistogramBins}, s.token_amax);
  tensors.add(name("group_amax_histogram"), TensorDtype::u64, {s.groups(), kHistogramBins},
              s.group_amax);
  tensors.add_sums<Sum>(name("clip_error"), s.clip_error);
}

// ---- reading -----------------------------------------------------------------------------------

Status corrupt(const std::string& name, const std::string& what) {
  return Status(Code::corrupt_file, fmt::format("calibration: {}: {}", name, what));
}

class Reader {
 public:
  explicit Reader(const SafetensorsIndex& index) : index_(index) {}

  template <class T>
  Status read(const std::string& name, TensorDtype dtype, const std::vector<int64_t>& shape,
              std::vector<T>& values) const {
    const auto at = index_.tensors.find(name);
    if (at == index_.tensors.end()) return corrupt(name, "no such tensor");
    TensorView wanted{dtype, shape, nullptr, 0};
    if (at->second.dtype != dtype || at->second.shape != shape) {
      return corrupt(name, fmt::format("expected {} {}, found {} {}", tensor_dtype_name(dtype),
                                       wanted.shape_text(), tensor_dtype_name(at->second.dtype),
                                       at->second.shape_text()));
    }
    values.resize(static_cast<size_t>(wanted.elements()));
    std::memcpy(values.data(), at->second.data, at->second.bytes);
    return {};
  }

  template <class S>
  Status read_sums(const std::string& name, std::span<S> sums) const {
    std::vector<double> values;
    NIBBLE_TRY(read(name, TensorDtype::f64, {2, static_cast<int64_t>(sums.size())}, values));
    for (size_t i = 0; i < sums.size(); ++i) {
      // Every sum here is one of magnitudes.
      if (values[i] >= 0 && sums[i].set(values[i], values[i + sums.size()])) continue;
      return corrupt(name, fmt::format("element {}: expected a sum as it was written, found {} and "
                                       "{}",
                                       i, values[i], values[i + sums.size()]));
    }
    return {};
  }

  Status read_counts(const std::string& name, const std::vector<int64_t>& shape, uint64_t tokens,
                     std::vector<uint64_t>& bins) const {
    NIBBLE_TRY(read(name, TensorDtype::u64, shape, bins));
    for (size_t first = 0; first < bins.size(); first += kHistogramBins) {
      if (counts_fit(bins, first, tokens)) continue;
      return corrupt(name, fmt::format("expected counts of {} tokens in every row, row {} differs",
                                       tokens, first / kHistogramBins));
    }
    return {};
  }

 private:
  static bool counts_fit(const std::vector<uint64_t>& bins, size_t first, uint64_t tokens) {
    uint64_t sum = 0;
    for (size_t i = first; i < first + kHistogramBins; ++i) {
      if (bins[i] > tokens - sum) return false;
      sum += bins[i];
    }
    return sum == tokens;
  }

  const SafetensorsIndex& index_;
};

Result<SlotStatistics> read_slot(const Reader& reader, size_t index) {
  const auto name = [&](const char* what) { return tensor_name(index, what); };
  std::vector<int64_t> counts;
  NIBBLE_TRY(reader.read(name("counts"), TensorDtype::i64, {4}, counts));
  const int64_t channels = counts[0], group_size = counts[1];
  if (channels < 1 || channels > kMostChannels || group_size < 1 || channels % group_size != 0 ||
      counts[2] < 0 || counts[3] < 0) {
    return corrupt(name("counts"), fmt::format("expected channels, a group size that divides them, "
                                               "tokens and rows, found [{}]",
                                               joined(counts, ", ")));
  }
  // Before anything is allocated by it: the tensor must have as many elements.
  std::vector<float> max_abs;
  NIBBLE_TRY(reader.read(name("channel_max_abs"), TensorDtype::f32, {channels}, max_abs));
  SlotStatistics s(channels, group_size);
  s.tokens = static_cast<uint64_t>(counts[2]);
  s.clip_rows = static_cast<uint64_t>(counts[3]);
  s.max_abs = std::move(max_abs);
  NIBBLE_TRY(reader.read(name("channel_min"), TensorDtype::f32, {channels}, s.minimum));
  NIBBLE_TRY(reader.read(name("channel_max"), TensorDtype::f32, {channels}, s.maximum));
  for (const auto* values : {&s.max_abs, &s.minimum, &s.maximum}) {
    for (size_t c = 0; c < values->size(); ++c) {
      if (std::isfinite((*values)[c]) && s.max_abs[c] >= 0) continue;
      return corrupt(name("channel_max_abs"), fmt::format("channel {} has no finite range", c));
    }
  }
  NIBBLE_TRY(reader.read_sums<Sum>(name("channel_sum_abs"), s.sum_abs));
  NIBBLE_TRY(reader.read_sums<Sum>(name("channel_sum_squares"), s.sum_squares));
  NIBBLE_TRY(reader.read_sums<FourthPowerSum>(name("sum_fourth"), {&s.sum_fourth, 1}));
  NIBBLE_TRY(reader.read_sums<Sum>(name("token_sum_amax"), {&s.sum_token_amax, 1}));
  NIBBLE_TRY(reader.read_sums<Sum>(name("group_sum_amax"), s.sum_group_amax));
  NIBBLE_TRY(
      reader.read_counts(name("token_amax_histogram"), {kHistogramBins}, s.tokens, s.token_amax));
  NIBBLE_TRY(reader.read_counts(name("group_amax_histogram"), {s.groups(), kHistogramBins},
                                s.tokens, s.group_amax));
  NIBBLE_TRY(reader.read_sums<Sum>(name("clip_error"), s.clip_error));
  return s;
}

json texts_to_json(const std::vector<CalibrationText>& texts) {
  json list = json::array();
  for (const CalibrationText& text : texts) {
    list.push_back({{"name", text.name},
                    {"sha256", text.digest},
                    {"context", text.context},
                    {"chunks_done", text.chunks_done},
                    {"chunks_total", text.chunks_total}});
  }
  return list;
}

Status read_texts(const json& list, Calibration& calibration) {
  const Status refusal = corrupt("texts",
                                 "expected a list of name, sha256, context, chunks_done "
                                 "and chunks_total");
  if (!list.is_array()) return refusal;
  for (const json& item : list) {
    if (!item.is_object()) return refusal;
    const json name = item.value("name", json()), digest = item.value("sha256", json());
    if (!name.is_string() || !digest.is_string()) return refusal;
    CalibrationText text{name.get<std::string>(), digest.get<std::string>()};
    for (const auto& [key, field] : {std::pair{"context", &CalibrationText::context},
                                     std::pair{"chunks_done", &CalibrationText::chunks_done},
                                     std::pair{"chunks_total", &CalibrationText::chunks_total}}) {
      const json number = item.value(key, json());
      if (!number.is_number_unsigned() || number.get<uint64_t>() > (uint64_t{1} << 40)) {
        return refusal;
      }
      text.*field = number.get<int64_t>();
    }
    calibration.text(text.digest) = text;
  }
  return {};
}

}  // namespace

Status Calibration::save(const std::string& path) const {
  Tensors tensors;
  for (size_t i = 0; i < slots_.size(); ++i) add_slot(tensors, i, slots_[i]);
  // A name may hold any byte; JSON is UTF-8.
  const std::string texts =
      texts_to_json(texts_).dump(-1, ' ', true, json::error_handler_t::replace);
  return write_safetensors(path, tensors.map(),
                           {{"format", kFormat},
                            {"schema_version", kSchemaVersion},
                            {"model_digest", model_digest_},
                            {"layers", std::to_string(layers())},
                            {"tokens", std::to_string(tokens())},
                            {"texts", texts}});
}

Result<Calibration> Calibration::load(const std::string& path) {
  const auto file = MappedFile::open(path);
  if (!file.ok()) return file.status();
  const auto index = parse_safetensors(file->bytes(), path);
  if (!index.ok()) return index.status();
  const auto metadata = [&](const char* key) -> std::string {
    const auto at = index->metadata.find(key);
    return at == index->metadata.end() ? "" : at->second;
  };
  if (metadata("format") != kFormat) {
    return Status(Code::invalid_argument,
                  fmt::format("{}: expected statistics of `nibble calibrate`, found another "
                              "safetensors file",
                              path));
  }
  if (metadata("schema_version") != kSchemaVersion) {
    return corrupt(path, fmt::format("expected schema_version {}, found {}", kSchemaVersion,
                                     quote_name(metadata("schema_version"))));
  }
  const auto texts = parse_json(metadata("texts"), path);
  if (!texts.ok()) return texts.status();
  const Reader reader(*index);
  std::vector<SlotStatistics> slots;
  while (slots.size() < kMostSlots &&
         index->tensors.contains(tensor_name(slots.size(), "counts"))) {
    auto slot = read_slot(reader, slots.size());
    if (!slot.ok()) return slot.status();
    if (!slots.empty() && slot->tokens != slots.front().tokens) {
      return corrupt(tensor_name(slots.size(), "counts"),
                     fmt::format("expected {} tokens as in the first slot, found {}",
                                 slots.front().tokens, slot->tokens));
    }
    slots.push_back(std::move(*slot));
  }
  if (slots.empty() || std::to_string(slots.size() / kSlots) != metadata("layers") ||
      slots.size() % kSlots != 0) {
    return corrupt(path, fmt::format("expected {} layers, found {} slots",
                                     quote_name(metadata("layers")), slots.size()));
  }
  Calibration calibration(metadata("model_digest"), std::move(slots));
  NIBBLE_TRY(read_texts(*texts, calibration));
  return calibration;
}

}  // namespace nibble
