#include "model/linear.h"

#include <fmt/format.h>

#include <algorithm>

#include "gemm/cpu/packed_weights.h"

namespace nibble {

Linear::Linear() = default;
Linear::Linear(Linear&&) noexcept = default;
Linear& Linear::operator=(Linear&&) noexcept = default;
Linear::~Linear() = default;

const char* slot_name(Slot slot) {
  switch (slot) {
    case Slot::qkv: return "qkv";
    case Slot::o: return "o";
    case Slot::gate_up: return "gate_up";
    case Slot::down: return "down";
  }
  return "?";
}

std::string LinearSpec::describe() const {
  if (mode == Mode::w4a16) return "w4a16";
  std::string text = fmt::format("{} {}{}", mode_name(mode), granularity_name(granularity),
                                 symmetric ? "" : "-asym");
  if (clip != 1.0f) text += fmt::format(" clip {:.2f}", clip);
  const auto wide = std::count_if(wide_groups.begin(), wide_groups.end(),
                                  [](uint8_t group) { return group != 0; });
  if (wide > 0) text += fmt::format(" ({} of {} groups int8)", wide, wide_groups.size());
  return text;
}

ModelPlan uniform_plan(int64_t layers, Mode mode, std::optional<Granularity> granularity) {
  ModelPlan plan;
  plan.specs.resize(static_cast<size_t>(layers * kSlots));
  for (int64_t layer = 0; layer < layers; ++layer) {
    for (const Slot slot : {Slot::qkv, Slot::o, Slot::gate_up, Slot::down}) {
      LinearSpec& spec = plan.at(layer, slot);
      spec.mode = mode;
      // an e4m3 number has an exponent of its own, and its kernels take one scale a token
      const bool rough =
          mode != Mode::w4a8_fp8 && (slot == Slot::o || slot == Slot::down || mode == Mode::w4a4);
      spec.granularity = granularity.value_or(rough ? Granularity::group : Granularity::token);
      const bool is_static = spec.granularity == Granularity::static_tensor ||
                             spec.granularity == Granularity::static_group;
      spec.symmetric = mode != Mode::w4a4 || is_static;
    }
  }
  return plan;
}

uint64_t Linear::bytes() const {
  if (quantized != nullptr) {
    return static_cast<uint64_t>(quantized->bytes()) + quantized->bias.size() * sizeof(float);
  }
  if (dense != nullptr) return dense->storage.bytes() + dense->bias.size() * sizeof(float);
  return 0;
}

}  // namespace nibble
