// The rows that a gate makes, for the kernels that quantize them. Device code only.
#pragma once

#include "gemm/cuda/gate_device.h"
#include "gemm/cuda/quantize_device.h"

namespace nibble::cuda {

/// A Source of quantize_rows.h: function(gate) * up.
template <Element type, GateFunction function>
struct Gated {
  static constexpr bool kVector = true;
  struct Fetched {
    Raw<type> gate, up;
  };
  GateQuantizeArgs a;

  __host__ __device__ const QuantizeArgs& args() const { return a.to; }

  __device__ Fetched fetch(int64_t row, int chunk, bool inside) const {
    const bool there = inside && chunk * kChunk < static_cast<int>(a.to.k);
    const auto* gate = static_cast<const char*>(a.to.x) + row * a.to.x_stride * 2;
    const auto* up = static_cast<const char*>(a.up) + row * a.up_stride * 2;
    return {load_raw<type>(gate, chunk, there), load_raw<type>(up, chunk, there)};
  }
  __device__ static Chunk values(const Fetched& f) {
    const Chunk gate = values_of<type>(f.gate), up = values_of<type>(f.up);
    Chunk c;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) c.v[i] = gated<function>(gate.v[i]) * up.v[i];
    return c;
  }
};

}  // namespace nibble::cuda
