// silu_quantize.cu's rows of one scale, each by a cluster of blocks: a chunk a thread, the row's
// range put together in shared memory of all of them, by one barrier of the cluster.
#include "gemm/cuda/gate_cluster.h"
#include "gemm/cuda/gate_source.h"
#include "gemm/cuda/ptx.h"
#include "gemm/cuda/quantize_rows.h"

namespace nibble::cuda {
namespace {

constexpr int kMostClusterBlocks = 8;   // as many as may always be asked for
constexpr int kLeastBlockChunks = 128;  // less is not worth another block

/// Whole warps, so that lanes have the chunks that quantize_device.h wants them to have.
int block_chunks(int64_t row_chunks, int blocks) {
  return static_cast<int>((row_chunks + blocks - 1) / blocks + 31) / 32 * 32;
}

template <Element type, GateFunction function>
__global__ void __launch_bounds__(kRowThreads, 1)
    gate_cluster(const __grid_constant__ Gated<type, function> source,
                 const __grid_constant__ Dealing dealing) {
#if __CUDA_ARCH__ >= 900
  __shared__ uint32_t of_warp[3][kMostClusterBlocks * kRowThreads / 32];
  ptx::grid_launch_dependents();
  ptx::cluster_arrive();
  const QuantizeArgs& a = source.args();
  const int rank = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int chunk = rank * dealing.part_chunks + static_cast<int>(threadIdx.x);
  const bool inside = chunk < static_cast<int>(a.padded_k / kChunk);
  const int64_t row = blockIdx.y;
  ptx::grid_wait();
  const Chunk x = source.values(source.fetch(row, chunk, inside));
  Range range = widen({}, x, a.symmetric);
  range.amax = __reduce_max_sync(kAllLanes, range.amax);
  if (!a.symmetric) {
    range.high = __reduce_max_sync(kAllLanes, range.high);
    range.low = __reduce_max_sync(kAllLanes, range.low);
  }
  ptx::cluster_wait();  // all blocks are there
  if (lane < blocks) {
    const auto put = [&](int which, uint32_t v) {
      const uint32_t here = ptx::shared_address(&of_warp[which][rank * warps + warp]);
      ptx::store4_cluster(ptx::cluster_address(here, lane), v);
    };
    put(0, range.amax);
    if (!a.symmetric) put(1, range.high), put(2, range.low);
  }
  ptx::cluster_sync();
  const auto largest = [&](int which) {
    uint32_t v = 0;
    for (int i = lane; i < blocks * warps; i += 32) v = max(v, of_warp[which][i]);
    return __reduce_max_sync(kAllLanes, v);
  };
  range.amax = largest(0);
  if (!a.symmetric) range.high = largest(1), range.low = largest(2);
  const Encoding e = choose_encoding(range, a, 0);
  if (rank == 0 && threadIdx.x == 0) a.scales[row] = e.scale;
  store_chunk(x, e, a, dealing, row, chunk, inside);
#endif
}

template <Element type, GateFunction function>
cudaError_t launch(const GateQuantizeArgs& args, int blocks, cudaStream_t stream) {
  Dealing dealing = row_dealing(args.to);
  dealing.part_chunks = block_chunks(args.to.padded_k / kChunk, blocks);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(args.to.m));
  config.blockDim = dim3(static_cast<unsigned>(dealing.part_chunks));
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = args.to.programmatic ? 2 : 1;
  return cudaLaunchKernelEx(&config, gate_cluster<type, function>, Gated<type, function>{args},
                            dealing);
}

template <Element type>
cudaError_t launch(const GateQuantizeArgs& args, int blocks, cudaStream_t stream) {
  return args.function == GateFunction::silu
             ? launch<type, GateFunction::silu>(args, blocks, stream)
             : launch<type, GateFunction::gelu_tanh>(args, blocks, stream);
}

}  // namespace

int gate_cluster_blocks(const GateQuantizeArgs& args) {
  const QuantizeArgs& a = args.to;
  const bool one_scale =
      a.scaling == Scaling::token || a.scaling == Scaling::static_tensor || a.group_size >= a.k;
  if (!args.clusters || !one_scale) return 1;
  const int64_t chunks = a.padded_k / kChunk;
  int blocks = 1;
  while (blocks < kMostClusterBlocks && 2 * blocks * a.m <= kFewParts &&
         chunks >= int64_t{2} * blocks * kLeastBlockChunks) {
    blocks *= 2;
  }
  return chunks <= int64_t{blocks} * kRowThreads ? blocks : 1;
}

cudaError_t launch_gate_cluster(const GateQuantizeArgs& args, int blocks, cudaStream_t stream) {
  return args.to.type == Element::f16 ? launch<Element::f16>(args, blocks, stream)
                                      : launch<Element::bf16>(args, blocks, stream);
}

}  // namespace nibble::cuda
