// Running a model over chunks of text while its slot inputs are counted: what `calibrate` does for
// hours and `plan` for one chunk. Not here: the statistics (model/calibration.h).
#pragma once

#include <functional>
#include <span>
#include <string>

#include "model/calibration.h"
#include "model/model.h"

namespace nibble::cli {

/// Input channels and K-groups of every slot, with no counts. A slot all of whose linears have
/// 16-bit weights counts as one group.
Calibration empty_calibration(const Model& model, const std::string& digest);

/// Called with the input of each slot; the first failure ends the run.
using SlotVisitor =
    std::function<Status(int64_t layer, Slot slot, const float* x, int64_t rows, int64_t k)>;

/// Runs one chunk from an empty cache in W4A16 and shows every slot's input to `visit`.
Status visit_chunk(Model& model, std::span<const int32_t> tokens, const SlotVisitor& visit);

/// visit_chunk that counts.
Status count_chunk(Model& model, std::span<const int32_t> tokens, int threads,
                   Calibration& calibration);

}  // namespace nibble::cli
