// Activations that each block of a slab kernel makes itself, M <= 2: rows in registers, chunk
// i * blockDim.x + threadIdx.x of a row in x[i] of a thread, become codes and scales in shared
// memory, of which every warp then takes its slices. Arithmetic and bits are those of the
// quantizers (quantize_device.h).
//
// A Source is what makes the rows:
//   Parameters                      MadeParams, the QuantizeArgs `to`, and its own
//   prepare(p)                      asks for what does not come from the kernel in front
//   Fetched, fetch(p, row, inside)  asks for a row; for nothing if not `inside`
//   make(p, row, scratch, fetched, x)
//                                   scratch: floats of this row in shared memory, kSlabRowSums
//                                   twice; all threads come
#pragma once

#include "gemm/cuda/quantize_device.h"
#include "gemm/cuda/slab_launch.h"

namespace nibble::cuda::slab {

/// Largest |x| of a row over the block. One barrier.
__device__ __forceinline__ Range range_of_row(Range mine, uint32_t shared, int row) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const auto place = [&](int w) { return shared + kWarpRanges + (w * kSlabFusedTokens + row) * 4; };
  const uint32_t amax = __reduce_max_sync(kAllLanes, mine.amax);
  if (lane == 0) ptx::store4_shared(place(warp), amax);
  __syncthreads();
  Range all;
  all.amax = __reduce_max_sync(kAllLanes, lane < warps ? ptx::load4_shared(place(lane)) : 0);
  return all;
}

/// choose_encoding() of what made_of() lets through.
__device__ __forceinline__ Encoding made_encoding(uint32_t largest, const QuantizeArgs& a,
                                                  int64_t index) {
  if (largest >= kInfinityBits) {
    Encoding e;
    e.scale = __uint_as_float(0x7fc00000u);
    return e;
  }
  if (a.scaling == Scaling::token || a.scaling == Scaling::group) {
    return symmetric_encoding(largest, a);
  }
  const float limit = static_cast<float>(a.limit), scale = a.static_scales[index];
  return {scale, __fdiv_rn(1.0f, scale), -limit, limit};
}

/// The same of a chunk whose group's scale is its own; stores that scale.
template <class S>
__device__ __forceinline__ Encoding group_encoding(const MadeParams& p, const QuantizeArgs& to,
                                                   const Chunk& x, int row, int chunk,
                                                   uint32_t shared) {
  constexpr int kWidth = S::kPromoted / kChunk;  // lanes of a group
  const int group = chunk / kWidth;
  const Range range = lanes_range(widen({}, x, true), kWidth, true);
  const Encoding e = made_encoding(range.amax, to, min(group, p.groups - 1));
  if (chunk % kWidth == 0 && group < p.groups) {
    ptx::store_float_shared(shared + p.rows.scales + (row * p.groups + group) * 4, e.scale);
  }
  return e;
}

/// A row's codes and scales to shared memory; read after a barrier.
template <class S, int kChunks>
__device__ __forceinline__ void quantize_row(const MadeParams& p, const QuantizeArgs& to,
                                             const Chunk (&x)[kChunks], int row, uint32_t shared) {
  const uint32_t codes = shared + p.shared.activations + row * p.shared.row_pitch;
  const int chunks = p.padded_k / kChunk;
  Encoding e;
  if constexpr (!S::kGroupScales) {
    Range range;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) range = widen(range, x[i], true);
    e = made_encoding(range_of_row(range, shared, row).amax, to, 0);
    if (threadIdx.x == 0) ptx::store_float_shared(shared + kTokenScales + 4 * row, e.scale);
  }
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int chunk = i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    if constexpr (S::kGroupScales) e = group_encoding<S>(p, to, x[i], row, chunk, shared);
    if (chunk < chunks) ptx::store8_shared(codes + chunk * kChunk, encode(x[i], e));
  }
}

/// All rows of the block. Ends with a barrier.
template <class S, class Source>
__device__ __forceinline__ void make_rows(const Source& source,
                                          const typename Source::Fetched (&fetched)[2],
                                          const typename Source::Parameters& p, uint8_t* memory) {
  static_assert(kSlabFusedTokens == 2);
  auto* scratch = reinterpret_cast<float*>(memory + p.rows.scratch);
  typename Source::Fetched now = fetched[0];
#pragma unroll 1
  for (int row = 0; row < p.m; ++row) {
    Chunk x[Source::kChunks];
    source.make(p, row, scratch + row * 2 * kSlabRowSums, now, x);
    quantize_row<S>(p, p.to, x, row, ptx::shared_address(memory));
    now = fetched[1];
  }
  __syncthreads();
}

/// What all do with the rows that lie in shared memory.
template <class S>
struct MadeRows {
  static constexpr bool kMade = true, kStays = true;
  HeldSlice<S> held;
  SliceScales<S> scales;

  __device__ static int early_slabs(const MadeParams& p, const Place& at) {
    return at.warp < p.early_warps ? 1 : 0;
  }
  __device__ __forceinline__ void hold(const MadeParams& p, const Place& at, uint32_t shared,
                                       int slice) {
    held.load(at, shared + p.shared.activations + slice * kSlabDepth, p.shared.row_pitch, p.m,
              [](uint32_t from) { return ptx::load8_shared(from); });
    if constexpr (S::kGroupScales) {
      scales.load(p, at, slice, [&](int64_t index) {
        return ptx::load_float_shared(shared + p.rows.scales + 4 * static_cast<int>(index));
      });
    }
  }
  __device__ __forceinline__ void put(const Place& at, uint32_t table) const {
    write_sums<S>(at, table, held);
    if constexpr (S::kGroupScales) scales.store(at, table);
  }
  __device__ __forceinline__ void multiply(const Place& at, uint32_t slab, uint32_t table,
                                           bool bf16_scales, Accumulator<S>& acc) const {
    acc.add(at, slab, table, bf16_scales, held);
  }
  /// rows: where the codes begin
  __device__ __forceinline__ void take(const MadeParams& p, const Place& at, uint32_t rows,
                                       uint32_t table, int slice) {
    hold(p, at, rows - p.shared.activations, slice);
    put(at, table);
  }
};

template <class S, class Source>
struct MadeSlice : MadeRows<S> {
  using Parameters = typename Source::Parameters;
  Source source;
  typename Source::Fetched fetched[kSlabFusedTokens];

  __device__ __forceinline__ void prepare(const Parameters& p) { source.prepare(p); }
  __device__ __forceinline__ void fetch(const Parameters& p, const Place&) {
#pragma unroll
    for (int row = 0; row < kSlabFusedTokens; ++row) {
      fetched[row] = source.fetch(p, row, row < p.m);
    }
  }

  // form `registers`
  __device__ __forceinline__ void load(const Parameters& p, const Place& at, uint8_t* memory) {
    make_rows<S>(source, fetched, p, memory);
    this->hold(p, at, ptx::shared_address(memory), min(at.k_warp, p.slices - 1));
  }
  __device__ __forceinline__ void store(const Place& at, uint32_t, uint32_t table) {
    this->put(at, table);
  }

  // form `streamed`
  __device__ __forceinline__ void make(const Parameters& p, const Place&, uint8_t* memory) {
    make_rows<S>(source, fetched, p, memory);
  }
};

// ---- host side ---------------------------------------------------------------------------------

inline MadeParams make_made_params(const GemmArgs& args, const SlabConfig& config) {
  MadeParams p;
  static_cast<Params&>(p) = make_params(args, config);
  p.rows = slab_rows(args.layout, args.m, args.group_scales, p.shared);
  p.early_warps = config.early_warps;
  return p;
}

/// add<type, promoted, group_scales>() for each of `types` and all that weights and scales can be.
template <Element... types, class Add>
constexpr void for_all_products(const Add& add) {
  const auto add_depth = [&]<Element type, int promoted>() {
    add.template operator()<type, promoted, false>();
    add.template operator()<type, promoted, true>();
  };
  const auto add_type = [&]<Element type>() {
    add_depth.template operator()<type, 128>();
    add_depth.template operator()<type, 64>();
    add_depth.template operator()<type, 32>();
  };
  (add_type.template operator()<types>(), ...);
}

/// What a kernel that makes its rows takes.
template <class Parameters>
struct MadeKernel {
  int promoted;
  bool group_scales, gated;
  SlabForm form;
  int chunks;  // slab_row_chunks()
  Element type;
  void (*function)(Parameters);

  bool fits(const GemmArgs& args, const SlabConfig& config, bool with_gate, Element of) const {
    return promoted == args.layout.promoted && group_scales == args.group_scales &&
           gated == with_gate && form == config.form && chunks == slab_row_chunks(config) &&
           type == of;
  }
};

/// Whether slab_quantizing_config() has made the configuration for these arguments, as far as it
/// can be seen, and the quantizer is one of those above.
inline bool made_of(const QuantizeArgs& to, const GemmArgs& product, const SlabConfig& config) {
  const PackedLayout& w = product.layout;
  const bool by_group = to.scaling == Scaling::group || to.scaling == Scaling::static_group;
  const bool holds_all =
      w.padded_k() <= int64_t{32} * config.warps() * slab_row_chunks(config) * kChunk;
  const bool has_slices = config.form == SlabForm::streamed || config.k_warps >= w.slices;
  return config.quantizes && product.m >= 1 && product.m <= kSlabFusedTokens && to.symmetric &&
         to.kind == cuda::Codes::int8 && to.scaling != Scaling::tensor && w.k % kChunk == 0 &&
         by_group == product.group_scales && (!by_group || w.group_size == w.promoted) &&
         holds_all && has_slices;
}

}  // namespace nibble::cuda::slab
