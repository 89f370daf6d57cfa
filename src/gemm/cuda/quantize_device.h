// What the kernels that quantize rows share. A thread works on chunks of eight neighbours: their
// values, their range, their codes. Device code only; the arithmetic is that of
// gemm/cpu/quantize.h, operation by operation.
//
// Lane l of a warp always has a chunk whose number is l modulo 32: the chunks of a group of up to
// 128 elements are neighbouring lanes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "gemm/cuda/halves.h"
#include "gemm/cuda/kernels.h"
#include "gemm/cuda/ptx.h"

namespace nibble::cuda {

inline constexpr int kChunk = 8;
inline constexpr uint32_t kAllLanes = 0xffffffffu;
inline constexpr uint32_t kInfinityBits = 0x7f800000u;
inline constexpr float kSmallestRange = 0x1p-100f;

struct Chunk {
  float v[kChunk];
};

constexpr int element_bytes(Element type) { return type == Element::f32 ? 4 : 2; }

/// How far a scale reaches: over the block's part of a row, or over 4, 8 or 16 lanes.
enum class Reach { block, lanes };

/// What a kernel would otherwise divide for. Part p of a row (blockIdx.y) begins at chunk
/// p * part_chunks; the last part has the padding as well.
struct Dealing {
  int part_chunks = 0;
  int groups = 0;       // Reach::lanes: scales of a row
  int group_shift = 0;  // and chunks of a group, as a power of 2
  int sums = 0;         // sums of a row
  int sum_shift = 0;    // chunks of a sum, as a power of 2
};

// ---- values ------------------------------------------------------------------------------------

template <Element type>
__device__ __forceinline__ float float_of(uint32_t bits16) {
  if constexpr (type == Element::f16) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits16)));
  } else {
    return __uint_as_float(bits16 << 16);
  }
}

template <Element type>
__device__ __forceinline__ float load_element(const void* row, int64_t index) {
  if constexpr (type == Element::f32) {
    return static_cast<const float*>(row)[index];
  } else {
    return float_of<type>(static_cast<const unsigned short*>(row)[index]);
  }
}

/// A chunk as it lies in memory, so that all loads of a thread can be under way before the first
/// is looked at.
template <Element type>
struct Raw {
  uint4 words[type == Element::f32 ? 2 : 1];
};

/// Elements 8 chunk .. 8 chunk + 7 of a row that is 16-byte aligned; zeros if not `inside`.
template <Element type>
__device__ __forceinline__ Raw<type> load_raw(const void* row, int chunk, bool inside) {
  const auto* from = static_cast<const uint4*>(row) + chunk * (type == Element::f32 ? 2 : 1);
  Raw<type> raw = {};
  if (inside) {
    raw.words[0] = from[0];
    if constexpr (type == Element::f32) raw.words[1] = from[1];
  }
  return raw;
}

template <Element type>
__device__ __forceinline__ Chunk values_of(const Raw<type>& raw) {
  Chunk c;
  const uint4 a = raw.words[0];
  if constexpr (type == Element::f32) {
    const uint4 b = raw.words[1];
    const uint32_t words[kChunk] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < kChunk; ++i) c.v[i] = __uint_as_float(words[i]);
  } else {
    const uint32_t words[kChunk / 2] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      c.v[2 * i] = float_of<type>(words[i] & 0xffffu);
      c.v[2 * i + 1] = float_of<type>(words[i] >> 16);
    }
  }
  return c;
}

/// Two floats rounded to 16 bits, x in the lower half.
template <Element type>
__device__ __forceinline__ uint32_t rounded_pair(float x, float y) {
  if constexpr (type == Element::f16) {
    const __half2 pair = __floats2half2_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

__device__ __forceinline__ uint32_t rounded_pair(Element type, float x, float y) {
  return type == Element::f16 ? rounded_pair<Element::f16>(x, y)
                              : rounded_pair<Element::bf16>(x, y);
}

/// A chunk rounded to 16 bits.
template <Element type>
__device__ __forceinline__ uint4 rounded(const Chunk& c) {
  return {rounded_pair<type>(c.v[0], c.v[1]), rounded_pair<type>(c.v[2], c.v[3]),
          rounded_pair<type>(c.v[4], c.v[5]), rounded_pair<type>(c.v[6], c.v[7])};
}

/// load_raw and values_of for rows of any alignment and length k: element by element.
template <Element type>
__device__ __forceinline__ Chunk load_elements(const void* row, int chunk, int k, bool inside) {
  Chunk c;
  const int first = chunk * kChunk;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    c.v[i] = inside && first + i < k ? load_element<type>(row, first + i) : 0.0f;
  }
  return c;
}

// ---- ranges ------------------------------------------------------------------------------------

/// Largest |x|, largest x and largest -x, the last two not below 0. As bits, because non-negative
/// floats are ordered like integers; amax is a NaN, so above infinity, if there is one.
struct Range {
  uint32_t amax = 0, high = 0, low = 0;
};

/// high and low are left at 0 where nobody wants them (symmetric codes).
__device__ __forceinline__ Range widen(Range r, const Chunk& c, bool symmetric) {
  float amax = __uint_as_float(r.amax);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) amax = ptx::max_or_nan(amax, fabsf(c.v[i]));
  r.amax = __float_as_uint(amax);
  if (!symmetric) {
    float high = __uint_as_float(r.high), low = __uint_as_float(r.low);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      high = fmaxf(high, c.v[i]);
      low = fmaxf(low, -c.v[i]);
    }
    r.high = __float_as_uint(fabsf(high));  // they may be -0, whose bits are not below all others
    r.low = __float_as_uint(fabsf(low));
  }
  return r;
}

/// Over `width` (4, 8 or 16) neighbouring lanes.
__device__ __forceinline__ uint32_t lanes_max(uint32_t v, int width) {
#pragma unroll
  for (int d = 8; d > 0; d /= 2) {
    if (d < width) v = max(v, __shfl_xor_sync(kAllLanes, v, d));
  }
  return v;
}

__device__ __forceinline__ Range lanes_range(Range r, int width, bool symmetric) {
  r.amax = lanes_max(r.amax, width);
  if (!symmetric) {
    r.high = lanes_max(r.high, width);
    r.low = lanes_max(r.low, width);
  }
  return r;
}

/// Over the block, in every thread. One barrier; not to be called twice by a kernel.
__device__ __forceinline__ Range block_range(Range r, bool symmetric) {
  __shared__ uint32_t of_warp[3][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  r.amax = __reduce_max_sync(kAllLanes, r.amax);
  if (!symmetric) {
    r.high = __reduce_max_sync(kAllLanes, r.high);
    r.low = __reduce_max_sync(kAllLanes, r.low);
  }
  if (lane == 0) {
    of_warp[0][warp] = r.amax;
    of_warp[1][warp] = r.high;
    of_warp[2][warp] = r.low;
  }
  __syncthreads();
  r.amax = __reduce_max_sync(kAllLanes, lane < warps ? of_warp[0][lane] : 0);
  if (!symmetric) {
    r.high = __reduce_max_sync(kAllLanes, lane < warps ? of_warp[1][lane] : 0);
    r.low = __reduce_max_sync(kAllLanes, lane < warps ? of_warp[2][lane] : 0);
  }
  return r;
}

// ---- scales ------------------------------------------------------------------------------------

/// code = round(clamp(x * inverse, low, high)). As it stands, what gives only zeros.
struct Encoding {
  float scale = 0;
  float inverse = 0, low = 0, high = 0;
  bool clamps = true;  // false: no x is so large that it has to be clamped before it is rounded
};

/// largest: bits of the largest |x|.
__device__ __forceinline__ Encoding symmetric_encoding(uint32_t largest, const QuantizeArgs& a) {
  const float limit = static_cast<float>(a.limit);
  const float amax = __fmul_rn(__uint_as_float(largest), a.clip);
  if (amax < kSmallestRange) return {};
  // Unclipped: |x * inverse| is at most limit * (1 + 2^-22), which is rounded to limit.
  return {__fdiv_rn(amax, limit), __fdiv_rn(limit, amax), -limit, limit, a.clip != 1.0f};
}

__device__ __forceinline__ Encoding dynamic_encoding(const Range& range, const QuantizeArgs& a) {
  if (a.symmetric) return symmetric_encoding(range.amax, a);
  Encoding e;
  const float low = __fmul_rn(-__uint_as_float(range.low), a.clip);
  const float high = __fmul_rn(__uint_as_float(range.high), a.clip);
  const float scale = __fsub_rn(__fdiv_rn(high, 15.0f), __fdiv_rn(low, 15.0f));
  if (scale < kSmallestRange) return e;
  const float inverse = __fdiv_rn(1.0f, scale);
  const float zero = fminf(fmaxf(rintf(__fmul_rn(-low, inverse)), 0.0f), 15.0f);
  return {scale, inverse, -zero, 15.0f - zero};
}

/// own: range of the elements that share the scale, or (tensor, static) of a part of them, where
/// all it says is whether they are finite. index: of the static scale.
__device__ __forceinline__ Encoding choose_encoding(const Range& own, const QuantizeArgs& a,
                                                    int64_t index) {
  Encoding e;
  if (own.amax >= kInfinityBits) {  // y becomes NaN through the scale; the codes are zeros
    e.scale = __uint_as_float(0x7fc00000u);
    return e;
  }
  switch (a.scaling) {
    case Scaling::token:
    case Scaling::group: return dynamic_encoding(own, a);
    case Scaling::tensor:
      return dynamic_encoding({a.tensor_range[0], a.tensor_range[1], a.tensor_range[2]}, a);
    case Scaling::static_tensor:
    case Scaling::static_group: break;
  }
  const float limit = static_cast<float>(a.limit), scale = a.static_scales[index];
  return {scale, __fdiv_rn(1.0f, scale), -limit, limit};
}

// ---- codes -------------------------------------------------------------------------------------

/// Eight times x * inverse, clamped if need be: all lanes with one scale take the same branch.
__device__ __forceinline__ Chunk scaled(const Chunk& c, const Encoding& e) {
  Chunk s;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) s.v[i] = __fmul_rn(c.v[i], e.inverse);
  if (e.clamps) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) s.v[i] = fminf(fmaxf(s.v[i], e.low), e.high);
  }
  return s;
}

/// Eight codes. Adding 1.5 * 2^23 rounds to an integer, half to even, and leaves it in the lowest
/// byte: a quarter of what a conversion costs. NaN becomes low, which is 0 then.
__device__ __forceinline__ uint2 encode(const Chunk& c, const Encoding& e) {
  const Chunk s = scaled(c, e);
  uint32_t b[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) b[i] = __float_as_uint(__fadd_rn(s.v[i], 12582912.0f));
  const auto pack = [](uint32_t b0, uint32_t b1, uint32_t b2, uint32_t b3) {
    return __byte_perm(__byte_perm(b0, b1, 0x0040), __byte_perm(b2, b3, 0x0040), 0x5410);
  };
  return {pack(b[0], b[1], b[2], b[3]), pack(b[4], b[5], b[6], b[7])};
}

/// Two e4m3 numbers, |x|, |y| <= 448, rounded half to even; x in the low byte. Software below
/// sm_89: adding 1.5 * 2^23 ulps rounds to an ulp (at least that of 2^-6), and f16 has e4m3's
/// fields in other widths, 2^8 apart.
__device__ __forceinline__ uint32_t e4m3_pair(float x, float y) {
#if __CUDA_ARCH__ >= 890
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(y), "f"(x));
  return pair;
#else
  const auto byte_of = [](float v) {
    const uint32_t exponent = max(__float_as_uint(v) & 0x7f800000u, 0x3c800000u);
    const float large = __uint_as_float((exponent + (20u << 23)) | 0x400000u);
    const float rounded = __fsub_rn(__fadd_rn(v, large), large);
    const uint32_t sign = __float_as_uint(v) >> 24 & 0x80u;
    const uint32_t half = __half_as_ushort(__float2half_rn(__fmul_rn(rounded, 0x1p-8f)));
    return sign | (half & 0x7fffu) >> 7;
  };
  return byte_of(x) | byte_of(y) << 8;
#endif
}
/// The same numbers as f16.
__device__ __forceinline__ uint32_t halves_of(uint32_t e4m3_pair) {
  const auto half_of = [](uint32_t byte) {
    return __hmul(
        __ushort_as_half(static_cast<unsigned short>((byte & 0x80u) << 8 | (byte & 0x7fu) << 7)),
        __ushort_as_half(0x5c00));  // 2^8
  };
  return static_cast<uint32_t>(__half_as_ushort(half_of(e4m3_pair & 0xffu))) |
         static_cast<uint32_t>(__half_as_ushort(half_of(e4m3_pair >> 8))) << 16;
}

/// Eight e4m3 numbers as bytes; integers: the codes of encode(), whose magnitude is at most 8.
__device__ __forceinline__ uint2 encode_e4m3(const Chunk& c, const Encoding& e, bool integers) {
  Chunk s = scaled(c, e);
  if (integers) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      s.v[i] = __fsub_rn(__fadd_rn(s.v[i], 12582912.0f), 12582912.0f);
    }
  }
  return {e4m3_pair(s.v[0], s.v[1]) | e4m3_pair(s.v[2], s.v[3]) << 16,
          e4m3_pair(s.v[4], s.v[5]) | e4m3_pair(s.v[6], s.v[7]) << 16};
}

/// Stores a chunk of bytes. For all lanes of a warp; `inside` is false for lanes that have no
/// chunk.
///
/// Order wgmma: chunk c of 32 k holds words 2 c + h, which belong at 4 h + c. Lanes c and c + 1 (c
/// even) swap a word each, so that one has both of h = 0, the other both of h = 1: again eight
/// bytes a lane, and the warp still writes 256 bytes in a row.
__device__ __forceinline__ void store_bytes(uint2 words, const QuantizeArgs& a, int64_t row,
                                            int chunk, bool inside) {
  int place = chunk;
  if (a.wgmma_order) {
    const int c = threadIdx.x & 3;  // as chunk & 3, and the same for all chunks of a thread
    const bool odd = (c & 1) != 0;
    const uint32_t other = __shfl_xor_sync(kAllLanes, odd ? words.x : words.y, 1);
    words = odd ? make_uint2(other, words.y) : make_uint2(words.x, other);
    place += 2 * (c & 1) + (c >> 1) - c;
  }
  if (inside) {
    *reinterpret_cast<uint2*>(a.codes + row * a.padded_k + int64_t{place} * kChunk) = words;
  }
}

/// Stores the sum of each promoted run of codes, by one lane. For all lanes of a warp.
__device__ __forceinline__ void store_sum(uint2 codes, const QuantizeArgs& a, const Dealing& d,
                                          int64_t row, int chunk, bool inside) {
  const int width = 1 << d.sum_shift;
  int sum = __dp4a(static_cast<int>(codes.x), 0x01010101,
                   __dp4a(static_cast<int>(codes.y), 0x01010101, 0));
#pragma unroll
  for (int i = 8; i > 0; i /= 2) {
    if (i < width) sum += __shfl_xor_sync(kAllLanes, sum, i);
  }
  if (inside && (chunk & (width - 1)) == 0) a.sums[row * d.sums + (chunk >> d.sum_shift)] = sum;
}

/// Stores what a chunk becomes. For all lanes of a warp.
__device__ __forceinline__ void store_chunk(const Chunk& c, const Encoding& e,
                                            const QuantizeArgs& a, const Dealing& d, int64_t row,
                                            int chunk, bool inside) {
  const uint2 bytes =
      a.kind == Codes::int8 ? encode(c, e) : encode_e4m3(c, e, a.kind == Codes::int_as_e4m3);
  if (a.kind == Codes::halves) {
    if (!inside) return;
    *reinterpret_cast<uint4*>(a.codes + 2 * (row * a.padded_k + int64_t{chunk} * kChunk)) = {
        halves_of(bytes.x & 0xffff), halves_of(bytes.x >> 16), halves_of(bytes.y & 0xffff),
        halves_of(bytes.y >> 16)};
    return;
  }
  store_bytes(bytes, a, row, chunk, inside);
  if (a.sums != nullptr) store_sum(bytes, a, d, row, chunk, inside);
}

/// Quantizes kChunks chunks a thread that are in registers, chunk i being first + i * blockDim.x +
/// threadIdx.x if that is below end. The block's part of its row is number blockIdx.y of gridDim.y.
template <int kChunks, Reach reach>
__device__ __forceinline__ void quantize_part(const Chunk (&x)[kChunks], const QuantizeArgs& a,
                                              const Dealing& d, int64_t row, int first, int end) {
  Encoding e;
  if constexpr (reach == Reach::block) {
    Range range;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) range = widen(range, x[i], a.symmetric);
    e = choose_encoding(block_range(range, a.symmetric), a, blockIdx.y);
    if (threadIdx.x == 0) a.scales[row * gridDim.y + blockIdx.y] = e.scale;
  }
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int chunk = first + i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    const bool inside = chunk < end;
    if constexpr (reach == Reach::lanes) {
      const int group = chunk >> d.group_shift, width = 1 << d.group_shift;
      const Range range = lanes_range(widen({}, x[i], a.symmetric), width, a.symmetric);
      e = choose_encoding(range, a, min(group, d.groups - 1));
      if (inside && (chunk & (width - 1)) == 0 && group < d.groups) {
        a.scales[row * d.groups + group] = e.scale;
      }
    }
    store_chunk(x[i], e, a, d, row, chunk, inside);
  }
}

}  // namespace nibble::cuda
