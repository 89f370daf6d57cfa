// The kernels of a decoder layer that are not products, for whole models on a GPU: plain argument
// structs and launch functions, like gemm/cuda/kernels.h. No kernel chooses, allocates or waits;
// none needs the host between two launches, so a CUDA graph can replay them with new positions.
// Norms and gates, quantized or not, are in gemm/cuda/fused_quantize.h.
//
// "16 bits" is f16 or bf16. All results are the same bits every time, and a row's (a sequence's)
// do not depend on what else is in the batch. Every launch function returns cudaErrorInvalidValue
// for arguments outside what its comment says, before anything runs. Pointers are device memory,
// 16-byte aligned, and so are all rows (strides are in elements); nothing is owned here.
// `programmatic`: launched with programmatic stream serialization.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "gemm/cuda/fused_quantize.h"
#include "model/sampling.h"

namespace nibble::cuda {

// ---- the KV cache ------------------------------------------------------------------------------

inline constexpr int kPagePositions = 64;
inline constexpr int kKvSlice = 64;  // channels that lie together

/// Channels of a head in the cache: whole slices.
constexpr int64_t padded_head_dim(int64_t head_dim) {
  return (head_dim + kKvSlice - 1) / kKvSlice * kKvSlice;
}
/// Elements of one page, of the keys as of the values, of one layer.
constexpr int64_t page_elements(int64_t kv_heads, int64_t head_dim) {
  return kv_heads * kPagePositions * padded_head_dim(head_dim);
}

/// Keys and values of one layer, in pages of 64 positions that belong to one sequence each. A page:
///
///   (kv_heads, slices of 64 channels, 64 positions, 8 pieces of 8 channels)
///
/// where piece p of position t lies at place p ^ (t % 8): a page's head is one contiguous copy to
/// shared memory, and there it is what ldmatrix reads without bank conflicts and wgmma takes with
/// its 128-byte swizzle. Channels from head_dim on are zeros.
///
/// All pages must be zeroed once, before their first use (cudaMemset). After that they may change
/// hands as they are: what is stored is finite, and what lies past a sequence's end is not seen.
struct KvPages {
  Element type = Element::f16;  // 16 bits
  void* keys = nullptr;         // of page 0; page i begins page_stride elements later
  void* values = nullptr;
  int64_t page_stride = 0;              // >= page_elements(); more if layers share the pool
  const int32_t* page_table = nullptr;  // (sequences, max_pages): page of positions 64 i ..
  int64_t max_pages = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;  // a multiple of 16, at most 256
};

// ---- rope.cu -----------------------------------------------------------------------------------

/// What comes between the product that makes q, k and v and the attention: RMSNorm of q and k over
/// head_dim where the model has it, rope, and k and v into their place of the cache. Arithmetic as
/// in gemm/float_ops.h, but for the order in which squares are summed.
///
/// A key or value that does not fit the cache's type is stored as 0, and 1 is stored to
/// faults[sequence]; so it is if a q, k or v is NaN or infinite. q is stored as it is.
struct RopeArgs {
  Element type = Element::bf16;  // of qkv, 16 bits
  const void* qkv = nullptr;     // (rows, heads | kv_heads | kv_heads, head_dim): q, k, v
  int64_t qkv_stride = 0;
  int64_t rows = 0;
  int64_t heads = 0;     // a multiple of kv_heads
  void* q = nullptr;     // (rows, heads, head_dim) of kv.type; may be qkv itself, with
  int64_t q_stride = 0;  // its stride, if the types are equal
  KvPages kv;
  const int32_t* sequence = nullptr;  // (rows): row of the page table
  const int32_t* position = nullptr;  // (rows); a row with position < 0 is left out
  const float* cosine = nullptr;      // (positions, head_dim / 2), from rope_angles()
  const float* sine = nullptr;
  const float* q_norm = nullptr;  // (head_dim) or null; both or none
  const float* k_norm = nullptr;
  float eps = 0;
  int32_t* faults = nullptr;  // (sequences); never cleared here
  bool programmatic = false;
};
cudaError_t launch_rope(const RopeArgs& args, cudaStream_t stream);

// ---- attention ---------------------------------------------------------------------------------

/// softmax(scale * q k) v over the positions [max(0, p - window + 1), p] of the row's sequence, p
/// the row's position; window 0: all. The cache holds them already (launch_rope). Products of 16
/// bits in tensor cores with float sums, a running softmax in float, its weights rounded to kv.type
/// for the second product.
struct AttentionArgs {
  const void* q = nullptr;  // (rows, heads, head_dim) of kv.type
  int64_t q_stride = 0;
  int64_t heads = 0;  // a multiple of kv.kv_heads
  KvPages kv;
  int64_t window = 0;
  float scale = 0;
  Element type = Element::bf16;  // of out, 16 bits
  void* out = nullptr;           // (rows, heads, head_dim)
  int64_t out_stride = 0;
  bool programmatic = false;
};

/// Positions that one block of the decode kernel takes: fixed, so that a sequence's bits are too.
inline constexpr int kDecodeSplit = 256;

/// attention_decode.cu: one row a sequence. heads / kv_heads at most 16. max_context only sizes the
/// grid and the scratch: positions must be below it; blocks that find nothing to do end at once.
struct DecodeArgs {
  AttentionArgs attention;
  int64_t rows = 0;                   // at most 1024
  const int32_t* sequence = nullptr;  // (rows)
  const int32_t* position = nullptr;  // (rows); a row with position < 0 is left out, its out not
                                      // written
  int64_t max_context = 0;
  void* scratch = nullptr;  // decode_scratch_bytes(); zeroed once before its first use, then left
                            // to this kernel; may be shared by all layers of a stream
  int multiprocessors = 0;  // of the device: the size of the grid, not of the result
  /// With rope.qkv: launch_rope and this in one launch, the same bits. Only what
  /// decode_takes(rope). Read of it: type, qkv, qkv_stride, heads, cosine, sine, faults. q, of
  /// either, is left as it is. Launched programmatically, it waits for the kernel in front only
  /// before it reads qkv: sequence, position, the page table and what the cache holds already must
  /// be older than that kernel.
  RopeArgs rope;
  /// With codes.codes: o's operand instead of out, which is then not written; the bits of
  /// launch_quantize() from out. Only what decode_quantizes(). Not read of it: x, x_stride, m and
  /// programmatic. A row that is left out gets scales of 0, and its codes stay as they are.
  QuantizeArgs codes;
};
/// No norms, one type, and heads of whole slices.
inline bool decode_takes(const RopeArgs& rope) {
  return rope.q_norm == nullptr && rope.k_norm == nullptr && rope.type == rope.kv.type &&
         rope.kv.head_dim == padded_head_dim(rope.kv.head_dim);
}
inline constexpr int64_t kCodesHeadDim = 128;
/// int8 codes, every head a group of its own scale; no sums.
inline bool decode_quantizes(const AttentionArgs& a, const QuantizeArgs& to) {
  return (to.scaling == Scaling::group || to.scaling == Scaling::static_group) &&
         to.group_size == kCodesHeadDim && a.kv.head_dim == kCodesHeadDim &&
         to.k == a.heads * kCodesHeadDim && to.padded_k == to.k && to.kind == Codes::int8 &&
         to.type == a.type && to.sums == nullptr && to.scales != nullptr;
}
int64_t decode_scratch_bytes(int64_t rows, int64_t heads, int64_t head_dim, int64_t max_context);
cudaError_t launch_attention_decode(const DecodeArgs& args, cudaStream_t stream);

/// Rows of a prompt that one block takes together; consecutive positions of one sequence.
inline constexpr int kPrefillRows = 128;
struct PrefillTile {
  int32_t sequence = 0;
  int32_t row = 0;       // of q and out
  int32_t position = 0;  // of that row; the next ones follow
  int32_t count = 0;     // 1..kPrefillRows
};

/// attention_prefill_*.cu: any number of rows of any number of sequences. A row's bits depend on
/// its position and window alone, not on how a prompt was cut.
struct PrefillArgs {
  AttentionArgs attention;
  const PrefillTile* tiles = nullptr;  // (num_tiles), device memory
  int64_t num_tiles = 0;               // at most 65535
  bool wgmma = false;                  // compute capability 9.0; else mma.sync, 8.0 and later
};
cudaError_t launch_attention_prefill(const PrefillArgs& args, cudaStream_t stream);

/// Consecutive rows of one sequence: rows [row, row + count) are its positions from `position` on.
struct PrefillSpan {
  int32_t sequence = 0, row = 0, position = 0, count = 0;
};
/// The tiles of a batch, those with the longest contexts first: the short ones fill the gaps.
std::vector<PrefillTile> prefill_tiles(const std::vector<PrefillSpan>& spans);

// ---- embedding.cu ------------------------------------------------------------------------------

/// hidden[r] = table[tokens[r]] * scale, in float. A token outside [0, vocab) gives a row of NaN.
struct EmbeddingArgs {
  Element type = Element::f16;  // of the table: any
  const void* table = nullptr;  // (vocab, width)
  int64_t vocab = 0;
  int64_t width = 0;                // a multiple of 8
  const int32_t* tokens = nullptr;  // (rows)
  int64_t rows = 0;
  float scale = 1;
  float* hidden = nullptr;  // (rows, width), contiguous
  bool programmatic = false;
};
cudaError_t launch_embedding(const EmbeddingArgs& args, cudaStream_t stream);

// ---- argmax.cu, sample.cu ----------------------------------------------------------------------

/// Rows of logits that a token each is chosen from. A row with a NaN or an infinity gives token -1.
struct LogitRows {
  const float* logits = nullptr;  // (rows, vocab)
  int64_t stride = 0;             // a multiple of 4
  int64_t rows = 0, vocab = 0;
  int32_t* tokens = nullptr;  // (rows)
  /// (rows), advanced by 1 where the token is not -1 and the position not below 0, for the next
  /// replay of a graph.
  int32_t* position = nullptr;
  bool programmatic = false;
};

/// The largest logit of every row; of equal ones the lowest index. position may be null.
struct ArgmaxArgs : LogitRows {
  void* scratch = nullptr;  // argmax_scratch_bytes(); zeroed once before its first use
};
int64_t argmax_scratch_bytes(int64_t rows);
cudaError_t launch_argmax(const ArgmaxArgs& args, cudaStream_t stream);

/// What draw_token() (model/sampler.h) draws from every row by its rule at the position behind the
/// row's: the same token. vocab is below sampling::kMostTokens.
struct SampleArgs : LogitRows {
  const sampling::Rule* rules = nullptr;  // (rows)
};
cudaError_t launch_sample(const SampleArgs& args, cudaStream_t stream);

}  // namespace nibble::cuda
