// The door to the slab kernels; see slab_plan.h for what they are.
#include "gemm/cuda/slab_launch.h"

namespace nibble::cuda {

cudaError_t launch_w4a8_slab_sm90(const GemmArgs& args, const SlabConfig& config,
                                  cudaStream_t stream) {
  switch (config.form) {
    case SlabForm::registers: return slab::launch_registers(args, config, stream);
    case SlabForm::streamed: return slab::launch_streamed(args, config, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_w4a16_slab_sm90(const GemmArgs& args, const SlabConfig& config,
                                   cudaStream_t stream) {
  switch (config.form) {
    case SlabForm::registers: return slab::launch_halves_registers(args, config, stream);
    case SlabForm::streamed: return slab::launch_halves_streamed(args, config, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace nibble::cuda
