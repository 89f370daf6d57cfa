// From a checkpoint to a model on a GPU: what will be taken of its memory, and taking it.
#pragma once

#include "format/checkpoint.h"
#include "model/cuda/forward.h"
#include "model/cuda/runner.h"
#include "model/model.h"

namespace nibble::cuda {

/// Everything decided before the first byte is uploaded.
struct LoadPlan {
  DeviceInfo device;
  ModelConfig config;
  ModelNames names;
  Element type = Element::bf16;  // see DeviceModel
  KvShape kv;
  int64_t pass_rows = 0;
  WeightForm form = WeightForm::as_stored;
  bool expanded = false;  // ModelOptions::expanded
  int threads = 1;        // that load
  MemoryEstimate memory;
};

/// unsupported: no GPU, a shape or an option that does not run there; corrupt_file as
/// parse_model_config() and find_layer().
Result<LoadPlan> plan_load(const Checkpoint& checkpoint, const ModelOptions& options,
                           WeightForm form);
/// out_of_memory, with the parts, if the estimate exceeds what is free.
Status check_fits(const LoadPlan& plan);
/// Uploads everything but keys, values and workspace. The plan's device is current.
Status load_model(const Checkpoint& checkpoint, const LoadPlan& plan, DeviceModel& model);

}  // namespace nibble::cuda
