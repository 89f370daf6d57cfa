// One decoder block from 16 to 4 bits: scales of every slot are searched and folded in, then every
// linear is rounded under the inputs it will really see.
// Not here: the steps themselves (awq/scale_search.h, fold.h, rounding.h), files.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "awq/block.h"
#include "awq/calibration_run.h"
#include "awq/rounding.h"

namespace nibble::awq {

struct QuantizeOptions {
  GridOptions grid;
  bool scale = true;  // search scales
  bool clip = true;
  Rounding rounding = Rounding::compensated;
  int ratios = 20;
  int64_t sample_rows = 256;
  int threads = 1;

  /// With group_size -1 replaced by `k`.
  GridOptions grid_for(int64_t k) const;
};

struct QuantizedLinearResult {
  std::string name;
  AwqTensors tensors;
  std::vector<float> bias;  // as it is to be stored; empty if there is none
  Dtype bias_dtype = Dtype::f32;
  double snr_db = 0;        // of the output on the calibration text; infinite if exact
  double plain_snr_db = 0;  // the same for rounding to nearest without any search
};

struct QuantizedBlock {
  std::vector<QuantizedLinearResult> linears;  // those that are quantized
  std::vector<BlockNorm> norms;                // both, changed or not
};

/// `stats` are of the block as it is in the checkpoint. Both arguments are used up. `stop` is asked
/// between steps.
Result<QuantizedBlock> quantize_block(const ModelConfig& config, Block block, SlotStats stats,
                                      const QuantizeOptions& options,
                                      const std::function<bool()>& stop);

/// Bytes beside the block, its statistics and its result.
uint64_t quantize_block_bytes(const ModelConfig& config, const QuantizeOptions& options);

}  // namespace nibble::awq
