// Launches of the quantizing kernels whose values are made chunk by chunk from memory. A Source is
// what makes them; a plain struct, passed to the kernel:
//   args()                     the QuantizeArgs
//   kVector                    rows are 16-byte aligned and of a length that 8 divides
//   fetch(row, chunk, inside)  loads; zeros if not `inside`, and from k on
//   values(fetched)            a Chunk, once the loads are back
// Rows of up to 32768 elements stay in registers between range and codes; longer ones, and those
// that must be read element by element, are made twice.
#pragma once

#include <algorithm>
#include <bit>

#include "gemm/cuda/quantize_device.h"

namespace nibble::cuda {

inline constexpr int kRowThreads = 1024;
inline constexpr int kRowRegisters = 65536 / kRowThreads;  // of a thread at most
inline constexpr int kMostChunks = 4;                      // a thread's, in registers
inline constexpr int64_t kFewParts = 256;  // blocks that do not fill a GPU: speed is latency then
inline constexpr int kLaneThreads = 128;

/// The launch of one kernel over all rows.
struct RowGrid {
  Reach reach = Reach::block;
  int parts = 1;  // of a row
  int threads = 0;
  int chunks = 0;  // of a thread; 0: more than stay in registers, or rows not read by vectors
  Dealing dealing;
};

/// One block makes `longest` chunks; there are `blocks` such. One chunk a thread where blocks are
/// few; more where they are many, so that a thread has several loads in flight and few threads wait
/// for each other.
inline void deal_block(RowGrid* g, int longest, int64_t blocks, bool vector) {
  g->chunks = blocks <= kFewParts || longest < 128 ? 1 : longest < 512 ? 2 : kMostChunks;
  while (g->chunks < kMostChunks && longest > g->chunks * kRowThreads) g->chunks *= 2;
  g->threads = std::min(((longest + g->chunks - 1) / g->chunks + 31) / 32 * 32, kRowThreads);
  if (!vector || g->threads * g->chunks < longest) g->chunks = 0;
}

/// Scales per group of up to 128 elements.
inline bool lane_groups(const QuantizeArgs& a) {
  return (a.scaling == Scaling::group || a.scaling == Scaling::static_group) &&
         a.group_size < a.k && a.group_size <= kBlockDepth;
}

inline Dealing row_dealing(const QuantizeArgs& a) {
  Dealing d;
  d.sums = static_cast<int>(a.padded_k / a.promoted);
  d.sum_shift = std::countr_zero(static_cast<unsigned>(a.promoted / kChunk));
  if (lane_groups(a)) {
    d.groups = static_cast<int>(a.k / a.group_size);
    d.group_shift = std::countr_zero(static_cast<unsigned>(a.group_size / kChunk));
  }
  return d;
}

/// A block a row, or a row's group if that is longer than 128; or, groups of 32, 64 and 128, as
/// many chunks as there are.
inline RowGrid row_grid(const QuantizeArgs& a, bool vector) {
  RowGrid g;
  g.dealing = row_dealing(a);
  const int row_chunks = static_cast<int>(a.padded_k / kChunk);
  if (lane_groups(a)) {
    const bool few = a.m * row_chunks < kFewParts * kLaneThreads * kMostChunks;
    g.reach = Reach::lanes;
    g.threads = kLaneThreads;
    g.chunks = few || !vector ? 1 : kMostChunks;
    g.dealing.part_chunks = g.threads * g.chunks;
    g.parts = (row_chunks + g.dealing.part_chunks - 1) / g.dealing.part_chunks;
    return g;
  }
  int longest = row_chunks;
  const bool by_group = a.scaling == Scaling::group || a.scaling == Scaling::static_group;
  if (by_group && a.group_size < a.k) {
    g.parts = static_cast<int>(a.k / a.group_size);
    g.dealing.part_chunks = static_cast<int>(a.group_size / kChunk);
    longest = row_chunks - (g.parts - 1) * g.dealing.part_chunks;
  }
  deal_block(&g, longest, a.m * g.parts, vector);
  return g;
}

/// Whether a matrix of k columns can be loaded 16 bytes at a time.
inline bool vector_rows(const void* x, int64_t stride, int64_t k, Element type) {
  return reinterpret_cast<uintptr_t>(x) % 16 == 0 && stride * element_bytes(type) % 16 == 0 &&
         k % kChunk == 0;
}

/// The chunks of this block: [first, end) of its row.
struct Part {
  int first, end;
};
__device__ __forceinline__ Part block_part(const QuantizeArgs& a, const Dealing& d) {
  const int part = blockIdx.y, first = part * d.part_chunks;
  const bool last = part + 1 == static_cast<int>(gridDim.y);
  return {first, last ? static_cast<int>(a.padded_k / kChunk) : first + d.part_chunks};
}

template <class Source, int kChunks, Reach reach>
__device__ __forceinline__ void quantize_row(const Source& source, const Dealing& dealing) {
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  const QuantizeArgs& a = source.args();
  const int64_t row = blockIdx.x;
  const Part part = block_part(a, dealing);
  decltype(source.fetch(0, 0, true)) fetched[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int chunk = part.first + i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    fetched[i] = source.fetch(row, chunk, chunk < part.end);
  }
  Chunk x[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) x[i] = source.values(fetched[i]);
  quantize_part<kChunks, reach>(x, a, dealing, row, part.first, part.end);
}

template <class Source, int kChunks, Reach reach>
__global__ void __launch_bounds__(kRowThreads, 1)
    quantize_rows(const __grid_constant__ Source source, const __grid_constant__ Dealing dealing) {
  quantize_row<Source, kChunks, reach>(source, dealing);
}

/// The same for a Source that names its kRegisters, those of a thread with kMostChunks of one
/// scale. A limit on registers and one on threads make ptxas schedule differently, and which is
/// faster depends on the source (docs/notes.md).
template <class Source, int kChunks, Reach reach>
__global__ void __maxnreg__(kChunks == kMostChunks && reach == Reach::block ? Source::kRegisters
                                                                            : kRowRegisters)
    quantize_rows_in(const __grid_constant__ Source source,
                     const __grid_constant__ Dealing dealing) {
  quantize_row<Source, kChunks, reach>(source, dealing);
}

template <class Source, int kChunks, Reach reach>
constexpr auto rows_kernel() {
  if constexpr (requires { Source::kRegisters; }) {
    return quantize_rows_in<Source, kChunks, reach>;
  } else {
    return quantize_rows<Source, kChunks, reach>;
  }
}

template <class Source>
__global__ void __launch_bounds__(kRowThreads, 1)
    quantize_long_rows(const __grid_constant__ Source source,
                       const __grid_constant__ Dealing dealing) {
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  const QuantizeArgs& a = source.args();
  const int64_t row = blockIdx.x;
  const Part part = block_part(a, dealing);
  Range range;
  for (int chunk = part.first + static_cast<int>(threadIdx.x); chunk < part.end;
       chunk += static_cast<int>(blockDim.x)) {
    range = widen(range, source.values(source.fetch(row, chunk, true)), a.symmetric);
  }
  const Encoding e = choose_encoding(block_range(range, a.symmetric), a, blockIdx.y);
  if (threadIdx.x == 0) a.scales[row * gridDim.y + blockIdx.y] = e.scale;
  for (int first = part.first; first < part.end; first += static_cast<int>(blockDim.x)) {
    const int chunk = first + static_cast<int>(threadIdx.x);  // whole warps come along
    const bool inside = chunk < part.end;
    store_chunk(source.values(source.fetch(row, chunk, inside)), e, a, dealing, row, chunk, inside);
  }
}

/// Launches `kernel`, programmatically if asked to.
template <class... Parameters, class... Arguments>
cudaError_t launch_rows(void (*kernel)(Parameters...), dim3 grid, int threads, bool programmatic,
                        cudaStream_t stream, Arguments... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = programmatic ? 1 : 0;
  void* parameters[] = {static_cast<void*>(&arguments)...};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), parameters);
}

template <class Source>
cudaError_t launch_quantize_rows(const Source& source, cudaStream_t stream) {
  const QuantizeArgs& a = source.args();
  const RowGrid g = row_grid(a, Source::kVector);
  void (*kernel)(Source, Dealing) = quantize_long_rows<Source>;
  if (g.reach == Reach::lanes) kernel = rows_kernel<Source, 1, Reach::lanes>();
  if constexpr (Source::kVector) {
    if (g.reach == Reach::lanes) {
      if (g.chunks == 4) kernel = rows_kernel<Source, 4, Reach::lanes>();
    } else {
      if (g.chunks == 1) kernel = rows_kernel<Source, 1, Reach::block>();
      if (g.chunks == 2) kernel = rows_kernel<Source, 2, Reach::block>();
      if (g.chunks == 4) kernel = rows_kernel<Source, 4, Reach::block>();
    }
  }
  const dim3 grid(static_cast<unsigned>(a.m), static_cast<unsigned>(g.parts));
  return launch_rows(kernel, grid, g.threads, a.programmatic, stream, source, g.dealing);
}

}  // namespace nibble::cuda
