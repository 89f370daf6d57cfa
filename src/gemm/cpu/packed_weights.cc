#include "gemm/cpu/packed_weights.h"

#include <omp.h>

#include <algorithm>
#include <limits>
#include <new>

#include "base/cpu_features.h"
#include "gemm/gemm.h"

namespace nibble {
namespace {

struct Scratch {
  std::vector<uint8_t> codes;  // (k, 32)
};

/// Codes (k, 32) of one block -> its lines. Layout: packed_weights.h.
void pack_block_codes(const PackedWeights& w, const uint8_t* codes, uint8_t* lines) {
  for (int64_t g = 0; g < w.groups; ++g) {
    for (int64_t quad = 0; quad < w.quads; ++quad) {
      uint8_t* line = lines + (g * w.quads + quad) * kLineBytes;
      for (int64_t i = 0; i < 4; ++i) {
        const int64_t in_group = quad * 4 + i;
        if (in_group >= w.group_size) break;  // padding stays zero
        const uint8_t* row = codes + (g * w.group_size + in_group) * kBlockColumns;
        for (int64_t c = 0; c < 16; ++c) {
          line[4 * c + i] = static_cast<uint8_t>(row[c] | (row[16 + c] << 4));
        }
      }
    }
  }
}

void pack_block(const QuantMatrix& matrix, int64_t block, Scratch& scratch, PackedWeights& w) {
  const int64_t n0 = block * kBlockColumns;
  const int64_t count = std::min(kBlockColumns, matrix.n - n0);
  auto* codes = const_cast<uint8_t*>(w.codes(block));
  auto* scales = const_cast<uint16_t*>(w.scales(block));
  auto* zeros = const_cast<uint8_t*>(w.zeros(block));
  if (count == kBlockColumns) {
    unpack_codes(matrix, n0, count, scratch.codes.data());
    unpack_scales(matrix, n0, count, scales);
    unpack_zeros(matrix, n0, count, zeros);
  } else {  // unpack densely, then spread to rows of 32
    std::vector<uint8_t> narrow(static_cast<size_t>(w.k * count));
    std::vector<uint16_t> narrow_scales(static_cast<size_t>(w.groups * count));
    std::vector<uint8_t> narrow_zeros(static_cast<size_t>(w.groups * count));
    unpack_codes(matrix, n0, count, narrow.data());
    unpack_scales(matrix, n0, count, narrow_scales.data());
    unpack_zeros(matrix, n0, count, narrow_zeros.data());
    std::fill(scratch.codes.begin(), scratch.codes.end(), uint8_t{0});
    for (int64_t k = 0; k < w.k; ++k) {
      std::copy_n(&narrow[k * count], count, &scratch.codes[k * kBlockColumns]);
    }
    for (int64_t g = 0; g < w.groups; ++g) {
      std::copy_n(&narrow_scales[g * count], count, scales + g * kBlockColumns);
      std::copy_n(&narrow_zeros[g * count], count, zeros + g * kBlockColumns);
    }
  }
  pack_block_codes(w, scratch.codes.data(), codes);
}

}  // namespace

Result<PackedWeights> pack_weights(const QuantMatrix& matrix, const void* bias, Dtype bias_dtype,
                                   int threads) try {
  NIBBLE_TRY(check_quant_matrix(matrix, "weight"));
  PackedWeights w;
  w.k = matrix.k;
  w.n = matrix.n;
  w.group_size = matrix.group_size;
  w.groups = matrix.groups();
  w.quads = quads_of(matrix.group_size);
  w.blocks = (matrix.n + kBlockColumns - 1) / kBlockColumns;
  w.scale_dtype = matrix.scale_dtype;
  if (w.blocks > std::numeric_limits<int64_t>::max() / w.block_bytes()) {
    return Status(Code::out_of_memory, "the packed size of a weight overflows");
  }
  Result<AlignedBuffer> storage = AlignedBuffer::zeroed(static_cast<size_t>(w.bytes()));
  if (!storage.ok()) return storage.status();
  w.storage = std::move(*storage);
  if (bias != nullptr) {
    w.bias.assign(static_cast<size_t>(w.blocks * kBlockColumns), 0.0f);
    for (int64_t i = 0; i < w.n; ++i) w.bias[i] = load_as_float(bias, i, bias_dtype);
  }
  const int team = std::clamp(threads > 0 ? threads : available_cpus(), 1, kMaxThreads);
  bool out_of_memory = false;
#pragma omp parallel num_threads(team)
  {
    try {
      Scratch scratch{std::vector<uint8_t>(static_cast<size_t>(w.k * kBlockColumns))};
      // A hand-made static split: a thread that runs out of memory must not leave a barrier
      // waiting.
      for (int64_t b = omp_get_thread_num(); b < w.blocks; b += omp_get_num_threads()) {
        pack_block(matrix, b, scratch, w);
      }
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      out_of_memory = true;
    }
  }
  if (out_of_memory) return Status(Code::out_of_memory, "cannot allocate scratch to pack a weight");
  return w;
} catch (const std::bad_alloc&) {
  return Status(Code::out_of_memory, "cannot allocate memory to pack a weight");
}

}  // namespace nibble
