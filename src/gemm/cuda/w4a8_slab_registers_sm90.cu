// The slab kernel of slab_registers.h for int8 activations: M <= 16, K of at most 16 slices.
#include "gemm/cuda/slab_codes.h"
#include "gemm/cuda/slab_launch.h"
#include "gemm/cuda/slab_registers.h"

namespace nibble::cuda::slab {
namespace {

template <class S>
struct Registers {
  static constexpr Function kFunction = slab_registers<S, CodeSlice<S>>;
};

}  // namespace

cudaError_t launch_registers(const GemmArgs& args, const SlabConfig& config, cudaStream_t stream) {
  static constexpr auto kKernels = all_shapes<Registers>();
  static std::array<std::atomic<uint64_t>, kKernels.size()> devices{};
  return launch(kKernels, devices, args, config, stream);
}

}  // namespace nibble::cuda::slab
