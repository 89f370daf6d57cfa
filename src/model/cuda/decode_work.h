// What the blocks of attention_decode.cu share out: for every row, the splits of 256 positions that
// its window reaches. Splits lie at fixed positions, so a sequence's are the same whatever else is
// in the batch. Which block takes which item depends on the batch; what comes of an item does not.
#pragma once

#include "model/cuda/kv_device.h"

namespace nibble::cuda {

inline constexpr int kDecodeRows = 1024;  // of a launch
inline constexpr int kDecodeHeads = 8;    // query heads that meet a page together: N of a product
inline constexpr int kSplitPages = kDecodeSplit / kPagePositions;

/// Query heads of one KV head are taken in parts of 8.
inline __host__ __device__ int decode_parts(int64_t groups) {
  return static_cast<int>((groups + kDecodeHeads - 1) / kDecodeHeads);
}

struct DecodeItem {
  int row, kv_head, part;
  int unit;          // splits in front of it, of all rows: the place of its partial result
  int index, count;  // of the row's splits
  int split;         // its positions: split * 256 ..
  int first, last;   // positions that the row sees
};

/// Rows and their splits, in shared memory of bytes().
struct DecodeWork {
  int* before;    // (rows + 1) splits of the rows in front
  int* position;  // (rows)

  static int bytes(int64_t rows) { return static_cast<int>(2 * rows + 1) * 4; }
  __device__ DecodeWork(void* memory, int64_t rows)
      : before(static_cast<int*>(memory)), position(before + rows + 1) {}

  /// By the first warp of the block; the others see it after a barrier.
  __device__ void fill(const DecodeArgs& a, int lane) {
    int total = 0;
    const int rows = static_cast<int>(a.rows);
    for (int base = 0; base < rows; base += 32) {
      const int row = base + lane;
      const int p = row < rows ? a.position[row] : -1;
      const int mine = p < 0 ? 0 : splits(p, a.attention.window);
      int sum = mine;
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, sum, d);
        if (lane >= d) sum += other;
      }
      if (row < rows) {
        before[row] = total + sum - mine;
        position[row] = p;
      }
      total += __shfl_sync(0xffffffffu, sum, 31);
    }
    if (lane == 0) before[rows] = total;
  }

  __device__ static int splits(int p, int64_t window) {
    return p / kDecodeSplit - first_position(p, window) / kDecodeSplit + 1;
  }

  __device__ DecodeItem item(const DecodeArgs& a, int number, int parts) const {
    const int kv_heads = static_cast<int>(a.attention.kv.kv_heads);
    DecodeItem i;
    i.unit = number / (kv_heads * parts);
    const int rest = number - i.unit * kv_heads * parts;
    i.kv_head = rest / parts;
    i.part = rest - i.kv_head * parts;
    int low = 0, high = static_cast<int>(a.rows);  // the last row with before <= unit
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (before[middle] <= i.unit ? low : high) = middle;
    }
    i.row = low;
    i.index = i.unit - before[low];
    i.count = before[low + 1] - before[low];
    i.last = position[low];
    i.first = first_position(i.last, a.attention.window);
    i.split = i.first / kDecodeSplit + i.index;
    return i;
  }
};

}  // namespace nibble::cuda
