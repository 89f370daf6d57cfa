// See step_fusion.h.
#include "model/cuda/step_fusion.h"

namespace nibble::cuda {
namespace {

/// The kernels take two; what that costs, row after row in every block, has not been measured.
constexpr int64_t kFusedRows = 1;

}  // namespace

std::optional<SlabConfig> fused_config(const Plan& plan, Fusion fusion, const DeviceInfo& device) {
  const Problem& p = plan.problem;
  const bool int8 = p.mode == Mode::w4a8 || p.mode == Mode::w4a4;
  if (plan.family != KernelFamily::slab || !int8 || p.m > kFusedRows || !p.symmetric ||
      p.granularity == Granularity::tensor || p.x_dtype == Dtype::f32) {
    return std::nullopt;
  }
  const bool gated = fusion == Fusion::norm_and_gate;
  const PackedLayout layout = packed_layout(p.n, p.k, p.group_size);
  if (gated && p.n % (2 * kSlabColumns) != 0) return std::nullopt;
  std::optional<SlabConfig> config =
      slab_quantizing_config(layout, p.m, scales_per_group(p.granularity), gated,
                             device.multiprocessors, device.shared_bytes);
  if (!config || (fusion != Fusion::rows && config->form != SlabForm::registers)) {
    return std::nullopt;
  }
  config->programmatic = plan.slab.programmatic;
  return config;
}

}  // namespace nibble::cuda
