// Linear layers of a model as they are held in memory, and how each one is multiplied.
//   LinearSpec   what the user or the plan asks for (mode, activation scales)
//   Linear       packed weights: 4-bit (gemm/gemm.h) or 16-bit (gemm/dense.h)
//   LinearGroup  linears that share one input (q,k,v; o; gate,up; down) and one call
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "format/checkpoint.h"
#include "format/linear_format.h"
#include "gemm/dense.h"
#include "gemm/gemm.h"

namespace nibble {

/// The four inputs of a decoder layer that linears are multiplied with.
enum class Slot : int { qkv = 0, o = 1, gate_up = 2, down = 3 };
inline constexpr int kSlots = 4;
const char* slot_name(Slot slot);  // "qkv", "o", "gate_up", "down"

/// How the linears of one slot are run. Ignored by 16-bit weights.
struct LinearSpec {
  Mode mode = Mode::w4a16;
  Granularity granularity = Granularity::token;
  bool symmetric = true;
  float clip = 1.0f;
  std::vector<float> static_scales;  // static_tensor: 1; static_group: K / group_size
  // w4a4 per group only: groups of K that are quantized to 8 bits instead of 4. Empty: none.
  std::vector<uint8_t> wide_groups;

  std::string describe() const;  // "w4a8 token", "w4a4 group-asym (3 of 9 groups int8)", ...
};

/// The specs of a whole model: layers * kSlots.
struct ModelPlan {
  std::vector<LinearSpec> specs;
  const LinearSpec& at(int64_t layer, Slot slot) const {
    return specs[static_cast<size_t>(layer * kSlots + static_cast<int>(slot))];
  }
  LinearSpec& at(int64_t layer, Slot slot) {
    return specs[static_cast<size_t>(layer * kSlots + static_cast<int>(slot))];
  }
};

/// The same mode everywhere. `granularity` absent: the default mix: per group for o and down, whose
/// inputs AWQ has not smoothed, and for w4a4; per token for the rest. w4a4 is asymmetric.
ModelPlan uniform_plan(int64_t layers, Mode mode, std::optional<Granularity> granularity = {});

/// One linear layer: exactly one of `quantized` and `dense` is set.
struct Linear {
  std::string name;
  int64_t k = 0, n = 0;
  std::unique_ptr<PackedWeights> quantized;
  std::unique_ptr<DenseWeights> dense;

  Linear();
  Linear(Linear&&) noexcept;
  Linear& operator=(Linear&&) noexcept;
  ~Linear();
  uint64_t bytes() const;  // of the packed weights
};

struct LinearGroup {
  std::vector<Linear> linears;
};

}  // namespace nibble
