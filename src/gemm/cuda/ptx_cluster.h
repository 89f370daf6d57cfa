// PTX for kernels whose blocks write to each other's shared memory. sm_90. Device code only.
#pragma once

#include "gemm/cuda/ptx.h"

namespace nibble::cuda::ptx {

/// To shared memory of a block of the cluster (cluster_address).
__device__ __forceinline__ void store4_cluster(uint32_t address, uint32_t v) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

}  // namespace nibble::cuda::ptx
