// Weights of the ss kernels expanded beside their products, by warps that would have nothing to do:
// most of all weights need no launch of their own then, nor the time that it takes to write and
// read them with the tensor cores at rest. Device code only.
//
// What is not expanded beforehand (SsConfig::first_pairs) is cut into slabs, which are dealt out
// one by one to whoever is free, in the order in which products want them. So nobody waits for a
// block that does not run; and which warp expands a slab changes no bit of the image.
#pragma once

#include "gemm/cuda/ptx.h"
#include "gemm/cuda/ss_expander.h"

namespace nibble::cuda {

struct SsBeside {
  ExpandSource weights;
  int first_pair, pairs;  // of tiles of the image: these, and how many there are
  uint32_t* taken;        // slabs so far
  uint32_t* pieces;       // [tile][slice of 512 k]: slabs that there are

  /// Whether products of that tile have to wait for its pieces.
  __device__ bool has(int tile) const { return tile >= 2 * first_pair; }

  /// Of one thread: until it may copy the piece by cp.async.bulk.
  template <SsImage image>
  __device__ void wait(int tile, int slice) const {
    constexpr uint32_t kSlabs = image.columns / kSlabColumns;
    const uint32_t* piece = pieces + tile * weights.slices + slice;
    while (ptx::load_acquire(piece) != kSlabs) {
    }
    ptx::fence_async_global();
  }

  /// What a warp does.
  template <Expanded to, SsImage image>
  __device__ void expand(int lane) const {
    constexpr int kSlabs = image.columns / kSlabColumns;
    const int slices = static_cast<int>(weights.slices);
    const int count = (pairs - first_pair) * slices * 2 * kSlabs;
    int next = take(lane);
#pragma unroll 1
    for (;;) {
      const int slab = __shfl_sync(~0u, next, 0);
      if (slab >= count) return;
      next = take(lane);
      const int piece = slab / kSlabs, run = slab - piece * kSlabs;
      const int of_pair = piece / 2 / slices, slice = piece / 2 - of_pair * slices;
      const int tile = (first_pair + of_pair) * 2 + piece % 2;
      expand_slab<to, image>(tile, slice, run, lane);
      ptx::fence_async_global();
      __syncwarp();
      if (lane == 0) ptx::add_release(pieces + tile * slices + slice, 1);
    }
  }

 private:
  __device__ int take(int lane) const {
    return lane == 0 ? static_cast<int>(atomicAdd(taken, 1)) : 0;
  }

  /// 16 columns of a tile, a slice of k; a block is loaded while the one before it is stored.
  template <Expanded to, SsImage image>
  __device__ void expand_slab(int tile, int slice, int run, int lane) const {
    constexpr int kBlocks = kSlabDepth / kBlockDepth;
    const int64_t columns = int64_t{tile} * (image.columns / kSlabColumns) + run;
    const int first = slice * kBlocks, last = min(first + kBlocks, weights.blocks);
    uint8_t* to_block =
        weights.image + (int64_t{tile} * weights.blocks + first) * image.block_bytes();
    Run now(weights, columns, first, lane);
#pragma unroll 1
    for (int block = first; block < last; ++block, to_block += image.block_bytes()) {
      const Run then(weights, columns, min(block + 1, last - 1), lane);
      now.template store<to>(weights, image, to_block, run, lane);
      now = then;
    }
  }
};

}  // namespace nibble::cuda
