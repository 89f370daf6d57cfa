// Whole models on one GPU, as a Runner. In a build without CUDA, or on a machine without a driver,
// these functions answer `unsupported` with the reason.
#pragma once

#include <memory>

#include "format/checkpoint.h"
#include "model/model.h"
#include "model/runner.h"

namespace nibble::cuda {

/// What make_runner() will take of the GPU's memory.
Result<MemoryEstimate> estimate_runner(const Checkpoint& checkpoint, const ModelOptions& options);

/// Loads the model onto the first GPU. options.context and options.sequences bound what its caches
/// hold together; options.threads is ignored. unsupported: see estimate_runner(), head_dim that
/// is not 64, 128 or 256, an 8-bit head, f32 keys and values.
Result<std::unique_ptr<Runner>> make_runner(const Checkpoint& checkpoint,
                                            const ModelOptions& options);

}  // namespace nibble::cuda
