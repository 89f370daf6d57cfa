// The end of a tile of the persistent wgmma kernels: parts of a tile that several workers share
// (rs_schedule.h) are summed in order of k, then scaled, rounded and stored.
//
// Two sharers, or any number without `spread`: the one that begins at k = 0 keeps its part in
// registers and adds the others'. More of them, with `spread`: each stores its part, goes on with
// its work, and at the very end sums every count-th eight tokens of the tile. What is waited for
// has been stored by whoever does not wait for anybody before that.
//
// Workers of one cluster (schedule.parts > 1): all store their parts in their own shared memory,
// meet, and each sums every parts-th eight tokens out of everybody's.
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
  bool spread;   // the kernel calls finish_spread(); parts have two slots a block
  float* parts;  // [block][slot][math warpgroup][8 tokens][thread][4]: sums of a part of a tile
  uint32_t* arrived;  // [first block with a part][math warpgroup]: parts stored, + 2^16 * readers
};

/// A block multiplies 64 columns a math warpgroup with kTokens tokens; thread 4 r + c of warp w of
/// a warpgroup holds in f[4 j + 2 h + i] column 16 w + r + 8 h, token 8 j + 2 c + i. Two blocks,
/// of ranks 0 and 1, make a worker.
template <int kTokens, int kMathGroups>
struct TileOutput {
  static constexpr int kSums = kTokens / 2;
  static constexpr int kStageBytes = kTokens * 128;  // shared memory of a warpgroup

  const TileOutputParams& p;
  int worker, rank, lane;
  /// Shared memory: p.t of the tile's tokens, kTokens floats, in time before the barriers of
  /// finish() and finish_in_cluster(). 0: p.t is read at the end, which takes most of a
  /// microsecond.
  uint32_t scales = 0;

  /// stage: kStageBytes of shared memory of this warpgroup, 1024-aligned.
  __device__ void finish(const RsWork& work, float (&f)[kSums], const CUtensorMap* map, int group,
                         uint32_t stage) const {
    if (work.slice0 > 0 || work.slice1 < p.schedule.slices) {
      const RsSharers sharers = p.schedule.sharers(work.index);
      const bool first = work.slice0 == 0;
      if (!first || (p.spread && sharers.count > 2)) {
        return store_part(f, first ? 1 : 0, sharers.first, group);
      }
      collect(f, sharers, group);
    }
    const int warp = (ptx::thread() >> 5) & 3;
    const int column0 = (work.weight_tile * 2 + rank) * 64 * kMathGroups + group * 64;
    const int token0 = work.token_tile * kTokens;
    const int64_t column = column_of(work, group);
    if (p.out.type == Element::f32) return store_floats(f, token0, column);
    // Transposed into [token][64 columns], 128-byte swizzle, then one tensor store a warpgroup.
    if ((ptx::thread() & 127) == 0) ptx::bulk_wait_read<0>();
    ptx::barrier_sync(1 + group, 128);
    const float bias0 = bias_of(column), bias8 = bias_of(column + 8);
#pragma unroll
    for (int j = 0; j < kTokens / 8; j += 2) {
      uint32_t r[4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = 4 * (j + h);
        const float2 t = scales_of_pair(token0, 8 * (j + h) + (lane & 3) * 2);
        const float t0 = t.x, t1 = t.y;
        r[2 * h] = rounded(scaled(f[i], t0, bias0), scaled(f[i + 1], t1, bias0));
        r[2 * h + 1] = rounded(scaled(f[i + 2], t0, bias8), scaled(f[i + 3], t1, bias8));
      }
      const int token = 8 * (j + (lane >> 4)) + (lane & 7), chunk = 2 * warp + ((lane >> 3) & 1);
      ptx::store_matrices_transposed(stage + token * 128 + ((chunk ^ (token & 7)) << 4),
                                     make_uint4(r[0], r[1], r[2], r[3]));
    }
    ptx::fence_async_shared();
    ptx::barrier_sync(1 + group, 128);
    if ((ptx::thread() & 127) == 0 && column0 < p.n) {
      ptx::tensor_store(map, column0, token0, stage);
      ptx::bulk_commit();
    }
  }

  /// The only item of a worker of a cluster, instead of finish(). rows: shared memory of this warp,
  /// the same address in every block, 4096 bytes for each 64 tokens, `stride` bytes apart. All
  /// threads of the cluster meet twice, those that do not multiply by ptx::cluster_*() of their
  /// own: when all parts are stored, and (this only arrives there) when they have been read.
  __device__ void finish_in_cluster(const RsWork& work, const float (&f)[kSums], int group,
                                    uint32_t rows, int stride) const {
    rows += lane * 16;
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
      ptx::store_float4_shared(rows + j / 8 * stride + j % 8 * 512,
                               make_float4(f[4 * j], f[4 * j + 1], f[4 * j + 2], f[4 * j + 3]));
    }
    ptx::cluster_arrive();
    ptx::cluster_wait();
    switch (p.schedule.parts) {
      case 2: sum_in_cluster<2>(work, group, rows, stride); break;
      case 3: sum_in_cluster<3>(work, group, rows, stride); break;
      default: sum_in_cluster<4>(work, group, rows, stride);
    }
    ptx::cluster_arrive();
  }

  /// After all items: this worker's share of the tiles that more than two have parts of.
  __device__ void finish_spread(int group) const {
    if (!p.spread) return;
    const int items = p.schedule.items(worker);
#pragma unroll 1
    for (int item = p.schedule.whole_of(worker); item < items; ++item) {
      const RsWork work = p.schedule.work(worker, item);
      const RsSharers sharers = p.schedule.sharers(work.index);
      if (sharers.count > 2) sum_share(work, sharers, group);
    }
  }

 private:
  static constexpr int kEights = kTokens / 8;
  static constexpr uint32_t kReader = 1u << 16;

  /// This thread's sums of 8 tokens after 8 tokens, 128 apart. Slot 1 is for the beginning of a
  /// tile, which a block may have to store beside the end of another.
  __device__ float4* part_of(int of_worker, int slot, int group) const {
    const int64_t block = of_worker * 2 + rank, slots = p.spread ? 2 : 1;
    return reinterpret_cast<float4*>(p.parts) +
           ((block * slots + slot) * kMathGroups + group) * (kEights * 128) + (ptx::thread() & 127);
  }
  __device__ uint32_t* counter_of(int first_worker, int group) const {
    return p.arrived + (first_worker * 2 + rank) * kMathGroups + group;
  }

  __device__ void store_part(const float (&f)[kSums], int slot, int first_worker, int group) const {
    float4* to = part_of(worker, slot, group);
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
      __stcg(to + j * 128, make_float4(f[4 * j], f[4 * j + 1], f[4 * j + 2], f[4 * j + 3]));
    }
    ptx::barrier_sync(1 + group, 128);
    if ((ptx::thread() & 127) == 0) ptx::add_release(counter_of(first_worker, group), 1);
  }

  /// Until `count` parts have been stored; all threads of the warpgroup may read them then.
  __device__ void wait_for_parts(uint32_t* counter, int count, int group) const {
    if ((ptx::thread() & 127) == 0) {
      while ((ptx::load_acquire(counter) & (kReader - 1)) != static_cast<uint32_t>(count)) {
      }
    }
    ptx::barrier_sync(1 + group, 128);
  }

  /// Adds the parts of the workers that follow, in order of k.
  __device__ void collect(float (&f)[kSums], const RsSharers& sharers, int group) const {
    uint32_t* counter = counter_of(worker, group);
    wait_for_parts(counter, sharers.count - 1, group);
    if ((ptx::thread() & 127) == 0) *counter = 0;  // for the next launch
#pragma unroll 1
    for (int other = worker + 1; other < worker + sharers.count; ++other) {
      const float4* from = part_of(other, 0, group);
#pragma unroll
      for (int j = 0; j < kEights; ++j) {
        const float4 v = __ldcg(from + j * 128);
        f[4 * j] += v.x;
        f[4 * j + 1] += v.y;
        f[4 * j + 2] += v.z;
        f[4 * j + 3] += v.w;
      }
    }
  }

  /// Every count-th eight tokens of a tile, from the number of this sharer on.
  __device__ void sum_share(const RsWork& work, const RsSharers& sharers, int group) const {
    const int readers = sharers.count < kEights ? sharers.count : kEights;
    if (worker - sharers.first >= readers) return;
    uint32_t* counter = counter_of(sharers.first, group);
    wait_for_parts(counter, sharers.count, group);
    const int64_t column = column_of(work, group);
#pragma unroll 1
    for (int j = worker - sharers.first; j < kEights; j += sharers.count) {
      const float4 sum = sum_of_eight(sharers, group, j);
      const int64_t token0 = work.token_tile * kTokens + 8 * j, token = token0 + (lane & 3) * 2;
      store_eight(sum, token0, column, make_float2(scale_of(token), scale_of(token + 1)));
    }
    // The last to have seen all parts leaves the counter as it was, for the next launch.
    if ((ptx::thread() & 127) == 0 &&
        atomicAdd(counter, kReader) / kReader == static_cast<uint32_t>(readers - 1)) {
      *counter = 0;
    }
  }

  template <int parts>
  __device__ void sum_in_cluster(const RsWork& work, int group, uint32_t rows, int stride) const {
    constexpr int kShare = (kEights + parts - 1) / parts, kAtOnce = kShare < 4 ? kShare : 4;
    const int64_t column = column_of(work, group);
#pragma unroll 1
    for (int first = worker % parts; first < kEights; first += parts * kAtOnce) {
      float4 v[kAtOnce][parts];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int j = first + i * parts;
        if (j >= kEights) continue;
#pragma unroll
        for (int of = 0; of < parts; ++of) {
          const uint32_t at = rows + (j >> 3) * stride + (j & 7) * 512;
          v[i][of] = ptx::load_float4_cluster(ptx::cluster_address(at, 2 * of + rank));
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int j = first + i * parts;
        if (j >= kEights) continue;
        float4 sum = v[i][0];
#pragma unroll
        for (int of = 1; of < parts; ++of) {
          sum.x += v[i][of].x;
          sum.y += v[i][of].y;
          sum.z += v[i][of].z;
          sum.w += v[i][of].w;
        }
        const int token0 = work.token_tile * kTokens;
        store_eight(sum, token0 + 8 * j, column, scales_of_pair(token0, 8 * j + (lane & 3) * 2));
      }
    }
  }

  /// Loads of several parts are in flight before the first is added.
  __device__ float4 sum_of_eight(const RsSharers& sharers, int group, int j) const {
    constexpr int kAhead = 8;
    float4 sum = __ldcg(part_of(sharers.first, 1, group) + j * 128);
#pragma unroll 1
    for (int done = 1; done < sharers.count; done += kAhead) {
      float4 v[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (done + i >= sharers.count) continue;
        v[i] = __ldcg(part_of(sharers.first + done + i, 0, group) + j * 128);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (done + i >= sharers.count) continue;
        sum.x += v[i].x;
        sum.y += v[i].y;
        sum.z += v[i].z;
        sum.w += v[i].w;
      }
    }
    return sum;
  }

  /// sum: f[0..3] of 8 tokens, of which the first is token0; t: scales of this thread's two.
  __device__ void store_eight(float4 sum, int64_t token0, int64_t column, float2 t) const {
    const float f[4] = {sum.x, sum.y, sum.z, sum.w};
    if (p.out.type == Element::f32) return store_floats(f, token0, column);
    const int64_t to_token = token0 + (lane >> 2);
    auto* row = static_cast<uint16_t*>(p.out.y) + to_token * p.out.stride;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t n = column + 8 * h, to = n - (lane >> 2) + (lane & 3) * 2;
      const float bias = bias_of(n);
      const uint32_t pair =
          ptx::transposed(rounded(scaled(f[2 * h], t.x, bias), scaled(f[2 * h + 1], t.y, bias)));
      if (to_token < p.m && to < p.n) *reinterpret_cast<uint32_t*>(row + to) = pair;
    }
  }

  /// First of this thread's two columns.
  __device__ int64_t column_of(const RsWork& work, int group) const {
    return (work.weight_tile * 2 + rank) * 64 * kMathGroups + group * 64 +
           ((ptx::thread() >> 5) & 3) * 16 + (lane >> 2);
  }

  __device__ float scale_of(int64_t token) const {
    // not __ldg: the kernel in front may have written it
    return p.t == nullptr || token >= p.m ? 1.0f : ptx::load_float(p.t + token);
  }
  /// Of tokens token0 + offset and the one behind it, offset even.
  __device__ float2 scales_of_pair(int64_t token0, int offset) const {
    if (scales != 0) return ptx::load_float2_shared(scales + 4 * offset);
    return make_float2(scale_of(token0 + offset), scale_of(token0 + offset + 1));
  }
  __device__ float bias_of(int64_t column) const {
    return p.out.bias != nullptr && column < p.n ? __ldg(p.out.bias + column) : 0.0f;
  }
  __device__ float scaled(float f, float t, float bias) const {
    return p.out.bias == nullptr ? __fmul_rn(f, t) : __fmaf_rn(f, t, bias);
  }

  __device__ uint32_t rounded(float x, float y) const {
    if (p.out.type == Element::bf16) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
      return *reinterpret_cast<const uint32_t*>(&pair);
    }
    const __half2 pair = __floats2half2_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }

  /// f: sums of count / 4 times 8 tokens.
  template <int count>
  __device__ void store_floats(const float (&f)[count], int64_t token0, int64_t column) const {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int64_t token = token0 + 8 * (i / 4) + (lane & 3) * 2 + (i & 1);
      const int64_t n = column + ((i & 2) ? 8 : 0);
      if (token >= p.m || n >= p.n) continue;
      static_cast<float*>(p.out.y)[token * p.out.stride + n] =
          scaled(f[i], scale_of(token), bias_of(n));
    }
  }
};

}  // namespace nibble::cuda
