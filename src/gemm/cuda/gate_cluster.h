// A gate's row shared out to the blocks of a cluster: for few rows, where the time is that of one
// row and a block for each leaves most multiprocessors idle.
#pragma once

#include "gemm/cuda/fused_quantize.h"

namespace nibble::cuda {

/// Blocks that a row of launch_gate_quantize(args) is shared out to, a power of 2 up to 8; 1: none
/// of this. Pure.
int gate_cluster_blocks(const GateQuantizeArgs& args);

/// gate_cluster.cu: the same bits as with one block. args as launch_gate_quantize() wants them, one
/// scale a row; blocks: gate_cluster_blocks(), not 1.
cudaError_t launch_gate_cluster(const GateQuantizeArgs& args, int blocks, cudaStream_t stream);

}  // namespace nibble::cuda
