// What both halves of the C ABI (capi.cc: CPU, capi_cuda.cc: CUDA) share: statuses, checks of what
// C cannot express, and the conversions of nibble.h's structs.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <concepts>
#include <cstring>
#include <initializer_list>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>

#include "format/quant_matrix.h"
#include "gemm/gemm.h"
#include "nibble.h"

namespace nibble::capi {

// ---- status -------------------------------------------------------------------------------------

inline nibble_status make_status(Code code, std::string_view message) {
  nibble_status status = {};
  status.code = static_cast<int32_t>(code);
  size_t length = std::min(message.size(), sizeof status.message - 1);
  if (length < message.size()) {  // never cut a UTF-8 character: its tail bytes are 10xxxxxx
    while (length > 0 && (static_cast<unsigned char>(message[length]) & 0xc0) == 0x80) --length;
  }
  std::memcpy(status.message, message.data(), length);
  return status;
}

/// Runs the body of an API function: a Status comes out as it is, an exception as a code.
template <std::invocable Body>
nibble_status guarded(const Body& body) noexcept {
  try {
    const Status status = body();
    return make_status(status.code(), status.message());
  } catch (const std::bad_alloc&) {
    return make_status(Code::out_of_memory, "out of memory");
  } catch (const std::length_error&) {
    return make_status(Code::out_of_memory, "a size exceeds what can be allocated");
  } catch (const std::exception& error) {
    return make_status(Code::unsupported, error.what());
  } catch (...) {
    return make_status(Code::unsupported, "unknown exception");
  }
}

inline Status invalid(std::string message) {
  return Status(Code::invalid_argument, std::move(message));
}

struct NamedPointer {
  const void* pointer;
  const char* name;
};

/// Names the first null pointer of the list.
inline Status require(std::initializer_list<NamedPointer> pointers) {
  for (const NamedPointer& p : pointers) {
    if (p.pointer == nullptr) return invalid(fmt::format("{} is null", p.name));
  }
  return {};
}

inline Status require_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return {};
  return invalid(fmt::format("{} is {}, expected {} to {}", name, value, low, high));
}

inline Status require_zero(const char* name, int64_t value) {
  return value == 0 ? Status{} : invalid(fmt::format("{} is {}, expected 0", name, value));
}

inline Status require_threads(int64_t threads) {
  if (threads <= kMaxThreads) return {};
  return invalid(fmt::format("threads is {}, expected at most {}", threads, kMaxThreads));
}

// ---- conversions --------------------------------------------------------------------------------

inline Result<QuantMatrix> matrix_from(const nibble_weight_desc* desc) {
  NIBBLE_TRY(require({{desc, "desc"}}));
  NIBBLE_TRY(require({{desc->qweight, "desc->qweight"}, {desc->scales, "desc->scales"}}));
  NIBBLE_TRY(require_range("desc->layout", desc->layout, NIBBLE_AWQ_GEMM, NIBBLE_CT_PACK));
  NIBBLE_TRY(require_range("desc->scale_dtype", desc->scale_dtype, NIBBLE_F16, NIBBLE_BF16));
  NIBBLE_TRY(require_zero("desc->reserved", desc->reserved));
  if (desc->layout != NIBBLE_AWQ_GEMV) {
    NIBBLE_TRY(require_zero("desc->zero_words", desc->zero_words));
  }
  if (desc->bias != nullptr) {
    NIBBLE_TRY(require_range("desc->bias_dtype", desc->bias_dtype, NIBBLE_F32, NIBBLE_BF16));
  }
  QuantMatrix matrix;
  matrix.k = desc->k;
  matrix.n = desc->n;
  matrix.group_size = desc->group_size == -1 ? desc->k : desc->group_size;
  matrix.layout = static_cast<WeightLayout>(desc->layout);
  matrix.scale_dtype = static_cast<Dtype>(desc->scale_dtype);
  matrix.q = static_cast<const std::byte*>(desc->qweight);
  matrix.zeros = static_cast<const std::byte*>(desc->qzeros);
  matrix.scales = static_cast<const std::byte*>(desc->scales);
  matrix.zero_words = desc->zero_words;
  NIBBLE_TRY(check_quant_matrix(matrix, "desc"));
  if (matrix.n % 8 != 0) {
    return invalid(fmt::format("desc: N = {} is not a multiple of 8", matrix.n));
  }
  return matrix;
}

inline Result<Problem> problem_from(const nibble_problem* problem) {
  NIBBLE_TRY(require({{problem, "problem"}}));
  const nibble_problem& p = *problem;
  const bool wide = p.mode == NIBBLE_W4A4_WIDE;
  if (!wide) NIBBLE_TRY(require_range("problem->mode", p.mode, NIBBLE_W4A16, NIBBLE_W4A8_FP8));
  NIBBLE_TRY(require_range("problem->x_dtype", p.x_dtype, NIBBLE_F32, NIBBLE_BF16));
  NIBBLE_TRY(require_range("problem->y_dtype", p.y_dtype, NIBBLE_F32, NIBBLE_BF16));
  NIBBLE_TRY(
      require_range("problem->granularity", p.granularity, NIBBLE_TENSOR, NIBBLE_STATIC_GROUP));
  NIBBLE_TRY(require_range("problem->asymmetric", p.asymmetric, 0, 1));
  NIBBLE_TRY(require_threads(p.threads));
  Problem to;
  to.m = p.m;
  to.n = p.n;
  to.k = p.k;
  to.group_size = p.group_size == -1 ? p.k : p.group_size;
  to.mode = wide ? Mode::w4a4 : static_cast<Mode>(p.mode);
  to.mixed_groups = wide;
  to.x_dtype = static_cast<Dtype>(p.x_dtype);
  to.y_dtype = static_cast<Dtype>(p.y_dtype);
  to.granularity = static_cast<Granularity>(p.granularity);
  to.symmetric = p.asymmetric == 0;
  return to;
}

/// `text` into a buffer of `bytes`, cut and zero-terminated; the length it would need.
inline size_t copy_text(std::string_view text, char* to, size_t bytes) {
  if (to != nullptr && bytes > 0) {
    const size_t length = std::min(text.size(), bytes - 1);
    std::memcpy(to, text.data(), length);
    to[length] = '\0';
  }
  return text.size();
}

}  // namespace nibble::capi
