// Norm of q and k, rope, and k and v into the cache: a few lanes a head, each of which has one
// chunk of eight channels of either half of the head, so both ends of every rotated pair.
#include <bit>

#include "gemm/cuda/launch.h"
#include "gemm/cuda/quantize_device.h"
#include "model/cuda/check.h"
#include "model/cuda/kv_device.h"
#include "model/cuda/rope_device.h"

namespace nibble::cuda {
namespace {

constexpr int kThreads = 128;

/// x / sqrt(mean(x^2) + eps) * weight over the head. Squares: those of a lane one after the other,
/// then pairwise over the lanes.
__device__ __forceinline__ void normalize(Halves& x, const float* weight, int chunk, int chunks,
                                          int lanes, float eps) {
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) squares = __fmaf_rn(x.a.v[i], x.a.v[i], squares);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) squares = __fmaf_rn(x.b.v[i], x.b.v[i], squares);
#pragma unroll
  for (int d = 8; d > 0; d /= 2) {
    if (d < lanes) squares = squares + __shfl_xor_sync(kAllLanes, squares, d);
  }
  const float mean = squares / static_cast<float>(chunks * 2 * kChunk);
  const float factor = 1.0f / sqrtf(mean + eps);
  const bool inside = chunk < chunks;
  const Chunk wa = values_of<Element::f32>(load_raw<Element::f32>(weight, chunk, inside));
  const Chunk wb = values_of<Element::f32>(load_raw<Element::f32>(weight, chunk + chunks, inside));
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    x.a.v[i] = x.a.v[i] * factor * wa.v[i];
    x.b.v[i] = x.b.v[i] * factor * wb.v[i];
  }
}

template <Element type, Element kv_type>
__global__ void __launch_bounds__(kThreads)
    rope_heads(const __grid_constant__ RopeArgs a, const __grid_constant__ int lanes) {
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  const int kv_heads = static_cast<int>(a.kv.kv_heads), q_heads = static_cast<int>(a.heads);
  const int all_heads = q_heads + 2 * kv_heads;
  const int64_t unit = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / lanes;
  const int64_t row = unit / all_heads;
  const int head = static_cast<int>(unit - row * all_heads);
  const int chunk = static_cast<int>(threadIdx.x) % lanes;
  const int chunks = static_cast<int>(a.kv.head_dim) / (2 * kChunk);  // of half a head
  const int position = row < a.rows ? a.position[row] : -1;
  const bool inside = position >= 0 && chunk < chunks;  // whole warps come along to the shuffles
  const auto* from =
      static_cast<const char*>(a.qkv) + (row * a.qkv_stride + int64_t{head} * a.kv.head_dim) * 2;
  const Raw<type> raw_a = load_raw<type>(from, chunk, inside);
  const Raw<type> raw_b = load_raw<type>(from, chunk + chunks, inside);
  const bool is_q = head < q_heads, is_v = head >= q_heads + kv_heads;
  Raw<Element::f32> raw_cosine = {}, raw_sine = {};
  if (!is_v && inside) {
    const int64_t angles = int64_t{position} * (a.kv.head_dim / 2);
    raw_cosine = load_raw<Element::f32>(a.cosine + angles, chunk, true);
    raw_sine = load_raw<Element::f32>(a.sine + angles, chunk, true);
  }
  int sequence = 0;
  int64_t to = 0;
  if (inside) {
    sequence = a.sequence[row];
    if (!is_q) {
      to = page_head_offset(a.kv, sequence, position / kPagePositions, (head - q_heads) % kv_heads);
    }
  }
  Halves x = {values_of<type>(raw_a), values_of<type>(raw_b)};
  if (a.q_norm != nullptr) {  // v too, for the shuffles; it is taken anew below
    normalize(x, is_q ? a.q_norm : a.k_norm, chunk, chunks, lanes, a.eps);
  }
  if (!inside) return;
  if (is_v) {
    x = {values_of<type>(raw_a), values_of<type>(raw_b)};
  } else {
    rotate(x, values_of<Element::f32>(raw_cosine), values_of<Element::f32>(raw_sine));
  }
  bool good;
  if (is_q) {
    good = finite(x.a) && finite(x.b);
    auto* q = reinterpret_cast<uint4*>(static_cast<char*>(a.q) +
                                       (row * a.q_stride + int64_t{head} * a.kv.head_dim) * 2);
    q[chunk] = rounded<kv_type>(x.a);
    q[chunk + chunks] = rounded<kv_type>(x.b);
  } else {
    const bool fits_a = fit<kv_type>(x.a), fits_b = fit<kv_type>(x.b);
    good = fits_a && fits_b;
    char* page = static_cast<char*>(is_v ? a.kv.values : a.kv.keys) + to;
    const int t = position % kPagePositions;
    *reinterpret_cast<uint4*>(page + piece_offset(t, chunk)) = rounded<kv_type>(x.a);
    *reinterpret_cast<uint4*>(page + piece_offset(t, chunk + chunks)) = rounded<kv_type>(x.b);
  }
  if (!good) a.faults[sequence] = 1;
}

template <Element type>
cudaError_t launch(const RopeArgs& args, const Launch& how, int lanes) {
  return args.kv.type == Element::f16
             ? launch_kernel(rope_heads<type, Element::f16>, how, args, lanes)
             : launch_kernel(rope_heads<type, Element::bf16>, how, args, lanes);
}

}  // namespace

cudaError_t launch_rope(const RopeArgs& args, cudaStream_t stream) {
  if (!pages_are_valid(args.kv) || !is_16_bits(args.type) || args.heads < 1 ||
      args.heads % args.kv.kv_heads != 0 || args.rows < 1 || !is_rows(args.qkv, args.qkv_stride) ||
      !is_rows(args.q, args.q_stride) || (args.q == args.qkv && args.type != args.kv.type) ||
      (args.q_norm == nullptr) != (args.k_norm == nullptr)) {
    return cudaErrorInvalidValue;
  }
  const int lanes = static_cast<int>(std::bit_ceil(static_cast<unsigned>(args.kv.head_dim / 16)));
  const int64_t threads = args.rows * (args.heads + 2 * args.kv.kv_heads) * lanes;
  Launch how;
  how.grid = dim3(static_cast<unsigned>((threads + kThreads - 1) / kThreads));
  how.threads = kThreads;
  how.stream = stream;
  how.programmatic = args.programmatic;
  return args.type == Element::f16 ? launch<Element::f16>(args, how, lanes)
                                   : launch<Element::bf16>(args, how, lanes);
}

}  // namespace nibble::cuda
