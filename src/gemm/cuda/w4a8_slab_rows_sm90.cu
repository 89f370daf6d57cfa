// M <= 2, one launch: rows of x, which every block quantizes for itself, times packed weights, by
// slab_registers.h or slab_streamed.h. The bits are those of quantize.cu and the separate product.
#include "gemm/cuda/fused_product.h"
#include "gemm/cuda/quantize_rows.h"
#include "gemm/cuda/slab_made.h"
#include "gemm/cuda/slab_registers.h"
#include "gemm/cuda/slab_streamed.h"

namespace nibble::cuda::slab {
namespace {

struct RowParams : MadeParams {
  QuantizeArgs to;
  RowRanges ranges;
};

template <Element type, int chunks>
struct GivenRow {
  using Parameters = RowParams;
  static constexpr int kChunks = chunks;

  __device__ __forceinline__ void prepare(const RowParams&) {}
  struct Fetched {
    Raw<type> x[kChunks];
  };
  __device__ __forceinline__ Fetched fetch(const RowParams& p, int row, bool inside) const {
    const auto* from = static_cast<const char*>(p.to.x) + row * p.to.x_stride * element_bytes(type);
    Fetched f;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int chunk = i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
      f.x[i] = load_raw<type>(from, chunk, inside && chunk < static_cast<int>(p.to.k / kChunk));
    }
    return f;
  }
  __device__ __forceinline__ void make(const RowParams&, int, float*, const Fetched& fetched,
                                       Chunk (&x)[kChunks]) const {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) x[i] = values_of<type>(fetched.x[i]);
  }
};

/// Float rows of known ranges, form `streamed`: each warp makes the codes of its own slices and
/// waits for no other. Lane l has chunks l and 32 + l of a slice.
template <class S>
struct RangedSlice : MadeRows<S> {
  using Parameters = RowParams;
  static constexpr int kChunks = kSlabStreamedChunks, kWords = kMostRowRanges / 128;
  static_assert(kSlabDepth == 2 * 32 * kChunk);
  Raw<Element::f32> x[kChunks];
  uint4 largest[kWords];

  __device__ static int slice_of(const RowParams& p, const Place& at, int i) {
    return at.k_warp + i / 2 * p.k_warps;
  }
  __device__ static int chunk_of(const RowParams& p, const Place& at, int i) {
    return slice_of(p, at, i) * (kSlabDepth / kChunk) + i % 2 * 32 + at.lane;
  }
  __device__ __forceinline__ void fetch_row(const RowParams& p, const Place& at, int row) {
    const auto* from = static_cast<const float*>(p.to.x) + row * p.to.x_stride;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int chunk = chunk_of(p, at, i);
      x[i] = load_raw<Element::f32>(from, chunk, chunk < static_cast<int>(p.to.k / kChunk));
    }
    if constexpr (!S::kGroupScales) {
      const uint32_t* ranges = p.ranges.largest + row * p.ranges.count;
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int first = 4 * (i * 32 + at.lane);
        largest[i] = {};
        if (first < p.ranges.count) largest[i] = ptx::load16(ranges + first);
      }
    }
  }

  __device__ __forceinline__ void fetch(const RowParams& p, const Place& at) {
    fetch_row(p, at, 0);
  }
  __device__ __forceinline__ void make(const RowParams& p, const Place& at, uint8_t* memory) {
    const uint32_t shared = ptx::shared_address(memory);
#pragma unroll 1
    for (int row = 0; row < p.m; ++row) {
      if (row > 0) fetch_row(p, at, row);
      Encoding e;
      if constexpr (!S::kGroupScales) {
        uint32_t all = 0;
#pragma unroll
        for (const uint4& v : largest) all = max(max(max(all, v.x), max(v.y, v.z)), v.w);
        all = __reduce_max_sync(kAllLanes, all);
        e = made_encoding(all, p.to, 0);
        if (threadIdx.x == 0) ptx::store_float_shared(shared + kTokenScales + 4 * row, e.scale);
      }
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const int chunk = chunk_of(p, at, i);
        const Chunk values = values_of<Element::f32>(x[i]);
        if constexpr (S::kGroupScales) {
          e = group_encoding<S>(p, p.to, values, row, chunk, shared);
        }
        if (slice_of(p, at, i) >= p.slices) continue;
        ptx::store8_shared(
            shared + p.shared.activations + row * p.shared.row_pitch + chunk * kChunk,
            encode(values, e));
      }
    }
    __syncwarp();
  }
};

using RowKernel = MadeKernel<RowParams>;

template <Element type, int promoted, bool group_scales, SlabForm form, int chunks>
constexpr RowKernel row_kernel() {
  using S = Shape<2, promoted, group_scales>;
  using Activations = MadeSlice<S, GivenRow<type, chunks>>;
  if constexpr (form == SlabForm::streamed) {
    return {promoted, group_scales, false, form, chunks, type, slab_streamed<S, Activations>};
  } else {
    return {promoted, group_scales, false, form, chunks, type, slab_registers<S, Activations>};
  }
}

constexpr auto all_kernels() {
  std::array<RowKernel, 54> kernels{};
  int i = 0;
  const auto add = [&]<Element type, int promoted, bool group_scales>() {
    kernels[i++] = row_kernel<type, promoted, group_scales, SlabForm::registers, 1>();
    kernels[i++] =
        row_kernel<type, promoted, group_scales, SlabForm::registers, kSlabRegistersChunks>();
    kernels[i++] =
        row_kernel<type, promoted, group_scales, SlabForm::streamed, kSlabStreamedChunks>();
  };
  for_all_products<Element::f32, Element::f16, Element::bf16>(add);
  return kernels;
}

template <int promoted, bool group_scales>
constexpr RowKernel ranged_kernel() {
  using S = Shape<2, promoted, group_scales>;
  return {promoted,
          group_scales,
          false,
          SlabForm::streamed,
          kSlabStreamedChunks,
          Element::f32,
          slab_streamed<S, RangedSlice<S>>};
}

constexpr auto ranged_kernels() {
  std::array<RowKernel, 6> kernels{};
  int i = 0;
  for_all_products<Element::f32>([&]<Element type, int promoted, bool group_scales>() {
    kernels[i++] = ranged_kernel<promoted, group_scales>();
  });
  return kernels;
}

bool ranges_are_valid(const RowRanges& r, const QuantizeArgs& x) {
  if (r.count == 0) return true;
  return x.type == Element::f32 && r.count > 0 && r.count <= kMostRowRanges && r.count % 4 == 0 &&
         r.largest != nullptr && reinterpret_cast<uintptr_t>(r.largest) % 16 == 0;
}

template <size_t count>
cudaError_t launch_rows_kernel(const std::array<RowKernel, count>& kernels,
                               std::array<std::atomic<uint64_t>, count>& devices,
                               const RowParams& params, const GemmArgs& product,
                               const SlabConfig& config, cudaStream_t stream) {
  for (size_t i = 0; i < count; ++i) {
    const RowKernel& kernel = kernels[i];
    if (!kernel.fits(product, config, false, params.to.type)) continue;
    const cudaError_t allowed = allow_shared_memory(kernel.function, devices[i]);
    if (allowed != cudaSuccess) return allowed;
    return launch_blocks(kernel.function, product, config, params.shared.total, stream, params);
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace nibble::cuda::slab

namespace nibble::cuda {

cudaError_t launch_w4a8_slab_rows_sm90(const QuantizeArgs& x, const GemmArgs& product,
                                       const SlabConfig& config, cudaStream_t stream,
                                       const RowRanges& ranges) {
  static constexpr auto kKernels = slab::all_kernels();
  static constexpr auto kRanged = slab::ranged_kernels();
  static std::array<std::atomic<uint64_t>, kKernels.size()> devices{};
  static std::array<std::atomic<uint64_t>, kRanged.size()> ranged_devices{};
  if (!slab::made_of(x, product, config) || x.x == nullptr || x.m != product.m ||
      x.k != product.layout.k || !vector_rows(x.x, x.x_stride, x.k, x.type) ||
      !slab::ranges_are_valid(ranges, x)) {
    return cudaErrorInvalidValue;
  }
  const slab::RowParams params{slab::make_made_params(product, config), x, ranges};
  const bool ranged = ranges.count > 0 && config.form == SlabForm::streamed;
  return ranged ? slab::launch_rows_kernel(kRanged, ranged_devices, params, product, config, stream)
                : slab::launch_rows_kernel(kKernels, devices, params, product, config, stream);
}

}  // namespace nibble::cuda
