// Drawing a token from every row of logits, a block a row. Sums are integers (model/sampling.h), so
// their order does not matter, and what is drawn is what the host would draw.
//
// The cut that top-k or top-p makes is found eight bits of a key at a time, by sums over the tokens
// with each value of the next eight. Every lane has its own column of sums: most logits of a row
// have the same first eight bits.
#include "gemm/cuda/launch.h"
#include "gemm/cuda/quantize_rows.h"
#include "model/cuda/kernels.h"
#include "model/cuda/logit_key.h"

namespace nibble::cuda {
namespace {

using sampling::Cut;
using sampling::Rule;

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kDigits = 256;
constexpr int kColumnWords = kDigits * 32;  // of one half of the sums
constexpr int kHalfBits = sampling::kWeightBits / 2;
constexpr uint32_t kHalf = (1u << kHalfBits) - 1;
constexpr int kUnroll = 4;    // loads of a thread under way
static_assert(kWarps == 32);  // a warp adds what all of them have found

struct Shared {
  uint32_t columns[2][kColumnWords];  // lower and upper halves
  uint64_t digits[kDigits];
  uint64_t sums[kWarps];
  uint32_t counts[kWarps];
  uint64_t best, above, draw;
  uint32_t digit, warp, ties;
};

struct Row {
  const float* logits = nullptr;
  int vocab = 0;
  float largest = 0, factor = 0;

  __device__ __forceinline__ uint64_t weight(float v) const {
    return sampling::weight_of(v, largest, factor);
  }
};

/// f(logit, id) for every token of quads [first, end), every step-th.
template <class Function>
__device__ __forceinline__ void each_logit(const Row& row, int first, int end, int step,
                                           const Function& f) {
  const auto* quads = reinterpret_cast<const float4*>(row.logits);
  for (int i = first; i < end; i += kUnroll * step) {
    float4 v[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      if (i + j * step < end) v[j] = quads[i + j * step];  // a row is padded to quads
    }
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      const int id = 4 * (i + j * step);
      if (i + j * step >= end) break;
      f(v[j].x, id);
      if (id + 1 < row.vocab) f(v[j].y, id + 1);
      if (id + 2 < row.vocab) f(v[j].z, id + 2);
      if (id + 3 < row.vocab) f(v[j].w, id + 3);
    }
  }
}

template <class Function>
__device__ __forceinline__ void each_logit(const Row& row, const Function& f) {
  each_logit(row, threadIdx.x, (row.vocab + 3) / 4, kThreads, f);
}

template <class Number>
__device__ __forceinline__ Number warp_sum(Number v) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(kAllLanes, v, d);
  return v;
}

/// Over the block, in every thread.
__device__ __forceinline__ uint64_t block_sum(Shared& shared, uint64_t v) {
  v = warp_sum(v);
  __syncthreads();  // the sums before these have been read
  if (threadIdx.x % 32 == 0) shared.sums[threadIdx.x / 32] = v;
  __syncthreads();
  return warp_sum(shared.sums[threadIdx.x % 32]);
}

/// The sum of lanes 0 to this one.
template <class Number>
__device__ __forceinline__ Number inclusive_scan(Number v) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const Number below = __shfl_up_sync(kAllLanes, v, d);
    if (lane >= d) v += below;
  }
  return v;
}

/// Sums of one digit: its columns, then without what is not within the cut. By all threads.
__device__ __forceinline__ void add_columns(Shared& shared, bool minus, uint32_t cut_digit,
                                            uint64_t excess) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kDigits / kWarps; ++i) {
    const int digit = warp * (kDigits / kWarps) + i;
    uint64_t sum = shared.columns[0][digit * 32 + lane] +
                   (uint64_t{shared.columns[1][digit * 32 + lane]} << kHalfBits);
    sum = warp_sum(sum);
    if (minus && digit == static_cast<int>(cut_digit)) sum -= excess;
    if (lane == 0) shared.digits[digit] = sum;
  }
}

/// The largest digit from which on the sums reach `needed`, and what lies above it. By one warp.
__device__ __forceinline__ void find_digit(Shared& shared, uint64_t above, uint64_t needed) {
  constexpr int kEach = kDigits / 32;
  const int lane = threadIdx.x % 32, top = kDigits - 1 - lane * kEach;  // lane 0 has the largest
  uint64_t mine = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) mine += shared.digits[top - i];
  const uint64_t end = above + inclusive_scan(mine);
  const uint32_t reached = __ballot_sync(kAllLanes, end >= needed);
  if (lane != __ffs(reached) - 1) return;
  above = end - mine;
  int digit = top;
  while (above + shared.digits[digit] < needed) above += shared.digits[digit--];
  shared.digit = static_cast<uint32_t>(digit);
  shared.above = above;
}

struct Below {
  uint32_t key = 0;
  uint64_t above = 0;  // the sum over larger keys
};

/// The largest key such that the sum over it and all larger ones, of tokens within `cut`, reaches
/// `needed`: of their weights, or of one each. What has the cut's key is `excess` too much.
template <bool weights>
__device__ Below reach(Shared& shared, const Row& row, const Cut& cut, uint64_t excess,
                       uint64_t needed) {
  const int lane = threadIdx.x % 32;
  Below found;
#pragma unroll 1
  for (int shift = 24; shift >= 0; shift -= 8) {
    const uint64_t prefix = uint64_t{found.key} >> (shift + 8);
    for (int i = threadIdx.x; i < 2 * kColumnWords; i += kThreads) (&shared.columns[0][0])[i] = 0;
    __syncthreads();
    each_logit(row, [&](float v, int) {
      const uint32_t key = sampling::key_of(v);
      if (key < cut.key || uint64_t{key} >> (shift + 8) != prefix) return;
      const uint32_t at = (key >> shift & (kDigits - 1)) * 32 + lane;
      if (weights) {
        const uint64_t weight = row.weight(v);
        atomicAdd(&shared.columns[0][at], static_cast<uint32_t>(weight) & kHalf);
        atomicAdd(&shared.columns[1][at], static_cast<uint32_t>(weight >> kHalfBits));
      } else {
        atomicAdd(&shared.columns[0][at], 1);
      }
    });
    __syncthreads();
    add_columns(shared, uint64_t{cut.key} >> (shift + 8) == prefix,
                cut.key >> shift & (kDigits - 1), excess);
    __syncthreads();
    if (threadIdx.x < 32) find_digit(shared, found.above, needed);
    __syncthreads();
    found.key |= shared.digit << shift;
    found.above = shared.above;
  }
  return found;
}

/// The token at which the sum of weights, in order of ids, exceeds `draw`. In one thread.
__device__ void walk(Shared& shared, const Row& row, Cut cut, uint64_t draw, int32_t* token) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int quads = (row.vocab + 3) / 4, share = (quads + kWarps - 1) / kWarps;
  const int first = min(warp * share, quads), end = min(first + share, quads);
  const uint64_t tie = row.weight(sampling::logit_of(cut.key));
  uint64_t larger = 0;
  uint32_t equal = 0;
  each_logit(row, first + lane, end, 32, [&](float v, int) {
    const uint32_t key = sampling::key_of(v);
    if (key > cut.key) larger += row.weight(v);
    if (key == cut.key) equal += 1;
  });
  larger = warp_sum(larger);
  equal = warp_sum(equal);
  if (lane == 0) shared.sums[warp] = larger;
  if (lane == 0) shared.counts[warp] = equal;
  __syncthreads();
  if (warp == 0) {  // in which warp's share it is
    const uint32_t mine = shared.counts[lane], ties = inclusive_scan(mine);
    const uint32_t left = cut.ties - min(cut.ties, ties - mine);
    const uint64_t sum = shared.sums[lane] + min(mine, left) * tie;
    const uint64_t sums = inclusive_scan(sum);
    const uint32_t beyond = __ballot_sync(kAllLanes, sums > draw);
    if (lane == __ffs(beyond) - 1) {
      shared.warp = static_cast<uint32_t>(lane);
      shared.draw = draw - (sums - sum);
      shared.ties = left;
    }
  }
  __syncthreads();
  if (warp != static_cast<int>(shared.warp)) return;
  draw = shared.draw;
  uint32_t left = shared.ties;
  const auto* all = reinterpret_cast<const float4*>(row.logits);
#pragma unroll 1
  for (int at = first; at < end; at += 32) {
    const int quad = at + lane, id = 4 * quad;
    float4 v = {};
    if (quad < end) v = all[quad];
    const float each[4] = {v.x, v.y, v.z, v.w};
    uint32_t ties = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (quad < end && id + j < row.vocab && sampling::key_of(each[j]) == cut.key) ++ties;
    }
    const uint32_t through = inclusive_scan(ties);
    uint32_t mine = left - min(left, through - ties);
    uint64_t weights[4], sum = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      weights[j] = 0;
      if (quad >= end || id + j >= row.vocab) continue;
      const uint32_t key = sampling::key_of(each[j]);
      if (key < cut.key || (key == cut.key && mine == 0)) continue;
      if (key == cut.key) --mine;
      weights[j] = row.weight(each[j]);
      sum += weights[j];
    }
    const uint64_t sums = inclusive_scan(sum);
    const uint32_t beyond = __ballot_sync(kAllLanes, sums > draw);
    if (beyond != 0) {
      if (lane == __ffs(beyond) - 1) {
        uint64_t before = sums - sum;
        int j = 0;
        while (j < 3 && before + weights[j] <= draw) before += weights[j++];
        *token = id + j;
      }
      return;
    }
    draw -= __shfl_sync(kAllLanes, sums, 31);
    left -= min(left, __shfl_sync(kAllLanes, through, 31));
  }
}

__global__ void __launch_bounds__(kThreads) sample_rows(const __grid_constant__ SampleArgs a) {
  extern __shared__ __align__(16) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared*>(memory);
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  const int64_t at = blockIdx.x;
  const Rule rule = a.rules[at];
  Row row{a.logits + at * a.stride, static_cast<int>(a.vocab), 0, rule.factor};
  uint64_t key = 0;
  each_logit(row,
             [&](float v, int id) { key = max(key, logit_key(v, static_cast<uint32_t>(id))); });
  key = block_best<kThreads>(key);
  if (threadIdx.x == 0) shared.best = key;
  __syncthreads();
  key = shared.best;
  const int32_t position = a.position[at];
  __syncthreads();  // read before it is moved on
  const bool faulty = key == kFaultyLogit;
  if (threadIdx.x == 0 && !faulty && position >= 0) a.position[at] = position + 1;
  if (faulty || rule.factor == 0) {
    if (threadIdx.x == 0) a.tokens[at] = faulty ? -1 : index_of_key(key);
    return;
  }
  row.largest = row.logits[index_of_key(key)];
  Cut cut{0, static_cast<uint32_t>(row.vocab)};
  uint64_t left_out = 0;  // tokens with the cut's key that are not within it
  if (rule.top_k > 0 && rule.top_k < row.vocab) {
    const Below below = reach<false>(shared, row, cut, 0, static_cast<uint64_t>(rule.top_k));
    cut = {below.key, static_cast<uint32_t>(rule.top_k - below.above)};
    uint64_t equal = 0;
    each_logit(row, [&](float v, int) { equal += sampling::key_of(v) == cut.key ? 1 : 0; });
    left_out = block_sum(shared, equal) - cut.ties;
  }
  const uint64_t excess = left_out == 0 ? 0 : left_out * row.weight(sampling::logit_of(cut.key));
  uint64_t mine = 0;
  each_logit(row, [&](float v, int) {
    if (sampling::key_of(v) >= cut.key) mine += row.weight(v);
  });
  uint64_t kept = block_sum(shared, mine) - excess;
  if (rule.top_p != ~uint64_t{0}) {
    const uint64_t needed = sampling::needed_of(kept, rule.top_p);
    const Below below = reach<true>(shared, row, cut, excess, needed);
    const uint64_t tie = row.weight(sampling::logit_of(below.key));
    cut = {below.key, static_cast<uint32_t>((needed - below.above + tie - 1) / tie)};
    kept = below.above + cut.ties * tie;
  }
  __syncthreads();  // the sums that walk() writes have been read
  walk(shared, row, cut, sampling::draw_below(kept, rule.seed, position + 1), a.tokens + at);
}

}  // namespace

cudaError_t launch_sample(const SampleArgs& args, cudaStream_t stream) {
  if (args.rows < 1 || args.rows > INT32_MAX || args.vocab < 1 ||
      args.vocab >= sampling::kMostTokens || args.stride < args.vocab || args.rules == nullptr ||
      args.tokens == nullptr || args.position == nullptr || args.logits == nullptr ||
      !vector_rows(args.logits, args.stride, kChunk, Element::f32)) {
    return cudaErrorInvalidValue;
  }
  Launch how;
  how.grid = dim3(static_cast<unsigned>(args.rows));
  how.threads = kThreads;
  how.shared_bytes = sizeof(Shared);
  how.stream = stream;
  how.programmatic = args.programmatic;
  return launch_kernel(sample_rows, how, args);
}

}  // namespace nibble::cuda
