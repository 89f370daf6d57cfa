// What both methods of `nibble quantize` write: the tensors of one layer and config.json.
#include <nlohmann/json.hpp>

#include "quantize_run.h"

namespace nibble::cli {
namespace {

using nlohmann::json;

TensorView view_of(TensorDtype dtype, std::vector<int64_t> shape, const void* data) {
  TensorView view{dtype, std::move(shape), static_cast<const std::byte*>(data), 0};
  view.bytes = static_cast<size_t>(view.elements() * tensor_dtype_bytes(dtype));
  return view;
}

}  // namespace

TensorMap views_of(const std::string& name, const AwqTensors& tensors) {
  const int64_t groups = tensors.k / tensors.group_size, words = tensors.n / 8;
  const TensorDtype scale_dtype =
      tensors.scale_dtype == Dtype::bf16 ? TensorDtype::bf16 : TensorDtype::f16;
  return {
      {name + ".qweight", view_of(TensorDtype::i32, {tensors.k, words}, tensors.qweight.data())},
      {name + ".qzeros", view_of(TensorDtype::i32, {groups, words}, tensors.qzeros.data())},
      {name + ".scales", view_of(scale_dtype, {groups, tensors.n}, tensors.scales.data())}};
}

json quantized_config(const Checkpoint& checkpoint, const QuantizePlan& plan,
                      const QuantizeArguments& arguments) {
  // Other readers convert every linear that is not listed, except lm_head.
  json left = json::array();
  for (const DenseLinear& linear : plan.left) {
    if (components(linear.name).back() != "lm_head") left.push_back(linear.name);
  }
  json config = checkpoint.config();
  config["quantization_config"] = {{"quant_method", "awq"},
                                   {"zero_point", !arguments.symmetric},
                                   {"group_size", arguments.group_size},
                                   {"bits", 4},
                                   {"version", "gemm"},
                                   {"modules_to_not_convert", left.empty() ? json() : left}};
  return config;
}

}  // namespace nibble::cli
