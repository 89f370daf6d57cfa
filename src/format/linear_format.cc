// The recogniser: which layouts do the tensors of one prefix fit, and which of them does the config
// confirm. Tensors decide, the config breaks ties and can only refuse; docs/formats.md has the
// table. Not here: which prefixes a checkpoint has, and their order (linear_list.cc).
#include "format/linear_format.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "format/message.h"

namespace nibble {
namespace {

constexpr int64_t kPerWord = 8;  // nibbles in an int32

const TensorView* find_tensor(const TensorMap& tensors, std::string_view name) {
  const auto found = tensors.find(name);
  return found == tensors.end() ? nullptr : &found->second;
}

/// The tensors of one layer, in the order they are printed.
class Parts {
 public:
  Parts(const TensorMap& tensors, const std::string& prefix,
        std::initializer_list<const char*> suffixes) {
    for (const char* suffix : suffixes) {
      parts_.emplace_back(suffix, find_tensor(tensors, prefix + "." + suffix));
    }
  }

  const TensorView* operator[](std::string_view suffix) const {
    for (const auto& [name, view] : parts_) {
      if (name == suffix) return view;
    }
    return nullptr;
  }

  /// "found qweight I32 [512, 64], scales F16 [4, 512]"
  std::string found() const {
    std::string text;
    for (const auto& [suffix, view] : parts_) {
      if (view == nullptr) continue;
      text += fmt::format("{}{} {} {}", text.empty() ? "found " : ", ", suffix,
                          tensor_dtype_name(view->dtype), view->shape_text());
    }
    return text;
  }

 private:
  std::vector<std::pair<std::string_view, const TensorView*>> parts_;
};

bool is_matrix(const TensorView* view) {
  return view != nullptr && view->shape.size() == 2 && view->shape[0] > 0 && view->shape[1] > 0;
}

bool has_shape(const TensorView* view, int64_t rows, int64_t columns) {
  return view != nullptr && view->shape == std::vector{rows, columns};
}

/// One reading of a layer's shapes. `problem` is ok if every tensor agrees with it.
struct Reading {
  LinearFormat format = LinearFormat::unknown;
  int64_t k = 0, n = 0, group_size = 0;
  int64_t zero_words = 0;  // awq_gemv
  Status problem;
};

Status corrupt(const std::string& reason) { return Status(Code::corrupt_file, reason); }

const char* source_of(const QuantConfig& config) {
  return config.source.empty() ? "the config" : config.source.c_str();
}

/// Sets the group size from the number of scales along K and compares it with the config.
void set_group_size(Reading& reading, int64_t groups, const QuantConfig& config) {
  if (reading.k % groups != 0) {
    reading.problem = corrupt(fmt::format("{} groups do not divide K = {}", groups, reading.k));
    return;
  }
  reading.group_size = reading.k / groups;
  const int64_t expected = config.group_size == -1 ? reading.k : config.group_size;
  if (expected != 0 && expected != reading.group_size) {
    reading.problem =
        corrupt(fmt::format("group size {} in {}, but the shapes say {}", config.group_size,
                            source_of(config), reading.group_size));
  }
}

std::optional<Reading> read_as_gemm(const Parts& parts, const QuantConfig& config) {
  const auto& q = parts["qweight"]->shape;
  const auto& s = parts["scales"]->shape;
  if (s[1] % kPerWord != 0 || q[1] != s[1] / kPerWord) return std::nullopt;
  Reading reading{LinearFormat::awq_gemm, q[0], s[1], 0, 0, {}};
  set_group_size(reading, s[0], config);
  const TensorView* zeros = parts["qzeros"];
  if (zeros != nullptr && !has_shape(zeros, s[0], q[1])) {
    reading.problem = corrupt(fmt::format("qzeros should be [{}, {}]", s[0], q[1]));
  } else if (zeros == nullptr && !(config.zero_point_given && !config.zero_point)) {
    reading.problem = corrupt("qzeros is missing and no config says zero_point false");
  }
  return reading;
}

/// AutoAWQ's width of the zero points of one channel, whose padding depends on the group size.
int64_t gemv_zero_words(int64_t k, int64_t group_size) {
  const int64_t multiple = group_size >= 128 ? 1 : group_size == 64 ? 2 : 4;
  const int64_t words = (k / group_size + kPerWord - 1) / kPerWord;
  return (words + multiple - 1) / multiple * multiple;
}

std::optional<Reading> read_as_gemv(const Parts& parts, const QuantConfig& config) {
  const auto& q = parts["qweight"]->shape;
  const auto& s = parts["scales"]->shape;
  if (s[1] % kPerWord != 0 || s[0] != q[0]) return std::nullopt;
  Reading reading{LinearFormat::awq_gemv, q[1] * kPerWord, q[0], 0, s[1] / kPerWord, {}};
  if (!has_shape(parts["qzeros"], s[0], reading.zero_words)) return std::nullopt;

  // Padding hides the number of groups, so the size comes from the config; without one, only
  // shapes that a single ordinary size explains are accepted.
  const int64_t k = reading.k;
  std::vector<int64_t> sizes;
  for (const int64_t size : {int64_t{32}, int64_t{64}, int64_t{128}, int64_t{256}, k}) {
    const bool possible = k % size == 0 && (size >= 128 || size == 64 || size == 32);
    const bool seen = std::find(sizes.begin(), sizes.end(), size) != sizes.end();
    if (possible && !seen && gemv_zero_words(k, size) == reading.zero_words) sizes.push_back(size);
  }
  const int64_t given = config.group_size == -1 ? k : config.group_size;
  if (given > 0) {
    const bool fits = k % given == 0 && (given >= 128 || given == 64 || given == 32) &&
                      gemv_zero_words(k, given) == reading.zero_words;
    if (fits) sizes = {given};
    if (!fits) {
      reading.problem =
          corrupt(fmt::format("group size {} in {}, but {} words of zero points per channel say {}",
                              config.group_size, source_of(config), reading.zero_words,
                              sizes.empty() ? "no known group size" : joined(sizes, " or ")));
      return reading;
    }
  }
  if (sizes.size() == 1) {
    reading.group_size = sizes[0];
  } else {
    reading.problem =
        corrupt(fmt::format("{} words of zero points per channel fit {}", reading.zero_words,
                            sizes.empty() ? "no known group size"
                                          : fmt::format("group size {}, and no config says which",
                                                        joined(sizes, " and "))));
  }
  return reading;
}

std::optional<Reading> read_as_gptq(const Parts& parts, const QuantConfig& config) {
  const auto& q = parts["qweight"]->shape;
  const auto& s = parts["scales"]->shape;
  if (q[1] != s[1]) return std::nullopt;
  Reading reading{LinearFormat::gptq, q[0] * kPerWord, q[1], 0, 0, {}};
  set_group_size(reading, s[0], config);
  const TensorView* zeros = parts["qzeros"];
  if (zeros != nullptr && !has_shape(zeros, s[0], (s[1] + kPerWord - 1) / kPerWord)) {
    reading.problem = corrupt("qzeros do not match");
  }
  return reading;
}

std::optional<Reading> read_as_marlin(const Parts& parts, const QuantConfig& config) {
  const auto& q = parts["qweight"]->shape;
  const auto& s = parts["scales"]->shape;
  if (parts["qzeros"] != nullptr || q[1] != 2 * s[1]) return std::nullopt;
  Reading reading{LinearFormat::awq_marlin, q[0] * 16, s[1], 0, 0, {}};
  set_group_size(reading, s[0], config);
  return reading;
}

/// The format a config's version names, to choose between readings that all fit.
LinearFormat format_of_version(const QuantConfig& config) {
  const std::string& version = config.version;
  if (version == "gemv") return LinearFormat::awq_gemv;
  if (version == "marlin") return LinearFormat::awq_marlin;
  if (version.starts_with("gptq") || config.method == "gptq") return LinearFormat::gptq;
  // exllama and ipex only repack at run time: on disk they are gemm.
  if (version == "gemm" || version.starts_with("exllama") || version == "ipex") {
    return LinearFormat::awq_gemm;
  }
  return LinearFormat::unknown;
}

Reading read_shapes(const Parts& parts, const QuantConfig& config) {
  std::vector<Reading> fitting;
  std::optional<Reading> first_misfit;
  for (const auto read : {read_as_gemm, read_as_gemv, read_as_gptq, read_as_marlin}) {
    const auto reading = read(parts, config);
    if (!reading) continue;
    if (reading->problem.ok()) {
      fitting.push_back(*reading);
    } else if (!first_misfit) {
      first_misfit = reading;
    }
  }
  if (fitting.size() > 1) {
    const LinearFormat named = format_of_version(config);
    const auto chosen = std::find_if(fitting.begin(), fitting.end(),
                                     [&](const Reading& r) { return r.format == named; });
    if (chosen != fitting.end()) return *chosen;
    Reading ambiguous;
    ambiguous.problem = corrupt(
        fmt::format("the shapes fit both {} and {}, and no config says which",
                    linear_format_name(fitting[0].format), linear_format_name(fitting[1].format)));
    return ambiguous;
  }
  if (fitting.size() == 1) return fitting[0];
  if (first_misfit) return *first_misfit;
  Reading none;
  none.problem = Status(Code::unsupported, "the shapes fit no known 4-bit format");
  return none;
}

/// f16 or bf16; the scales of every format this project runs.
std::optional<Dtype> scale_dtype_of(const TensorView& scales) {
  const auto dtype = float_dtype(scales.dtype);
  return dtype == Dtype::f32 ? std::nullopt : dtype;
}

Status wrong_scale_dtype(const TensorView& scales) {
  return Status(Code::unsupported, fmt::format("scales are {}, expected F16 or BF16",
                                               tensor_dtype_name(scales.dtype)));
}

/// AutoAWQ's family of suffixes, which GPTQ shares.
Status recognise_awq(const Parts& parts, const QuantConfig& config, QuantizedLinear& out) {
  const auto refuse = [&](LinearFormat format, const std::string& reason) {
    out.format = format;
    return Status(Code::unsupported, reason);
  };
  const TensorView* q = parts["qweight"];
  const TensorView* scales = parts["scales"];
  const TensorView* zeros = parts["qzeros"];
  const auto not_run = [](LinearFormat format) {
    return fmt::format("the {} layout is not supported", linear_format_name(format));
  };
  if (parts["scaled_zeros"] != nullptr) {
    return refuse(LinearFormat::llm_awq, not_run(LinearFormat::llm_awq));
  }
  if (q->dtype == TensorDtype::i16) {
    return refuse(LinearFormat::awq_gemv_fast, not_run(LinearFormat::awq_gemv_fast));
  }
  if (parts["g_idx"] != nullptr) return refuse(LinearFormat::gptq, not_run(LinearFormat::gptq));
  if (q->dtype != TensorDtype::i32 || !is_matrix(q)) {
    return refuse(LinearFormat::unknown, "qweight is not a matrix of I32");
  }
  if (!is_matrix(scales)) return refuse(LinearFormat::unknown, "scales is missing or no matrix");
  if (zeros != nullptr && (zeros->dtype != TensorDtype::i32 || !is_matrix(zeros))) {
    return refuse(LinearFormat::unknown, "qzeros is not a matrix of I32");
  }

  const Reading reading = read_shapes(parts, config);
  out.format = reading.format;
  out.matrix.k = reading.k;
  out.matrix.n = reading.n;
  out.matrix.group_size = reading.group_size;
  if (reading.format == LinearFormat::gptq || reading.format == LinearFormat::awq_marlin) {
    return refuse(reading.format, not_run(reading.format));
  }
  NIBBLE_TRY(reading.problem);
  const auto scale_dtype = scale_dtype_of(*scales);
  if (!scale_dtype) return wrong_scale_dtype(*scales);

  out.matrix.layout =
      reading.format == LinearFormat::awq_gemm ? WeightLayout::awq_gemm : WeightLayout::awq_gemv;
  out.matrix.scale_dtype = *scale_dtype;
  out.matrix.zero_words = reading.zero_words;
  out.matrix.q = q->data;
  out.matrix.zeros = zeros == nullptr ? nullptr : zeros->data;
  out.matrix.scales = scales->data;
  return {};
}

Status recognise_compressed_tensors(const Parts& parts, const QuantConfig& config,
                                    QuantizedLinear& out) {
  const TensorView* q = parts["weight_packed"];
  const TensorView* scales = parts["weight_scale"];
  const TensorView* zeros = parts["weight_zero_point"];
  const TensorView* shape = parts["weight_shape"];
  if (q->dtype != TensorDtype::i32 || !is_matrix(q)) {
    return Status(Code::unsupported, "weight_packed is not a matrix of I32");
  }
  out.format =
      zeros == nullptr ? LinearFormat::ct_pack_symmetric : LinearFormat::ct_pack_asymmetric;
  if (parts["weight_g_idx"] != nullptr) {
    return Status(Code::unsupported, "activation ordering (weight_g_idx) is not supported");
  }
  if (shape == nullptr || shape->dtype != TensorDtype::i64 ||
      shape->shape != std::vector{int64_t{2}}) {
    return corrupt("weight_shape is missing or not I64 [2]");
  }
  int64_t stored[2];
  std::memcpy(stored, shape->data, sizeof stored);
  const auto [n, k] = std::pair(stored[0], stored[1]);
  if (n != q->shape[0] || k < 1 || (k - 1) / kPerWord + 1 != q->shape[1]) {
    return corrupt(
        fmt::format("weight_shape holds [{}, {}], which weight_packed does not match", n, k));
  }
  Reading reading{out.format, k, n, 0, 0, {}};
  out.matrix.k = k;
  out.matrix.n = n;
  if (!is_matrix(scales) || scales->shape[0] != n) {
    return corrupt(fmt::format("weight_scale is missing or not [{}, groups]", n));
  }
  const int64_t groups = scales->shape[1];
  set_group_size(reading, groups, config);
  NIBBLE_TRY(reading.problem);
  out.matrix.group_size = reading.group_size;
  const auto scale_dtype = scale_dtype_of(*scales);
  if (!scale_dtype) return wrong_scale_dtype(*scales);
  if (zeros != nullptr && zeros->dtype != TensorDtype::i32) {
    return Status(Code::unsupported, "weight_zero_point is not I32");
  }
  if (zeros != nullptr && !has_shape(zeros, (n + kPerWord - 1) / kPerWord, groups)) {
    return corrupt(
        fmt::format("weight_zero_point should be [{}, {}]", (n + kPerWord - 1) / kPerWord, groups));
  }
  out.matrix.layout = WeightLayout::ct_pack;
  out.matrix.scale_dtype = *scale_dtype;
  out.matrix.q = q->data;
  out.matrix.zeros = zeros == nullptr ? nullptr : zeros->data;
  out.matrix.scales = scales->data;
  return {};
}

bool is_symmetric(const QuantMatrix& matrix) {
  if (matrix.zeros == nullptr) return true;
  std::vector<uint8_t> zeros(static_cast<size_t>(matrix.groups() * matrix.n));
  unpack_zeros(matrix, 0, matrix.n, zeros.data());
  return std::all_of(zeros.begin(), zeros.end(), [](uint8_t zero) { return zero == 8; });
}

}  // namespace

const char* linear_format_name(LinearFormat format) {
  switch (format) {
    case LinearFormat::awq_gemm: return "awq-gemm";
    case LinearFormat::awq_gemv: return "awq-gemv";
    case LinearFormat::ct_pack_asymmetric: return "ct-pack-asym";
    case LinearFormat::ct_pack_symmetric: return "ct-pack-sym";
    case LinearFormat::awq_gemv_fast: return "awq-gemv-fast";
    case LinearFormat::llm_awq: return "llm-awq";
    case LinearFormat::awq_marlin: return "awq-marlin";
    case LinearFormat::gptq: return "gptq";
    case LinearFormat::unknown: return "unknown";
  }
  return "?";
}

std::optional<Dtype> float_dtype(TensorDtype dtype) {
  switch (dtype) {
    case TensorDtype::f32: return Dtype::f32;
    case TensorDtype::f16: return Dtype::f16;
    case TensorDtype::bf16: return Dtype::bf16;
    default: return std::nullopt;
  }
}

QuantizedLinear recognise_linear(const TensorMap& tensors, const std::string& prefix,
                                 SuffixFamily family, const QuantConfig& config) {
  const bool awq_suffixes = family == SuffixFamily::awq;
  QuantizedLinear linear;
  linear.name = prefix;
  linear.bias = find_tensor(tensors, prefix + ".bias");
  const Parts parts = awq_suffixes ? Parts(tensors, prefix,
                                           {"qweight", "qzeros", "scales", "scaled_zeros", "g_idx"})
                                   : Parts(tensors, prefix,
                                           {"weight_packed", "weight_scale", "weight_zero_point",
                                            "weight_shape", "weight_g_idx"});
  linear.status = awq_suffixes ? recognise_awq(parts, config, linear)
                               : recognise_compressed_tensors(parts, config, linear);
  if (config.bits != 0 && config.bits != 4) {
    linear.status = Status(Code::unsupported, fmt::format("{} says {} bits, only 4 are supported",
                                                          source_of(config), config.bits));
  }
  const TensorView* bias = linear.bias;
  if (linear.status.ok() && bias != nullptr &&
      (bias->shape != std::vector{linear.matrix.n} || !float_dtype(bias->dtype))) {
    linear.status =
        corrupt(fmt::format("bias {} {} should be floats [{}]", tensor_dtype_name(bias->dtype),
                            bias->shape_text(), linear.matrix.n));
  }
  if (linear.status.ok()) {
    linear.status = check_quant_matrix(linear.matrix, quote_name(prefix).c_str());
    if (!linear.status.ok()) linear.status = Status(Code::unsupported, linear.status.message());
  } else {
    linear.status = Status(
        linear.status.code(),
        fmt::format("{}: {}; {}", quote_name(prefix), linear.status.message(), parts.found()));
  }
  if (linear.status.ok()) {
    linear.symmetric = is_symmetric(linear.matrix);
  } else {
    linear.matrix.q = linear.matrix.zeros = linear.matrix.scales = nullptr;
  }
  return linear;
}

}  // namespace nibble
