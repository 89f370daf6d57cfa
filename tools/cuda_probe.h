// Launches of cuda_probe.cu. None waits.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace nibble::cli {

/// `count` f16 or bf16 values, about N(0, 1), a pure function of index and seed.
cudaError_t launch_fill_normal(void* to, int64_t count, uint64_t seed, bool bf16,
                               cudaStream_t stream);
/// Random bits, those of `mask` in every word. bytes: a multiple of 4.
cudaError_t launch_fill_words(void* to, int64_t bytes, uint64_t seed, cudaStream_t stream,
                              uint32_t mask = ~0u);
/// Reads everything once. bytes: a multiple of 16. sink: one word.
cudaError_t launch_read(const void* from, int64_t bytes, uint32_t* sink, int multiprocessors,
                        cudaStream_t stream);

}  // namespace nibble::cli
