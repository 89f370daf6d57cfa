// The norm before the head, and the two 16-bit parts of what the head multiplies. A block a row.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "gemm/cuda/head_product.h"
#include "gemm/cuda/launch.h"
#include "gemm/cuda/ptx.h"

namespace nibble::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

template <Element type>
__device__ __forceinline__ void store_parts(const SplitRows& to, int64_t at, float x) {
  if constexpr (type == Element::bf16) {
    const __nv_bfloat16 high = __float2bfloat16_rn(x);
    static_cast<__nv_bfloat16*>(to.high)[at] = high;
    static_cast<__nv_bfloat16*>(to.low)[at] = __float2bfloat16_rn(x - __bfloat162float(high));
  } else {
    const __half high = __float2half_rn(x);
    static_cast<__half*>(to.high)[at] = high;
    static_cast<__half*>(to.low)[at] = __float2half_rn(x - __half2float(high));
  }
}

__device__ __forceinline__ float load_value(const void* from, Element type, int64_t at) {
  if (type == Element::bf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(from)[at]);
  return __half2float(static_cast<const __half*>(from)[at]);
}

/// Sum over the block, in every thread: lanes pairwise, then warps in order.
__device__ __forceinline__ float block_sum(float v) {
  __shared__ float partial[kWarps];
#pragma unroll
  for (int d = 16; d > 0; d /= 2) v = v + __shfl_xor_sync(0xffffffffu, v, d);
  __syncthreads();  // of an earlier call, all have read
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum = sum + partial[i];
  return sum;
}

template <Element type>
__global__ void __launch_bounds__(kThreads) norm_rows(const __grid_constant__ HeadNormArgs a) {
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  const int64_t to = static_cast<int64_t>(blockIdx.x) * a.k;
  const int64_t from = (a.gather == nullptr ? blockIdx.x : a.gather[blockIdx.x]) * a.k;
  const auto inverse_rms = [&](float squares) {
    return 1.0f / sqrtf(squares / static_cast<float>(a.k) + a.eps);
  };
  float factor = 1;
  if (a.post_norm != nullptr) {
    float squares = 0;
    for (int64_t i = threadIdx.x; i < a.k; i += kThreads) {
      const float d = load_value(a.delta, a.delta_type, from + i);
      squares = __fmaf_rn(d, d, squares);
    }
    factor = inverse_rms(block_sum(squares));
  }
  // The row stays where this thread alone finds it: out itself.
  float squares = 0;
  for (int64_t i = threadIdx.x; i < a.k; i += kThreads) {
    float h = a.hidden[from + i];
    if (a.delta != nullptr) {
      float d = load_value(a.delta, a.delta_type, from + i);
      if (a.post_norm != nullptr) d = d * factor * a.post_norm[i];
      h = h + d;
    }
    a.out[to + i] = h;
    squares = __fmaf_rn(h, h, squares);
  }
  const float inverse = inverse_rms(block_sum(squares));
  for (int64_t i = threadIdx.x; i < a.k; i += kThreads) {
    const float v = a.out[to + i] * inverse * a.norm[i];
    a.out[to + i] = v;
    store_parts<type>(a.parts, to + i, v);
  }
}

template <Element type>
__global__ void __launch_bounds__(kThreads)
    split_rows(const float* x, int64_t count, const SplitRows to) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at < count) store_parts<type>(to, at, x[at]);
}

template <Element type>
__global__ void __launch_bounds__(kThreads)
    add_bias(void* y, int64_t y_stride, int64_t n, const float* bias) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= n) return;
  const int64_t at = blockIdx.y * y_stride + column;
  const float sum = load_value(y, type, at) + bias[column];
  if constexpr (type == Element::bf16) {
    static_cast<__nv_bfloat16*>(y)[at] = __float2bfloat16_rn(sum);
  } else {
    static_cast<__half*>(y)[at] = __float2half_rn(sum);
  }
}

bool is_16bit(Element type) { return type == Element::f16 || type == Element::bf16; }

}  // namespace

cudaError_t launch_split(const float* x, int64_t rows, int64_t k, const SplitRows& to,
                         cudaStream_t stream) {
  if (!is_16bit(to.type) || k % 8 != 0) return cudaErrorInvalidValue;
  const int64_t count = rows * k;
  const Launch how{.grid = static_cast<unsigned>((count + kThreads - 1) / kThreads),
                   .threads = kThreads,
                   .stream = stream};
  return to.type == Element::f16 ? launch_kernel(split_rows<Element::f16>, how, x, count, to)
                                 : launch_kernel(split_rows<Element::bf16>, how, x, count, to);
}

cudaError_t launch_head_norm(const HeadNormArgs& args, cudaStream_t stream) {
  if (!is_16bit(args.parts.type) || args.k % 8 != 0 ||
      (args.delta != nullptr && !is_16bit(args.delta_type)) ||
      (args.post_norm != nullptr && args.delta == nullptr)) {
    return cudaErrorInvalidValue;
  }
  const Launch how{.grid = static_cast<unsigned>(args.rows),
                   .threads = kThreads,
                   .stream = stream,
                   .programmatic = args.programmatic};
  return args.parts.type == Element::f16 ? launch_kernel(norm_rows<Element::f16>, how, args)
                                         : launch_kernel(norm_rows<Element::bf16>, how, args);
}

cudaError_t launch_add_bias(Element type, void* y, int64_t y_stride, int64_t rows, int64_t n,
                            const float* bias, cudaStream_t stream) {
  if (!is_16bit(type) || rows > 65535) return cudaErrorInvalidValue;
  const Launch how{.grid = dim3(static_cast<unsigned>((n + kThreads - 1) / kThreads),
                                static_cast<unsigned>(rows)),
                   .threads = kThreads,
                   .stream = stream};
  return type == Element::f16
             ? launch_kernel(add_bias<Element::f16>, how, y, y_stride, n, bias)
             : launch_kernel(add_bias<Element::bf16>, how, y, y_stride, n, bias);
}

}  // namespace nibble::cuda
