// The device code of `bench gemm --device cuda` that is not the library's: random numbers, and a
// kernel that only reads, whose time is the least that any product over the same bytes can take.
#include "cuda_probe.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace nibble::cli {
namespace {

__device__ uint32_t hashed(uint64_t index, uint64_t seed) {  // splitmix64
  uint64_t z = (index + 1) * 0x9e3779b97f4a7c15u + seed;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return static_cast<uint32_t>((z ^ (z >> 31)) >> 16);
}

/// The four bytes of a random word, summed: close to a normal distribution, deviation 1.
__device__ float normal(uint64_t index, uint64_t seed) {
  const uint32_t word = hashed(index, seed);
  const uint32_t sum = __dp4a(word, 0x01010101u, 0u);
  return (static_cast<float>(sum) - 510.0f) * (1.0f / 147.8f);
}

__global__ void fill_normal(uint16_t* to, int64_t count, uint64_t seed, bool bf16) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    const float value = normal(static_cast<uint64_t>(i), seed);
    to[i] = bf16 ? __bfloat16_as_ushort(__float2bfloat16(value))
                 : __half_as_ushort(__float2half(value));
  }
}

__global__ void fill_words(uint32_t* to, int64_t count, uint64_t seed, uint32_t mask) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    to[i] = hashed(static_cast<uint64_t>(i), seed) & mask;
  }
}

__global__ void __launch_bounds__(512) read_only(const uint4* from, int64_t count, uint32_t* sink) {
  constexpr int kAtOnce = 8;
  const int64_t threads = int64_t{gridDim.x} * blockDim.x;
  const int64_t mine = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  uint32_t all = 0;
  for (int64_t i = mine; i < count; i += kAtOnce * threads) {
    uint4 v[kAtOnce] = {};
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (i + j * threads < count) v[j] = __ldcs(from + i + j * threads);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) all ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  if (all == 0x12345678u) *sink = all;  // keeps the loads; hardly ever true
}

}  // namespace

cudaError_t launch_fill_normal(void* to, int64_t count, uint64_t seed, bool bf16,
                               cudaStream_t stream) {
  fill_normal<<<1024, 256, 0, stream>>>(static_cast<uint16_t*>(to), count, seed, bf16);
  return cudaGetLastError();
}

cudaError_t launch_fill_words(void* to, int64_t bytes, uint64_t seed, cudaStream_t stream,
                              uint32_t mask) {
  fill_words<<<1024, 256, 0, stream>>>(static_cast<uint32_t*>(to), bytes / 4, seed, mask);
  return cudaGetLastError();
}

cudaError_t launch_read(const void* from, int64_t bytes, uint32_t* sink, int multiprocessors,
                        cudaStream_t stream) {
  read_only<<<static_cast<unsigned>(2 * multiprocessors), 512, 0, stream>>>(
      static_cast<const uint4*>(from), bytes / 16, sink);
  return cudaGetLastError();
}

}  // namespace nibble::cli
