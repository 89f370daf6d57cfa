// All linears of a checkpoint: quantized and dense ones by the suffixes of their tensors' names, in
// natural order, and whether layers that an engine fuses agree. Not here: which format the tensors
// of one layer have (linear_format.cc).
#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "format/linear_format.h"
#include "format/message.h"

namespace nibble {
namespace {

/// "layer 2" before "layer 10": runs of digits compare as numbers of any length.
bool natural_less(std::string_view a, std::string_view b) {
  const auto digits = [](std::string_view text) {
    size_t length = 0;
    while (length < text.size() && text[length] >= '0' && text[length] <= '9') ++length;
    return length;
  };
  while (!a.empty() && !b.empty()) {
    const size_t a_digits = digits(a), b_digits = digits(b);
    if (a_digits > 0 && b_digits > 0) {
      const auto without_zeros = [](std::string_view number) {
        number.remove_prefix(std::min(number.find_first_not_of('0'), number.size() - 1));
        return number;
      };
      const auto a_number = without_zeros(a.substr(0, a_digits));
      const auto b_number = without_zeros(b.substr(0, b_digits));
      if (a_number.size() != b_number.size()) return a_number.size() < b_number.size();
      if (a_number != b_number) return a_number < b_number;
      a.remove_prefix(a_digits);
      b.remove_prefix(b_digits);
    } else {
      if (a[0] != b[0]) return a[0] < b[0];
      a.remove_prefix(1);
      b.remove_prefix(1);
    }
  }
  return a.size() < b.size();
}

template <class Linear>
void sort_naturally(std::vector<Linear>& linears) {
  std::stable_sort(linears.begin(), linears.end(),
                   [](const Linear& a, const Linear& b) { return natural_less(a.name, b.name); });
}

/// `name` without `suffix`, or nothing.
std::optional<std::string> prefix_of(std::string_view name, std::string_view suffix) {
  if (name.size() <= suffix.size() || !name.ends_with(suffix)) return std::nullopt;
  return std::string(name.substr(0, name.size() - suffix.size()));
}

}  // namespace

std::vector<QuantizedLinear> find_quantized_linears(const TensorMap& tensors,
                                                    const QuantConfig& config) {
  std::vector<QuantizedLinear> linears;
  for (const auto& [name, view] : tensors) {
    if (const auto prefix = prefix_of(name, ".qweight")) {
      linears.push_back(recognise_linear(tensors, *prefix, SuffixFamily::awq, config));
    } else if (const auto ct_prefix = prefix_of(name, ".weight_packed")) {
      linears.push_back(
          recognise_linear(tensors, *ct_prefix, SuffixFamily::compressed_tensors, config));
    }
  }
  sort_naturally(linears);
  return linears;
}

std::vector<QuantizedLinear> find_quantized_linears(const Checkpoint& checkpoint) {
  return find_quantized_linears(checkpoint.tensors(), checkpoint.quant_config());
}

std::vector<DenseLinear> find_dense_linears(const Checkpoint& checkpoint) {
  std::vector<DenseLinear> linears;
  for (const auto& [name, view] : checkpoint.tensors()) {
    const auto prefix = prefix_of(name, ".weight");
    const bool matrix = view.shape.size() == 2 && view.shape[0] > 0 && view.shape[1] > 0;
    if (!prefix || !matrix || !float_dtype(view.dtype)) continue;
    if (prefix->find("embed") != std::string::npos) continue;
    if (checkpoint.find(*prefix + ".qweight") != nullptr) continue;
    if (checkpoint.find(*prefix + ".weight_packed") != nullptr) continue;
    linears.push_back(
        {*prefix, view.shape[1], view.shape[0], &view, checkpoint.find(*prefix + ".bias")});
  }
  sort_naturally(linears);
  return linears;
}

std::vector<std::string> check_fused_siblings(const std::vector<QuantizedLinear>& linears,
                                              const std::vector<DenseLinear>& dense) {
  // What must be equal among siblings, as the text that is printed if it is not.
  std::map<std::string_view, std::string> described;
  for (const QuantizedLinear& linear : linears) {
    std::string text = linear_format_name(linear.format);
    if (linear.status.ok()) {
      text += fmt::format(" group size {} with {} scales", linear.matrix.group_size,
                          dtype_name(linear.matrix.scale_dtype));
    }
    described.emplace(linear.name, text);
  }
  for (const DenseLinear& linear : dense) described.emplace(linear.name, "not quantized");

  static const std::vector<std::vector<std::string>> kFamilies = {{"q_proj", "k_proj", "v_proj"},
                                                                  {"gate_proj", "up_proj"}};
  std::vector<std::string> parents;
  for (const auto& [name, text] : described) {
    for (const auto& family : kFamilies) {
      for (const std::string& leaf : family) {
        const auto parent = prefix_of(name, "." + leaf);
        if (parent) parents.push_back(*parent);
      }
    }
  }
  std::sort(parents.begin(), parents.end(), natural_less);
  parents.erase(std::unique(parents.begin(), parents.end()), parents.end());

  std::vector<std::string> sentences;
  for (const std::string& parent : parents) {
    for (const auto& family : kFamilies) {
      std::vector<std::string> members;
      bool differ = false;
      const std::string* first = nullptr;
      for (const std::string& leaf : family) {
        const auto found = described.find(parent + "." + leaf);
        if (found == described.end()) continue;
        if (first == nullptr) first = &found->second;
        differ |= *first != found->second;
        members.push_back(fmt::format("{} is {}", leaf, found->second));
      }
      if (differ) {
        sentences.push_back(
            fmt::format("{}: fused layers disagree: {}.", parent, joined(members, ", ")));
      }
    }
  }
  return sentences;
}

}  // namespace nibble
