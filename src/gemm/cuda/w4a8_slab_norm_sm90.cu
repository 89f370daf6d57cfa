// M <= 2, one launch: residual add and RMSNorm by every block for itself, codes of that row, and
// their product by slab_registers.h; y, or what a gate makes of its halves. The bits are those of
// norm_quantize.cu and the separate product. hidden and delta, 6 bytes an element, come from L2.
#include <cstdint>

#include "gemm/cuda/fused_product.h"
#include "gemm/cuda/norm_device.h"
#include "gemm/cuda/quantize_rows.h"
#include "gemm/cuda/slab_made.h"
#include "gemm/cuda/slab_registers.h"

namespace nibble::cuda::slab {
namespace {

struct NormParams : MadeParams {
  QuantizeArgs to;
  NormArgs norm;
  float* sum = nullptr;
};

template <Element type, int chunks>
struct NormedRow {
  using Parameters = NormParams;
  static constexpr int kChunks = chunks;
  Raw<Element::f32> weight[kChunks];  // there before the row is

  __device__ static int chunk_of(int i) {
    return i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
  }
  __device__ static Raw<Element::f32> load_floats(const float* from, int i, int k_chunks) {
    return load_raw<Element::f32>(from, chunk_of(i), chunk_of(i) < k_chunks);
  }

  __device__ __forceinline__ void prepare(const NormParams& p) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      weight[i] = load_floats(p.norm.norm, i, static_cast<int>(p.norm.k / kChunk));
    }
  }

  struct Fetched {
    Raw<Element::f32> hidden[kChunks];
    Raw<type> delta[kChunks];
  };
  __device__ __forceinline__ Fetched fetch(const NormParams& p, int row, bool inside) const {
    const NormArgs& a = p.norm;
    const int k_chunks = inside ? static_cast<int>(a.k / kChunk) : 0;
    const auto* delta = static_cast<const char*>(a.delta) + row * a.k * 2;
    Fetched f;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      f.hidden[i] = load_floats(a.hidden + row * a.k, i, k_chunks);
      f.delta[i] = load_raw<type>(delta, chunk_of(i), chunk_of(i) < k_chunks && a.delta != nullptr);
    }
    return f;
  }

  __device__ __forceinline__ void make(const NormParams& p, int row, float* scratch,
                                       const Fetched& fetched, Chunk (&x)[kChunks]) const {
    const NormArgs& a = p.norm;
    const int k_chunks = static_cast<int>(a.k / kChunk);
    if (a.delta != nullptr) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) x[i] = values_of<type>(fetched.delta[i]);
      if (a.post_norm != nullptr) {
        const float factor = norm_factor(row_squares(x, k_chunks, scratch + kSlabRowSums), a);
        apply_norm(x, factor, [&](int i) { return load_floats(a.post_norm, i, k_chunks); });
      }
      // The last block has the fewest columns.
      float4* sum =
          blockIdx.x + 1 == gridDim.x ? reinterpret_cast<float4*>(p.sum + row * a.k) : nullptr;
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const Chunk h = values_of<Element::f32>(fetched.hidden[i]);
#pragma unroll
        for (int e = 0; e < kChunk; ++e) x[i].v[e] = h.v[e] + x[i].v[e];
        if (sum == nullptr || chunk_of(i) >= k_chunks) continue;
        const float(&v)[kChunk] = x[i].v;
        sum[2 * chunk_of(i)] = {v[0], v[1], v[2], v[3]};
        sum[2 * chunk_of(i) + 1] = {v[4], v[5], v[6], v[7]};
      }
    } else {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) x[i] = values_of<Element::f32>(fetched.hidden[i]);
    }
    const float factor = norm_factor(row_squares(x, k_chunks, scratch), a);
    apply_norm(x, factor, [&](int i) { return weight[i]; });
  }
};

using NormKernel = MadeKernel<NormParams>;

template <Element type, int promoted, bool group_scales, bool gated, int chunks>
constexpr NormKernel norm_kernel() {
  using Plain = Shape<2, promoted, group_scales>;
  using S = std::conditional_t<gated, GatedShape<Plain>, Plain>;
  return {promoted,
          group_scales,
          gated,
          SlabForm::registers,
          chunks,
          type,
          slab_registers<S, MadeSlice<S, NormedRow<type, chunks>>>};
}

constexpr auto all_kernels() {
  std::array<NormKernel, 36> kernels{};
  int i = 0;
  const auto add = [&]<Element type, int promoted, bool group_scales>() {
    kernels[i++] = norm_kernel<type, promoted, group_scales, false, 1>();
    kernels[i++] = norm_kernel<type, promoted, group_scales, false, 2>();
    kernels[i++] = norm_kernel<type, promoted, group_scales, true, 1>();
  };
  for_all_products<Element::f16, Element::bf16>(add);
  return kernels;
}

bool norm_is_valid(const NormProductArgs& args) {
  const NormArgs& a = args.norm;
  const auto floats = [&](const float* p) { return vector_rows(p, a.k, a.k, Element::f32); };
  const bool sums = args.sum != nullptr && args.sum != a.hidden && floats(args.sum);
  return a.m == args.product.m && a.k == args.product.layout.k && a.gather == nullptr &&
         a.hidden != nullptr && a.norm != nullptr && floats(a.hidden) && floats(a.norm) &&
         floats(a.post_norm) && a.type != Element::f32 && vector_rows(a.delta, a.k, a.k, a.type) &&
         (a.delta == nullptr || sums) && a.k / kChunk <= kSlabRowSums * kSumChunks;
}

}  // namespace
}  // namespace nibble::cuda::slab

namespace nibble::cuda {

cudaError_t launch_w4a8_slab_norm_sm90(const NormProductArgs& args, const SlabConfig& config,
                                       cudaStream_t stream) {
  static constexpr auto kKernels = slab::all_kernels();
  static std::array<std::atomic<uint64_t>, kKernels.size()> devices{};
  const GemmArgs& product = args.product;
  const bool gated = args.gated != nullptr;
  if (!slab::made_of(args.to, product, config) || !slab::norm_is_valid(args) ||
      config.form != SlabForm::registers ||
      (args.ranges.largest != nullptr &&
       args.ranges.count != gated_ranges(product.layout, config)) ||
      (gated && (product.layout.n % (2 * kSlabColumns) != 0 || config.tile_warps < 2 ||
                 product.out.type == Element::f32))) {
    return cudaErrorInvalidValue;
  }
  for (size_t i = 0; i < kKernels.size(); ++i) {
    const slab::NormKernel& kernel = kKernels[i];
    if (!kernel.fits(product, config, gated, args.norm.type)) continue;
    const cudaError_t allowed = slab::allow_shared_memory(kernel.function, devices[i]);
    if (allowed != cudaSuccess) return allowed;
    slab::NormParams params{slab::make_made_params(product, config), args.to, args.norm, args.sum};
    if (gated) {
      const auto pairs = product.layout.tiles / 2;
      const int64_t blocks = slab::block_count(product, config);
      params.tiles = static_cast<int>(pairs / blocks);
      params.more_tiles = static_cast<int>(pairs % blocks);
      params.up_tiles = static_cast<int>(pairs);
      params.gelu_tanh = args.function == GateFunction::gelu_tanh;
      params.out.y = args.gated;
      params.largest = args.ranges.largest;
      params.largest_count = args.ranges.count;
      params.out.stride = args.gated_stride;
    }
    return slab::launch_blocks(kernel.function, product, config, params.shared.total, stream,
                               params);
  }
  return cudaErrorInvalidValue;
}

}  // namespace nibble::cuda
