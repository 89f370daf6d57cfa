// The end of a tile of the persistent wgmma kernels: parts of a tile that several workers share
// (rs_schedule.h) are summed in order of k, then scaled, rounded and stored.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "gemm/cuda/kernels.h"
#include "gemm/cuda/ptx.h"
#include "gemm/cuda/rs_schedule.h"

namespace nibble::cuda {

struct TileOutputParams {
  const float* t;  // (m), or null: the sums are scaled already
  int64_t m, n;
  Output out;
  RsSchedule schedule;
  float* parts;       // [block][accumulator][math thread]: sums of a part of a tile
  uint32_t* arrived;  // [block][math warpgroup]
};

/// A block multiplies 64 columns a math warpgroup with kTokens tokens; thread 4 r + c of warp w of
/// a warpgroup holds in f[4 j + 2 h + i] column 16 w + r + 8 h, token 8 j + 2 c + i. Two blocks,
/// of ranks 0 and 1, make a worker.
template <int kTokens, int kMathGroups>
struct TileOutput {
  static constexpr int kSums = kTokens / 2;
  static constexpr int kMathThreads = 128 * kMathGroups;
  static constexpr int kStageBytes = kTokens * 128;  // shared memory of a warpgroup

  const TileOutputParams& p;
  int worker, rank, lane;

  /// stage: kStageBytes of shared memory of this warpgroup, 1024-aligned.
  __device__ void finish(const RsWork& work, float (&f)[kSums], const CUtensorMap* map, int group,
                         uint32_t stage) const {
    if (work.slice0 > 0) return hand_over(f, group);
    if (work.slice1 < p.schedule.slices) collect(f, work.index, group);
    const int warp = (threadIdx.x >> 5) & 3;
    const int column0 = (work.weight_tile * 2 + rank) * 64 * kMathGroups + group * 64;
    const int token0 = work.token_tile * kTokens;
    const int64_t column = column0 + warp * 16 + (lane >> 2);
    if (p.out.type == Element::f32) return store_floats(f, token0, column);
    // Transposed into [token][64 columns], 128-byte swizzle, then one tensor store a warpgroup.
    if ((threadIdx.x & 127) == 0) ptx::bulk_wait_read<0>();
    ptx::barrier_sync(1 + group, 128);
#pragma unroll
    for (int j = 0; j < kTokens / 8; j += 2) {
      uint32_t r[4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t token = token0 + 8 * (j + h) + (lane & 3) * 2;
        const int i = 4 * (j + h);
        r[2 * h] = rounded(scaled(f[i], token, column), scaled(f[i + 1], token + 1, column));
        r[2 * h + 1] =
            rounded(scaled(f[i + 2], token, column + 8), scaled(f[i + 3], token + 1, column + 8));
      }
      const int token = 8 * (j + (lane >> 4)) + (lane & 7), chunk = 2 * warp + ((lane >> 3) & 1);
      ptx::store_matrices_transposed(stage + token * 128 + ((chunk ^ (token & 7)) << 4),
                                     make_uint4(r[0], r[1], r[2], r[3]));
    }
    ptx::fence_async_shared();
    ptx::barrier_sync(1 + group, 128);
    if ((threadIdx.x & 127) == 0 && column0 < p.n) {
      ptx::tensor_store(map, column0, token0, stage);
      ptx::bulk_commit();
    }
  }

 private:
  __device__ float* part_of(int block) const {
    return p.parts + int64_t{block} * kSums * kMathThreads + threadIdx.x;
  }

  /// Hands a part that does not begin at k = 0 to the owner of the tile.
  __device__ void hand_over(const float (&f)[kSums], int group) const {
    float* to = part_of(blockIdx.x);
#pragma unroll
    for (int i = 0; i < kSums; ++i) __stcg(to + i * kMathThreads, f[i]);
    __threadfence();
    ptx::barrier_sync(1 + group, 128);
    if ((threadIdx.x & 127) == 0) {
      ptx::store_release(p.arrived + blockIdx.x * kMathGroups + group, 1);
    }
  }

  /// Adds the parts of the workers that follow, in order of k.
  __device__ void collect(float (&f)[kSums], int index, int group) const {
    for (int other = worker; p.schedule.shared_with_next(other, index);) {
      ++other;
      const int block = other * 2 + rank;
      uint32_t* flag = p.arrived + block * kMathGroups + group;
      if ((threadIdx.x & 127) == 0) {
        while (ptx::load_acquire(flag) == 0) {
        }
      }
      ptx::barrier_sync(1 + group, 128);
      const float* from = part_of(block);
#pragma unroll
      for (int i = 0; i < kSums; ++i) f[i] += __ldcg(from + i * kMathThreads);
      ptx::barrier_sync(1 + group, 128);
      if ((threadIdx.x & 127) == 0) *flag = 0;  // for the next launch
    }
  }

  __device__ float scaled(float f, int64_t token, int64_t column) const {
    // not __ldg: the kernel in front may have written it
    const float t = p.t == nullptr || token >= p.m ? 1.0f : ptx::load_float(p.t + token);
    if (p.out.bias == nullptr) return __fmul_rn(f, t);
    return __fmaf_rn(f, t, column < p.n ? __ldg(p.out.bias + column) : 0.0f);
  }

  __device__ uint32_t rounded(float x, float y) const {
    if (p.out.type == Element::bf16) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
      return *reinterpret_cast<const uint32_t*>(&pair);
    }
    const __half2 pair = __floats2half2_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }

  __device__ void store_floats(const float (&f)[kSums], int token0, int64_t column) const {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int64_t token = token0 + 8 * (i / 4) + (lane & 3) * 2 + (i & 1);
      const int64_t n = column + ((i & 2) ? 8 : 0);
      if (token >= p.m || n >= p.n) continue;
      static_cast<float*>(p.out.y)[token * p.out.stride + n] = scaled(f[i], token, n);
    }
  }
};

}  // namespace nibble::cuda
