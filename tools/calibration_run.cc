#include "calibration_run.h"

#include "base/cpu_features.h"
#include "gemm/cpu/packed_weights.h"

namespace nibble::cli {

Calibration empty_calibration(const Model& model, const std::string& digest) {
  std::vector<SlotStatistics> slots;
  for (int64_t layer = 0; layer < model.config().layers; ++layer) {
    for (const LinearGroup& group : model.layer(layer).groups) {
      const int64_t k = group.linears.front().k;
      int64_t size = k;
      for (const Linear& linear : group.linears) {
        if (linear.quantized != nullptr) size = linear.quantized->group_size;
      }
      slots.emplace_back(k, size);
    }
  }
  return Calibration(digest, std::move(slots));
}

Status visit_chunk(Model& model, std::span<const int32_t> tokens, const SlotVisitor& visit) {
  NIBBLE_TRY(model.set_plan(uniform_plan(model.config().layers, Mode::w4a16)));
  KvCache cache = model.make_cache();
  std::vector<float> hidden(tokens.size() * static_cast<size_t>(model.config().hidden));
  Status failure;
  const BatchItem item{&cache, tokens};
  NIBBLE_TRY(model.forward({&item, 1}, hidden.data(),
                           [&](int64_t layer, Slot slot, const float* x, int64_t rows, int64_t k) {
                             if (failure.ok()) failure = visit(layer, slot, x, rows, k);
                           }));
  return failure;
}

Status count_chunk(Model& model, std::span<const int32_t> tokens, int threads,
                   Calibration& calibration) {
  const int used = threads > 0 ? threads : available_cpus();
  return visit_chunk(model, tokens,
                     [&](int64_t layer, Slot slot, const float* x, int64_t rows, int64_t k) {
                       return calibration.add(layer, slot, x, rows, k, used);
                     });
}

}  // namespace nibble::cli
