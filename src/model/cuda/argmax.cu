// Greedy sampling: the largest logit of every row, and the positions moved on. A row is shared out
// to several blocks; the last one to finish takes the largest of their results. A maximum is the
// same in any order.
#include <algorithm>

#include "gemm/cuda/launch.h"
#include "gemm/cuda/quantize_rows.h"
#include "model/cuda/kernels.h"
#include "model/cuda/logit_key.h"

namespace nibble::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kMostParts = 32;     // of a row
constexpr int kPartFloats = 8192;  // the least that is worth a block
/// Scratch of a row: (kMostParts) keys and a counter.
constexpr int kRowWords = kMostParts + 2;

__global__ void __launch_bounds__(kThreads) argmax_rows(const __grid_constant__ ArgmaxArgs a) {
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  const int64_t row = blockIdx.y;
  const int parts = static_cast<int>(gridDim.x);
  const int64_t quads = (a.vocab + 3) / 4, share = (quads + parts - 1) / parts;
  const int64_t first = blockIdx.x * share, end = min(first + share, quads);
  const float* logits = a.logits + row * a.stride;
  const auto* from = reinterpret_cast<const float4*>(logits);
  uint64_t key = 0;
  const auto look = [&](float v, int64_t index) {
    key = max(key, logit_key(v, static_cast<uint32_t>(index)));
  };
  for (int64_t i = first + threadIdx.x; i < end; i += kThreads) {
    if (4 * i + 4 <= a.vocab) {
      const float4 v = from[i];
      look(v.x, 4 * i);
      look(v.y, 4 * i + 1);
      look(v.z, 4 * i + 2);
      look(v.w, 4 * i + 3);
    } else {
      for (int64_t j = 4 * i; j < a.vocab; ++j) look(logits[j], j);
    }
  }
  key = block_best<kThreads>(key);
  if (threadIdx.x != 0) return;
  auto* words = static_cast<uint64_t*>(a.scratch) + row * kRowWords;
  if (parts > 1) {
    words[blockIdx.x] = key;
    auto* arrived = reinterpret_cast<uint32_t*>(words + kMostParts);
    if (ptx::add_acquire_release(arrived, 1) + 1 != static_cast<uint32_t>(parts)) return;
    *arrived = 0;
#pragma unroll
    for (int i = 0; i < kMostParts; ++i) {  // loads side by side
      if (i < parts) key = max(key, __ldcg(words + i));
    }
  }
  a.tokens[row] = key == kFaultyLogit ? -1 : index_of_key(key);
  if (a.position != nullptr && key != kFaultyLogit && a.position[row] >= 0) a.position[row] += 1;
}

}  // namespace

int64_t argmax_scratch_bytes(int64_t rows) { return rows * kRowWords * 8; }

cudaError_t launch_argmax(const ArgmaxArgs& args, cudaStream_t stream) {
  if (args.rows < 1 || args.rows > 65535 || args.vocab < 1 || args.vocab > INT32_MAX ||
      args.stride < args.vocab || args.tokens == nullptr || args.scratch == nullptr ||
      args.logits == nullptr || !vector_rows(args.logits, args.stride, kChunk, Element::f32)) {
    return cudaErrorInvalidValue;
  }
  Launch how;
  how.grid =
      dim3(static_cast<unsigned>(std::clamp<int64_t>(args.vocab / kPartFloats, 1, kMostParts)),
           static_cast<unsigned>(args.rows));
  how.threads = kThreads;
  how.stream = stream;
  how.programmatic = args.programmatic;
  return launch_kernel(argmax_rows, how, args);
}

}  // namespace nibble::cuda
