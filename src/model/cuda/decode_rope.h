// Rope inside attention_decode.cu: queries are rotated as they are loaded, and the key and value of
// the step's position go to the cache and, because the page may have been asked for before they are
// there, into shared memory over what came of it. The bits are those of rope.cu. Device code only.
#pragma once

#include "model/cuda/decode_work.h"
#include "model/cuda/rope_device.h"

namespace nibble::cuda {

/// The lane's part of the queries of one head, as Warp::q: word u holds channels 8 u + 2 c and the
/// next, c = lane % 4. head: of the item's KV head; zeros if there is none such.
template <Element type, int kDim>
__device__ __forceinline__ void load_rotated_queries(uint32_t (&q)[kDim / 16][2],
                                                     const DecodeArgs& a, const DecodeItem& item,
                                                     int head, int groups, int lane) {
  constexpr int kHalf = kDim / 16;  // words of a half
  const RopeArgs& r = a.rope;
  const bool inside = head < groups;
  const auto* from = static_cast<const uint32_t*>(r.qkv) +
                     (item.row * r.qkv_stride + int64_t{item.kv_head * groups + head} * kDim) / 2 +
                     lane % 4;
  const int64_t angles = int64_t{item.last} * (kDim / 2);
  const auto* cosine = reinterpret_cast<const float2*>(r.cosine + angles) + lane % 4;
  const auto* sine = reinterpret_cast<const float2*>(r.sine + angles) + lane % 4;
  uint32_t low[kHalf], high[kHalf];
  float2 cosines[kHalf], sines[kHalf];
#pragma unroll
  for (int u = 0; u < kHalf; ++u) {
    low[u] = inside ? from[u * 4] : 0;
    high[u] = inside ? from[(u + kHalf) * 4] : 0;
    cosines[u] = cosine[u * 4];
    sines[u] = sine[u * 4];
  }
  bool good = true;
#pragma unroll
  for (int u = 0; u < kHalf; ++u) {
    const float2 c = cosines[u], s = sines[u];
    const float a0 = float_of<type>(low[u] & 0xffffu), a1 = float_of<type>(low[u] >> 16);
    const float b0 = float_of<type>(high[u] & 0xffffu), b1 = float_of<type>(high[u] >> 16);
    const float x0 = rotated_low(a0, b0, c.x, s.x), x1 = rotated_low(a1, b1, c.y, s.y);
    const float y0 = rotated_high(a0, b0, c.x, s.x), y1 = rotated_high(a1, b1, c.y, s.y);
    good = good && finite(x0) && finite(x1) && finite(y0) && finite(y1);
    q[u / 2][u % 2] = rounded_pair<type>(x0, x1);
    q[(u + kHalf) / 2][(u + kHalf) % 2] = rounded_pair<type>(y0, y1);
  }
  if (!good) r.faults[a.sequence[item.row]] = 1;
}

/// A new key (row 0) and value (row 1), in shared memory.
template <int kDim>
struct NewRows {
  uint4 row[2][kDim / kChunk];
};

/// The same on their way from qkv: lanes of the first kHalf have a chunk of either half of the key,
/// as many after them of the value.
template <Element type, int kDim>
struct NewRowLoads {
  static constexpr int kHalf = kDim / (2 * kChunk);
  Raw<type> a, b;
  Raw<Element::f32> cosine, sine;

  __device__ __forceinline__ void load(const DecodeArgs& args, const DecodeItem& item, int lane) {
    const RopeArgs& r = args.rope;
    const int which = lane / kHalf, chunk = lane % kHalf;
    const int64_t head = r.heads + which * args.attention.kv.kv_heads + item.kv_head;
    const auto* from =
        static_cast<const char*>(r.qkv) + (item.row * r.qkv_stride + head * kDim) * 2;
    const int64_t angles = int64_t{item.last} * (kDim / 2);
    a = load_raw<type>(from, chunk, which < 2);
    b = load_raw<type>(from, chunk + kHalf, which < 2);
    cosine = load_raw<Element::f32>(r.cosine + angles, chunk, which == 0);
    sine = load_raw<Element::f32>(r.sine + angles, chunk, which == 0);
  }

  /// To the cache and to `rows`. By a whole warp.
  __device__ __forceinline__ void store(const DecodeArgs& args, const DecodeItem& item,
                                        NewRows<kDim>& rows, int lane) const {
    const KvPages& kv = args.attention.kv;
    const int which = lane / kHalf, chunk = lane % kHalf;
    if (which < 2) {
      Halves x = {values_of<type>(a), values_of<type>(b)};
      if (which == 0) {
        rotate(x, values_of<Element::f32>(cosine), values_of<Element::f32>(sine));
      }
      const bool low_fits = fit<type>(x.a), high_fits = fit<type>(x.b);
      const uint4 low = rounded<type>(x.a), high = rounded<type>(x.b);
      rows.row[which][chunk] = low;
      rows.row[which][chunk + kHalf] = high;
      const int sequence = args.sequence[item.row], t = item.last % kPagePositions;
      char* page = static_cast<char*>(which == 0 ? kv.keys : kv.values) +
                   page_head_offset(kv, sequence, item.last / kPagePositions, item.kv_head);
      *reinterpret_cast<uint4*>(page + piece_offset(t, chunk)) = low;
      *reinterpret_cast<uint4*>(page + piece_offset(t, chunk + kHalf)) = high;
      if (!low_fits || !high_fits) args.rope.faults[sequence] = 1;
    }
    __syncwarp();
  }
};

/// Puts the new key or value where it belongs in page `index` of the item, which has arrived at
/// `page` in shared memory, if it belongs there. By a whole warp.
template <int kDim>
__device__ __forceinline__ void patch_page(uint32_t page, const NewRows<kDim>& rows, int which,
                                           const DecodeItem& item, int index, int lane) {
  if (index != item.last / kPagePositions) return;
  if (lane < kDim / kChunk) {
    const int t = item.last % kPagePositions;
    ptx::store16_shared(page + piece_offset(t, lane), rows.row[which][lane]);
  }
#if __CUDA_ARCH__ >= 900
  ptx::fence_async_shared();  // the next page comes by a bulk copy
#endif
  __syncwarp();
}

}  // namespace nibble::cuda
