// Host side of the slab kernels: arguments to Params, the kernel for a shape, its launch.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>

#include "gemm/cuda/slab_output.h"

namespace nibble::cuda::slab {

inline int64_t block_count(const GemmArgs& args, const SlabConfig& config) {
  return std::min<int64_t>(config.blocks, args.layout.tiles);
}

/// Everything that a kernel reads, from what was asked for.
inline Params make_params(const GemmArgs& args, const SlabConfig& config) {
  const PackedLayout& w = args.layout;
  const int64_t blocks = block_count(args, config);
  Params p;
  p.slabs = args.slabs;
  p.codes = args.codes;
  p.scales = args.scales;
  p.x = static_cast<const uint8_t*>(args.x);
  p.x_row_bytes = args.x_stride * 2;
  p.out = args.out;
  p.shared = slab_shared(w, args.m, args.group_scales, config);
  p.tile_bytes = w.slices * w.slab_bytes;
  p.m = static_cast<int>(args.m);
  p.n = static_cast<int>(w.n);
  p.x_columns = static_cast<int>(args.x_columns);
  p.padded_k = static_cast<int>(w.padded_k());
  p.slices = static_cast<int>(w.slices);
  p.slab_bytes = w.slab_bytes;
  p.groups = static_cast<int>(w.k / w.group_size);
  p.group_size = static_cast<int>(w.group_size);
  p.tiles = static_cast<int>(w.tiles / blocks);
  p.more_tiles = static_cast<int>(w.tiles % blocks);
  p.k_warps = config.k_warps;
  p.tile_warps_log2 = std::countr_zero(static_cast<unsigned>(config.tile_warps));
  p.stages = config.stages;
  p.held_tiles = config.held_tiles;
  p.k_warps_inverse = 65536 / config.k_warps + 1;
  p.bf16_scales = args.bf16_scales;
  p.activations_first = !config.programmatic;
  return p;
}

using Function = void (*)(Params);

/// A kernel is compiled for each shape; this is one of them.
struct Kernel {
  int columns, promoted;
  bool group_scales;
  Function function;
  Element type = Element::f32;  // of x, in w4a16

  bool fits(const GemmArgs& args, const SlabConfig& config) const {
    return columns == slab_token_columns(args.m, config.halves) &&
           promoted == args.layout.promoted &&
           (config.halves ? type == args.x_type : group_scales == args.group_scales);
  }
};

/// All shapes of one kernel template.
template <template <class> class Instance>
constexpr std::array<Kernel, 18> all_shapes() {
  std::array<Kernel, 18> kernels{};
  int i = 0;
  const auto add = [&]<int columns, int promoted>() {
    kernels[i++] = {columns, promoted, false, Instance<Shape<columns, promoted, false>>::kFunction};
    kernels[i++] = {columns, promoted, true, Instance<Shape<columns, promoted, true>>::kFunction};
  };
  const auto add_depths = [&]<int columns>() {
    add.template operator()<columns, 128>();
    add.template operator()<columns, 64>();
    add.template operator()<columns, 32>();
  };
  add_depths.template operator()<2>();
  add_depths.template operator()<8>();
  add_depths.template operator()<16>();
  return kernels;
}

/// All shapes of w4a16.
template <template <class> class Instance>
constexpr std::array<Kernel, 12> all_halves_shapes() {
  std::array<Kernel, 12> kernels{};
  int i = 0;
  const auto add = [&]<int columns, int promoted, Element type>() {
    kernels[i++] = {columns, promoted, false,
                    Instance<HalvesShape<columns, promoted, type>>::kFunction, type};
  };
  const auto add_depths = [&]<int columns, Element type>() {
    add.template operator()<columns, 128, type>();
    add.template operator()<columns, 64, type>();
    add.template operator()<columns, 32, type>();
  };
  add_depths.template operator()<8, Element::f16>();
  add_depths.template operator()<8, Element::bf16>();
  add_depths.template operator()<16, Element::f16>();
  add_depths.template operator()<16, Element::bf16>();
  return kernels;
}

/// Allows `function` the shared memory of a whole multiprocessor, once on each device. Safe from
/// several threads: setting it twice does no harm.
template <class Parameters>
cudaError_t allow_shared_memory(void (*function)(Parameters), std::atomic<uint64_t>& devices) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const uint64_t bit = uint64_t{1} << (device % 64);
  if (device < 64 && (devices.load(std::memory_order_relaxed) & bit) != 0) return cudaSuccess;
  int bytes = 0;
  if (const cudaError_t error =
          cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      error != cudaSuccess) {
    return error;
  }
  const cudaError_t error =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) devices.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

template <class Parameters>
cudaError_t launch_blocks(void (*function)(Parameters), const GemmArgs& args,
                          const SlabConfig& config, int64_t shared_bytes, cudaStream_t stream,
                          const Parameters& parameters) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(block_count(args, config)));
  launch.blockDim = dim3(32 * config.warps());
  launch.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  launch.stream = stream;
  launch.attrs = &attribute;
  launch.numAttrs = config.programmatic ? 1 : 0;
  return cudaLaunchKernelEx(&launch, function, parameters);
}

/// Launches that of `kernels` which fits. devices: one for each, zero at first.
template <size_t count>
cudaError_t launch(const std::array<Kernel, count>& kernels,
                   std::array<std::atomic<uint64_t>, count>& devices, const GemmArgs& args,
                   const SlabConfig& config, cudaStream_t stream) {
  for (size_t i = 0; i < count; ++i) {
    const Kernel& kernel = kernels[i];
    if (!kernel.fits(args, config)) continue;
    if (const cudaError_t error = allow_shared_memory(kernel.function, devices[i]);
        error != cudaSuccess) {
      return error;
    }
    const Params params = make_params(args, config);
    return launch_blocks(kernel.function, args, config, params.shared.total, stream, params);
  }
  return cudaErrorInvalidValue;
}

// One for each form, in the file of its name.
cudaError_t launch_registers(const GemmArgs& args, const SlabConfig& config, cudaStream_t stream);
cudaError_t launch_streamed(const GemmArgs& args, const SlabConfig& config, cudaStream_t stream);
cudaError_t launch_halves_registers(const GemmArgs& args, const SlabConfig& config,
                                    cudaStream_t stream);
cudaError_t launch_halves_streamed(const GemmArgs& args, const SlabConfig& config,
                                   cudaStream_t stream);

}  // namespace nibble::cuda::slab
