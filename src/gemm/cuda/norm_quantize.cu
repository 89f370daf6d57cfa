// Residual add + RMSNorm, and what its result becomes: codes, 16 bits, or nothing. A block a row;
// the row is read once and stays in registers.
#include <algorithm>

#include "gemm/cuda/fused_quantize.h"
#include "gemm/cuda/launch.h"
#include "gemm/cuda/norm_device.h"
#include "gemm/cuda/quantize_rows.h"

namespace nibble::cuda {
namespace {

constexpr int kThreadChunks = 2;  // a thread's at most: 16 floats, and as many of the residual
constexpr int kMostSums = kRowThreads * kThreadChunks / kSumChunks;

/// What becomes of the row.
enum class Result { block_codes, lane_codes, bits16, none };

/// Destination in 16 bits.
struct Out {
  void* data = nullptr;
  int64_t stride = 0;
};

template <Element type, int kChunks, Result result>
__global__ void __launch_bounds__(kRowThreads, 1)
    norm_rows(const __grid_constant__ NormArgs a, const __grid_constant__ QuantizeArgs to,
              const __grid_constant__ Dealing dealing, const __grid_constant__ Out out) {
  __shared__ float partial[2][kMostSums];
  ptx::grid_launch_dependents();
  const int k_chunks = static_cast<int>(a.k / kChunk);
  const int row_chunks = result == Result::bits16 || result == Result::none
                             ? k_chunks
                             : static_cast<int>(to.padded_k / kChunk);
  const auto chunk_of = [](int i) {
    return i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
  };
  const auto load_floats = [&](const float* from, int i) {
    return load_raw<Element::f32>(from, chunk_of(i), chunk_of(i) < k_chunks);
  };
  // Few rows: the weight is there before the row is. Many: registers are worth more, and other
  // blocks run meanwhile.
  constexpr bool kEarlyWeight = kChunks == 1 && result != Result::none;
  Raw<Element::f32> early = {};
  if constexpr (kEarlyWeight) early = load_floats(a.norm, 0);
  ptx::grid_wait();
  const int64_t row = blockIdx.x;
  const int64_t from = a.gather != nullptr ? a.gather[row] : row;
  float* hidden = a.hidden + from * a.k;
  Raw<Element::f32> raw[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) raw[i] = load_floats(hidden, i);
  Chunk x[kChunks];
  if (a.delta != nullptr) {
    const auto* delta = static_cast<const char*>(a.delta) + from * a.k * 2;
    Raw<type> raw_delta[kChunks];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      raw_delta[i] = load_raw<type>(delta, chunk_of(i), chunk_of(i) < k_chunks);
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) x[i] = values_of<type>(raw_delta[i]);
    if (a.post_norm != nullptr) {
      const float factor = norm_factor(row_squares(x, k_chunks, partial[1]), a);
      apply_norm(x, factor, [&](int i) { return load_floats(a.post_norm, i); });
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const Chunk h = values_of<Element::f32>(raw[i]);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) x[i].v[e] = h.v[e] + x[i].v[e];
    }
    if (a.gather == nullptr) {
      auto* sum = reinterpret_cast<float4*>(hidden);
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        if (chunk_of(i) >= k_chunks) continue;
        const float(&v)[kChunk] = x[i].v;
        sum[2 * chunk_of(i)] = {v[0], v[1], v[2], v[3]};
        sum[2 * chunk_of(i) + 1] = {v[4], v[5], v[6], v[7]};
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) x[i] = values_of<Element::f32>(raw[i]);
  }
  if constexpr (result != Result::none) {
    const float factor = norm_factor(row_squares(x, k_chunks, partial[0]), a);
    apply_norm(x, factor, [&](int i) { return kEarlyWeight ? early : load_floats(a.norm, i); });
  }
  if constexpr (result == Result::block_codes) {
    quantize_part<kChunks, Reach::block>(x, to, dealing, row, 0, row_chunks);
  } else if constexpr (result == Result::lane_codes) {
    quantize_part<kChunks, Reach::lanes>(x, to, dealing, row, 0, row_chunks);
  } else if constexpr (result == Result::bits16) {
    auto* y = reinterpret_cast<uint4*>(static_cast<char*>(out.data) + row * out.stride * 2);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (chunk_of(i) < k_chunks) y[chunk_of(i)] = rounded<type>(x[i]);
    }
  }
}

template <Element type, Result result>
cudaError_t launch(const NormArgs& args, const QuantizeArgs& to, const Out& out, int64_t row_chunks,
                   cudaStream_t stream) {
  Dealing dealing;
  if (result == Result::block_codes || result == Result::lane_codes) dealing = row_dealing(to);
  const bool one = row_chunks <= kRowThreads && (args.m <= kFewParts || row_chunks < 128);
  const int chunks = one ? 1 : kThreadChunks;
  Launch how;
  how.grid = dim3(static_cast<unsigned>(args.m));
  how.threads = static_cast<int>(((row_chunks + chunks - 1) / chunks + 31) / 32 * 32);
  how.stream = stream;
  how.programmatic = args.programmatic;
  return one ? launch_kernel(norm_rows<type, 1, result>, how, args, to, dealing, out)
             : launch_kernel(norm_rows<type, kThreadChunks, result>, how, args, to, dealing, out);
}

template <Result result>
cudaError_t launch(const NormArgs& args, const QuantizeArgs& to, const Out& out, int64_t row_chunks,
                   cudaStream_t stream) {
  return args.type == Element::f16
             ? launch<Element::f16, result>(args, to, out, row_chunks, stream)
             : launch<Element::bf16, result>(args, to, out, row_chunks, stream);
}

bool is_valid(const NormArgs& a, bool with_norm) {
  const auto floats = [&](const float* p) { return vector_rows(p, a.k, a.k, Element::f32); };
  return a.m > 0 && a.k > 0 && a.k <= kRowThreads * kThreadChunks * kChunk && a.hidden != nullptr &&
         floats(a.hidden) && a.type != Element::f32 && vector_rows(a.delta, a.k, a.k, a.type) &&
         floats(a.post_norm) && floats(a.norm) && (a.norm != nullptr || !with_norm);
}

}  // namespace

cudaError_t launch_norm_quantize(const NormArgs& args, const QuantizeArgs& to,
                                 cudaStream_t stream) {
  const bool by_group = to.scaling == Scaling::group || to.scaling == Scaling::static_group;
  QuantizeArgs codes = to;
  codes.m = args.m;
  codes.k = args.k;
  codes.programmatic = args.programmatic;
  if (!is_valid(args, true) || to.padded_k < args.k ||
      to.padded_k > kRowThreads * kThreadChunks * kChunk || to.scaling == Scaling::tensor ||
      (by_group && to.group_size < args.k && !lane_groups(codes))) {
    return cudaErrorInvalidValue;
  }
  const int64_t row_chunks = to.padded_k / kChunk;
  return lane_groups(codes) ? launch<Result::lane_codes>(args, codes, {}, row_chunks, stream)
                            : launch<Result::block_codes>(args, codes, {}, row_chunks, stream);
}

cudaError_t launch_norm(const NormArgs& args, void* out, int64_t out_stride, cudaStream_t stream) {
  const bool add_only = out == nullptr;
  if (!is_valid(args, !add_only) || (add_only && (args.gather != nullptr)) ||
      (!add_only && !vector_rows(out, out_stride, args.k, args.type))) {
    return cudaErrorInvalidValue;
  }
  const int64_t row_chunks = args.k / kChunk;
  return add_only ? launch<Result::none>(args, {}, {}, row_chunks, stream)
                  : launch<Result::bits16>(args, {}, {out, out_stride}, row_chunks, stream);
}

}  // namespace nibble::cuda
