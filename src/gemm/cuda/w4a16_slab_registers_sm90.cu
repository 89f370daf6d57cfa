// The slab kernel of slab_registers.h for x of 16 bits: M <= 16, and K of at most as many slices as
// a block has warps.
#include "gemm/cuda/slab_halves.h"
#include "gemm/cuda/slab_launch.h"
#include "gemm/cuda/slab_registers.h"

namespace nibble::cuda::slab {
namespace {

template <class S>
struct Registers {
  static constexpr Function kFunction = slab_registers<S, HalfSlice<S>>;
};

}  // namespace

cudaError_t launch_halves_registers(const GemmArgs& args, const SlabConfig& config,
                                    cudaStream_t stream) {
  static constexpr auto kKernels = all_halves_shapes<Registers>();
  static std::array<std::atomic<uint64_t>, kKernels.size()> devices{};
  return launch(kKernels, devices, args, config, stream);
}

}  // namespace nibble::cuda::slab
