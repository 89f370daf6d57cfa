// The slab kernel of slab_streamed.h for int8 activations: M <= 16, deep K.
#include "gemm/cuda/slab_codes.h"
#include "gemm/cuda/slab_launch.h"
#include "gemm/cuda/slab_streamed.h"

namespace nibble::cuda::slab {
namespace {

template <class S>
struct Streamed {
  static constexpr Function kFunction = slab_streamed<S, CodeSlice<S>>;
};

}  // namespace

cudaError_t launch_streamed(const GemmArgs& args, const SlabConfig& config, cudaStream_t stream) {
  static constexpr auto kKernels = all_shapes<Streamed>();
  static std::array<std::atomic<uint64_t>, kKernels.size()> devices{};
  return launch(kKernels, devices, args, config, stream);
}

}  // namespace nibble::cuda::slab
