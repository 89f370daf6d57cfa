// FlashInfer's prefill attention for Hopper (FA3), one sequence, causal, head_dim 128, bf16, as one
// C function: what bench_cuda_layer compares ours with. Built by scripts/flashinfer_peer.sh against
// the headers of FlashInfer's wheel; no part of Nibble.
#include <flashinfer/attention/hopper/prefill_sm90.cuh>
//
#include <flashinfer/attention/hopper/default_params.cuh>
#include <flashinfer/attention/hopper/variants.cuh>

/// q, out (queries, heads, 128); k, v (keys, kv_heads, 128): the queries are the last of the keys.
extern "C" cudaError_t flashinfer_prefill(const void* q, const void* k, const void* v, void* out,
                                          int heads, int kv_heads, int queries, int keys,
                                          float scale, cudaStream_t stream) {
  using Element = cutlass::bfloat16_t;
  constexpr int kHeadDim = 128;
  flashinfer::SinglePrefillParams<Element, Element, Element> p = {};
  p.q_ptr = static_cast<Element*>(const_cast<void*>(q));
  p.k_ptr = static_cast<Element*>(const_cast<void*>(k));
  p.v_ptr = static_cast<Element*>(const_cast<void*>(v));
  p.o_ptr = static_cast<Element*>(out);
  p.additional_params.sm_scale = scale;
  p.q_stride_n = p.o_stride_n = int64_t{heads} * kHeadDim;
  p.k_stride_n = p.v_stride_n = int64_t{kv_heads} * kHeadDim;
  p.q_stride_h = p.o_stride_h = p.k_stride_h = p.v_stride_h = kHeadDim;
  p.qo_len = queries;
  p.kv_len = keys;
  p.num_qo_heads = heads;
  p.num_kv_heads = kv_heads;
  p.group_size = heads / kv_heads;
  p.window_left = -1;
  p.causal = true;
  return flashinfer::SinglePrefillWithKVCacheDispatched<
      kHeadDim, kHeadDim, flashinfer::MaskMode::kCausal, false, flashinfer::StandardAttention>(
      p, stream);
}
