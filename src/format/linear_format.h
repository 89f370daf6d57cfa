// From tensors to quantized linears: finds every linear layer of a checkpoint, names the format of
// each one by suffix, dtype and shape (config second), and gives a QuantMatrix view for the formats
// this project runs. The rest is recognised by name and refused with the shapes that were found.
// linear_format.cc recognises one layer; linear_list.cc lists those of a checkpoint.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "format/checkpoint.h"
#include "format/quant_matrix.h"

namespace nibble {

enum class LinearFormat : int {
  awq_gemm,
  awq_gemv,
  ct_pack_asymmetric,
  ct_pack_symmetric,
  // recognised and refused:
  awq_gemv_fast,
  llm_awq,
  awq_marlin,
  gptq,
  unknown,
};

const char* linear_format_name(LinearFormat format);  // "awq-gemm", "ct-pack-asym", "gptq", ...

/// One quantized linear layer of a checkpoint, e.g. "model.layers.0.self_attn.q_proj".
struct QuantizedLinear {
  std::string name;
  LinearFormat format = LinearFormat::unknown;
  Status status;       // ok: `matrix` may be used; else why not, with the shapes found
  QuantMatrix matrix;  // views into the checkpoint; if refused, k, n and group_size as far as the
                       // shapes tell them (else 0) and null pointers
  const TensorView* bias = nullptr;  // (N) or null
  bool symmetric = false;            // no zero points, or every zero point is 8
};

/// The tensor that marks a quantized linear: "<prefix>.qweight" or "<prefix>.weight_packed".
enum class SuffixFamily { awq, compressed_tensors };

/// The linear of one prefix, whose marking tensor must be among `tensors`.
QuantizedLinear recognise_linear(const TensorMap& tensors, const std::string& prefix,
                                 SuffixFamily family, const QuantConfig& config);

/// F32, F16 or BF16 as an element type; nothing for the others.
std::optional<Dtype> float_dtype(TensorDtype dtype);

/// Every quantized linear of `checkpoint` in natural order of names (layer 2 before layer 10).
/// Problems of one layer are in its `status`, so that all of them can be listed.
std::vector<QuantizedLinear> find_quantized_linears(const Checkpoint& checkpoint);

/// The same on a bare table of tensors, which must outlive the result.
std::vector<QuantizedLinear> find_quantized_linears(const TensorMap& tensors,
                                                    const QuantConfig& config);

/// A linear that is stored in 16 or 32 bits: "<name>.weight" with two dimensions, not an embedding.
struct DenseLinear {
  std::string name;
  int64_t k = 0, n = 0;
  const TensorView* weight = nullptr;  // (N, K) row-major
  const TensorView* bias = nullptr;
};
std::vector<DenseLinear> find_dense_linears(const Checkpoint& checkpoint);

/// Layers that an engine fuses (q,k,v; gate,up) and that disagree in format, group size, scale
/// dtype or in being quantized at all: one sentence each. Empty if all agree.
std::vector<std::string> check_fused_siblings(const std::vector<QuantizedLinear>& linears,
                                              const std::vector<DenseLinear>& dense);

}  // namespace nibble
