// Attention of many query rows with mma.sync, for GPUs without wgmma: 128 rows of one head a block,
// 16 a warp, against one page of the cache at a time, which cp.async brings while the one before is
// worked on. Bits of a row do not depend on the rows it came with (attention_prefill_sm90.cu).
#include "gemm/cuda/launch.h"
#include "gemm/cuda/quantize_device.h"
#include "model/cuda/attention_prefill.h"
#include "model/cuda/check.h"
#include "model/cuda/kv_device.h"

namespace nibble::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarpRows = 16;

template <int kDim>
struct Shape {
  static constexpr int kStages = kDim <= 128 ? 2 : 1;
  static constexpr int kPageBytes = kDim / kKvSlice * kSliceBytes;  // of one head
  static constexpr int kQueryBytes = kPrefillRows * kDim * 2;
  static constexpr int kSharedBytes = kQueryBytes + kStages * 2 * kPageBytes;
};

template <Element type, int kDim>
struct Rows {
  float sums[kDim / 8][4];
  float scores[8][4];
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};  // sum: of this lane's positions only
  int position[2], from[2];
  float scale;

  __device__ void make_scores(uint32_t query, uint32_t keys, int lane) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (float& v : scores[j]) v = 0;
    }
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      const uint4 q =
          ptx::load_matrices(query + piece_offset<kPrefillRows>(lane % 16, 2 * i + lane / 16));
      const uint32_t a[4] = {q.x, q.y, q.z, q.w};
      // lanes 0-7: positions 0-7, channels 0-7; 8-15: channels 8-15; 16-: positions 8-15
      const int t = lane % 8 + lane / 16 * 8;
      const uint32_t at = keys + piece_offset(t, 2 * i + lane / 8 % 2);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint4 k = ptx::load_matrices(at + j * 16 * kRowBytes);
        product<type>(scores[2 * j], a, k.x, k.y);
        product<type>(scores[2 * j + 1], a, k.z, k.w);
      }
    }
  }

  __device__ void softmax(int first, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = -INFINITY;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int p = first + 8 * j + lane % 4 * 2 + i;
          if (p > position[h] || p < from[h]) scores[j][2 * h + i] = -INFINITY;
          top = ptx::max_or_nan(top, scores[j][2 * h + i]);
        }
      }
      top = ptx::max_or_nan(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = ptx::max_or_nan(top, __shfl_xor_sync(kAllLanes, top, 2));
      const float now = ptx::max_or_nan(max[h], top * scale);
      const float base = now == -INFINITY ? 0.0f : now;  // nothing seen so far
      const float factor = ptx::exp2_fast(max[h] - base);
      max[h] = now;
      float part = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          scores[j][i] = ptx::exp2_fast(__fmaf_rn(scores[j][i], scale, -base));
          part = part + scores[j][i];
        }
      }
      sum[h] = __fmaf_rn(sum[h], factor, part);
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) {
        sums[j][2 * h] = sums[j][2 * h] * factor;
        sums[j][2 * h + 1] = sums[j][2 * h + 1] * factor;
      }
    }
  }

  __device__ void add_values(uint32_t values, int lane) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t a[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float(&s)[4] = scores[2 * j + w / 2];
        a[w] = rounded_pair<type>(s[w % 2 * 2], s[w % 2 * 2 + 1]);
      }
#pragma unroll
      for (int i = 0; i < kDim / 16; ++i) {
        const uint4 v = ptx::load_matrices_transposed(
            values + piece_offset(lane % 16, 2 * i + lane / 16) + j * 16 * kRowBytes);
        product<type>(sums[2 * i], a, v.x, v.y);
        product<type>(sums[2 * i + 1], a, v.z, v.w);
      }
    }
  }
};

template <int kDim>
__device__ void load_page(const AttentionArgs& a, const PrefillTile& tile, int page, int kv_head,
                          uint32_t keys) {
  using S = Shape<kDim>;
  const int64_t offset = page_head_offset(a.kv, tile.sequence, page, kv_head);
  const auto* from_keys = static_cast<const char*>(a.kv.keys) + offset;
  const auto* from_values = static_cast<const char*>(a.kv.values) + offset;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x) * 16; i < S::kPageBytes; i += kThreads * 16) {
    ptx::copy16_async(keys + i, from_keys + i);
    ptx::copy16_async(keys + S::kPageBytes + i, from_values + i);
  }
}

template <Element type, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    attention_prefill(const __grid_constant__ PrefillArgs args) {
  using S = Shape<kDim>;
  extern __shared__ __align__(128) unsigned char shared[];
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  const AttentionArgs& a = args.attention;
  const PrefillTile tile = args.tiles[blockIdx.y];
  const int head = static_cast<int>(blockIdx.x);
  const int kv_head = head / static_cast<int>(a.heads / a.kv.kv_heads);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const uint32_t query = ptx::shared_address(shared), pages = query + S::kQueryBytes;
  constexpr int kPieces = kDim / 8;
  for (int i = static_cast<int>(threadIdx.x); i < kPrefillRows * kPieces; i += kThreads) {
    const int row = i / kPieces, piece = i % kPieces;
    const bool inside = row < tile.count && piece * 8 < a.kv.head_dim;
    const auto* from = static_cast<const char*>(a.q);
    if (inside) {
      from += (int64_t{tile.row + row} * a.q_stride + head * a.kv.head_dim + piece * 8) * 2;
    }
    ptx::copy16_async(query + piece_offset<kPrefillRows>(row, piece), from, inside ? 16 : 0);
  }
  const int first = first_position(tile.position, a.window) / kPagePositions;
  const int last = (tile.position + tile.count - 1) / kPagePositions;
  const auto stage = [&](int page) {
    return pages + (page - first) % S::kStages * 2 * S::kPageBytes;
  };
  load_page<kDim>(a, tile, first, kv_head, stage(first));
  ptx::copy_commit();

  Rows<type, kDim> rows;
  rows.scale = a.scale * kLog2E;
  const int warp_row = warp * kWarpRows;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    rows.position[h] = tile.position + warp_row + lane / 4 + 8 * h;
    rows.from[h] = first_position(rows.position[h], a.window);
  }
#pragma unroll
  for (int j = 0; j < kDim / 8; ++j) {
#pragma unroll
    for (float& v : rows.sums[j]) v = 0;
  }
  const int lowest = first_position(tile.position + warp_row, a.window);
  const int highest = tile.position + warp_row + kWarpRows - 1;
  for (int page = first; page <= last; ++page) {
    if (S::kStages > 1 && page < last) {
      load_page<kDim>(a, tile, page + 1, kv_head, stage(page + 1));
    }
    ptx::copy_commit();
    ptx::copy_wait<1>();
    __syncthreads();
    const int position = page * kPagePositions;
    if (position <= highest && position + kPagePositions > lowest) {
      rows.make_scores(query + warp_row * kRowBytes, stage(page), lane);
      rows.softmax(position, lane);
      rows.add_values(stage(page) + S::kPageBytes, lane);
    }
    __syncthreads();
    if (S::kStages == 1 && page < last)
      load_page<kDim>(a, tile, page + 1, kv_head, stage(page + 1));
    if (S::kStages == 1) ptx::copy_commit();
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float all = rows.sum[h] + __shfl_xor_sync(kAllLanes, rows.sum[h], 1);
    all = all + __shfl_xor_sync(kAllLanes, all, 2);
    const float inverse = 1.0f / all;
    const int row = warp_row + lane / 4 + 8 * h;
    if (row >= tile.count) continue;
    auto* to = reinterpret_cast<uint32_t*>(
        static_cast<char*>(a.out) +
        (int64_t{tile.row + row} * a.out_stride + head * a.kv.head_dim) * 2);
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      if (j * 8 >= a.kv.head_dim) continue;
      to[j * 4 + lane % 4] =
          rounded_pair(a.type, rows.sums[j][2 * h] * inverse, rows.sums[j][2 * h + 1] * inverse);
    }
  }
}

template <Element type, int kDim>
cudaError_t launch(const PrefillArgs& a, cudaStream_t stream) {
  Launch how;
  how.grid = dim3(static_cast<unsigned>(a.attention.heads), static_cast<unsigned>(a.num_tiles));
  how.threads = kThreads;
  how.shared_bytes = Shape<kDim>::kSharedBytes;
  how.stream = stream;
  how.programmatic = a.attention.programmatic;
  return launch_kernel(attention_prefill<type, kDim>, how, a);
}

}  // namespace

cudaError_t launch_attention_prefill_sm80(const PrefillArgs& args, cudaStream_t stream) {
  return launch_for_pages(args.attention.kv, [&]<Element type, int kDim>() {
    return launch<type, kDim>(args, stream);
  });
}

}  // namespace nibble::cuda
