// The second half of an MLP before its last product: function(gate) * up, quantized.
#include "gemm/cuda/fused_quantize.h"
#include "gemm/cuda/quantize_rows.h"

namespace nibble::cuda {
namespace {

/// x / (1 + e^-t). Where e^-t overflows the quotient is -0, as it should be.
__device__ __forceinline__ float over_one_plus_exp(float x, float minus_t) {
  return __fdividef(x, 1.0f + expf(minus_t));
}

template <GateFunction function>
__device__ __forceinline__ float gated(float g) {
  if constexpr (function == GateFunction::silu) return over_one_plus_exp(g, -g);
  const float u = 0.7978845608f * __fmaf_rn(0.044715f, g * g * g, g);
  return over_one_plus_exp(g, -2.0f * u);
}

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

template <Element type>
cudaError_t launch(const GateQuantizeArgs& args, cudaStream_t stream) {
  if (args.function == GateFunction::silu) {
    return launch_quantize_rows(Gated<type, GateFunction::silu>{args}, stream);
  }
  return launch_quantize_rows(Gated<type, GateFunction::gelu_tanh>{args}, stream);
}

}  // namespace

cudaError_t launch_gate_quantize(const GateQuantizeArgs& args, cudaStream_t stream) {
  const QuantizeArgs& to = args.to;
  if (to.type == Element::f32 || to.scaling == Scaling::tensor ||
      !vector_rows(to.x, to.x_stride, to.k, to.type) ||
      !vector_rows(args.up, args.up_stride, to.k, to.type)) {
    return cudaErrorInvalidValue;
  }
  return to.type == Element::f16 ? launch<Element::f16>(args, stream)
                                 : launch<Element::bf16>(args, stream);
}

}  // namespace nibble::cuda
