// The slab kernel of slab_streamed.h for x of 16 bits: M <= 16, deep K.
#include "gemm/cuda/slab_halves.h"
#include "gemm/cuda/slab_launch.h"
#include "gemm/cuda/slab_streamed.h"

namespace nibble::cuda::slab {
namespace {

template <class S>
struct Streamed {
  static constexpr Function kFunction = slab_streamed<S, HalfSlice<S>>;
};

}  // namespace

cudaError_t launch_halves_streamed(const GemmArgs& args, const SlabConfig& config,
                                   cudaStream_t stream) {
  static constexpr auto kKernels = all_halves_shapes<Streamed>();
  static std::array<std::atomic<uint64_t>, kKernels.size()> devices{};
  return launch(kKernels, devices, args, config, stream);
}

}  // namespace nibble::cuda::slab
