// What the launch functions of model/cuda/kernels.h check alike.
#pragma once

#include "model/cuda/kernels.h"

namespace nibble::cuda {

inline bool is_16_bits(Element type) { return type == Element::f16 || type == Element::bf16; }

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

/// Rows of 16 bits, head_dim a multiple of 8.
inline bool is_rows(const void* p, int64_t stride) {
  return p != nullptr && is_aligned(p) && stride % 8 == 0;
}

inline bool pages_are_valid(const KvPages& kv) {
  return is_16_bits(kv.type) && kv.kv_heads > 0 && kv.max_pages > 0 && kv.head_dim >= 16 &&
         kv.head_dim <= 256 && kv.head_dim % 16 == 0 && kv.page_table != nullptr &&
         kv.keys != nullptr && kv.values != nullptr && is_aligned(kv.keys) &&
         is_aligned(kv.values) && kv.page_stride % 8 == 0 &&
         kv.page_stride >= page_elements(kv.kv_heads, kv.head_dim);
}

inline bool attention_is_valid(const AttentionArgs& a) {
  return pages_are_valid(a.kv) && is_16_bits(a.type) && a.heads > 0 &&
         a.heads % a.kv.kv_heads == 0 && a.window >= 0 && a.scale > 0 && is_rows(a.q, a.q_stride) &&
         is_rows(a.out, a.out_stride);
}

/// launch.operator()<type, dim>() for the type of the pages and what their head_dim is padded to.
template <class Launch>
cudaError_t launch_for_pages(const KvPages& kv, const Launch& launch) {
  const auto of_type = [&]<Element type>() {
    switch (padded_head_dim(kv.head_dim)) {
      case 64: return launch.template operator()<type, 64>();
      case 128: return launch.template operator()<type, 128>();
      case 192: return launch.template operator()<type, 192>();
      case 256: return launch.template operator()<type, 256>();
    }
    return cudaErrorInvalidValue;
  };
  return kv.type == Element::f16 ? of_type.template operator()<Element::f16>()
                                 : of_type.template operator()<Element::bf16>();
}

}  // namespace nibble::cuda
