// Whole models on one GPU, as a Runner. In a build without CUDA, or on a machine without a driver,
// these functions answer `unsupported` with the reason.
#pragma once

#include <memory>

#include "format/checkpoint.h"
#include "model/model.h"
#include "model/runner.h"

namespace nibble::cuda {

/// How the linears of a checkpoint are held.
enum class WeightForm {
  as_stored,    // 4-bit ones packed, 16-bit ones as they are
  dequantized,  // 4-bit ones as bf16, (q - z) * s rounded once: what 4 bits are compared with
};

/// What make_runner() will take of the GPU's memory.
Result<MemoryEstimate> estimate_runner(const Checkpoint& checkpoint, const ModelOptions& options,
                                       WeightForm form = WeightForm::as_stored);

/// Loads the model onto the first GPU. options.context and options.sequences bound what its caches
/// hold together; options.threads is used to load. unsupported: see estimate_runner(), head_dim
/// that is not a multiple of 16 up to 256, an 8-bit head, f32 keys and values.
Result<std::unique_ptr<Runner>> make_runner(const Checkpoint& checkpoint,
                                            const ModelOptions& options,
                                            WeightForm form = WeightForm::as_stored);

}  // namespace nibble::cuda
