#include "gemm/cpu/packed_weights.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <new>
#include <vector>

#include "base/cpu_features.h"
#include "base/thread_pool.h"
#include "gemm/gemm.h"

namespace nibble {
namespace {

// Columns that one task packs together: a row of their codes in a file of layout awq_gemm is one
// cache line.
constexpr int64_t kTaskBlocks = 4;
// Input channels unpacked at once: the scratch stays in L1, and so do the file's lines until all
// columns of the task have been taken from them.
constexpr int64_t kSliceRows = 256;

/// Rows [k0, k0 + rows) of one block, in scratch rows of `stride` codes -> its lines. The rows lie
/// within one group and k0 is 4-aligned in it. Layout: packed_weights.h.
void pack_rows(const PackedWeights& w, int64_t k0, int64_t rows, const uint8_t* codes,
               int64_t stride, int64_t columns, uint8_t* lines) {
  const int64_t group = k0 / w.group_size, quad0 = k0 % w.group_size / 4;
  uint8_t* line = lines + (group * w.quads + quad0) * kLineBytes;
  for (int64_t row = 0; row < rows; ++row, codes += stride) {
    uint8_t* to = line + row / 4 * kLineBytes + row % 4;
    if (columns == kBlockColumns) {
      for (int64_t c = 0; c < 16; ++c) {
        to[4 * c] = static_cast<uint8_t>(codes[c] | (codes[16 + c] << 4));
      }
    } else {
      for (int64_t c = 0; c < std::min<int64_t>(16, columns); ++c) {
        const uint8_t high = 16 + c < columns ? codes[16 + c] : uint8_t{0};
        to[4 * c] = static_cast<uint8_t>(codes[c] | (high << 4));
      }
    }
  }
}

/// Scales and zero points of one block; missing columns stay zero.
void pack_scales(const QuantMatrix& matrix, int64_t block, int64_t columns, PackedWeights& w) {
  std::vector<uint16_t> scales(static_cast<size_t>(w.groups * columns));
  std::vector<uint8_t> zeros(static_cast<size_t>(w.groups * columns));
  unpack_scales(matrix, block * kBlockColumns, columns, scales.data());
  unpack_zeros(matrix, block * kBlockColumns, columns, zeros.data());
  for (int64_t g = 0; g < w.groups; ++g) {
    std::copy_n(&scales[static_cast<size_t>(g * columns)], columns,
                const_cast<uint16_t*>(w.scales(block)) + g * kBlockColumns);
    std::copy_n(&zeros[static_cast<size_t>(g * columns)], columns,
                const_cast<uint8_t*>(w.zeros(block)) + g * kBlockColumns);
  }
}

/// The end of the slice that starts at k0: within one group, on a word boundary of every layout.
int64_t slice_end(const PackedWeights& w, int64_t k0) {
  const int64_t group_end = (k0 / w.group_size + 1) * w.group_size;
  return std::min(group_end, k0 + kSliceRows);
}

void pack_blocks(const QuantMatrix& matrix, int64_t block0, int64_t block1, PackedWeights& w) {
  const int64_t n0 = block0 * kBlockColumns;
  const int64_t columns = std::min(block1 * kBlockColumns, matrix.n) - n0;
  // Groups that are no multiple of a word cannot be cut on word boundaries: all rows at once.
  const bool sliced = w.group_size % 8 == 0;
  const int64_t unpacked = sliced ? std::min(kSliceRows, w.k) : w.k;
  std::vector<uint8_t> codes(static_cast<size_t>(unpacked * columns));
  if (!sliced) unpack_codes(matrix, n0, columns, codes.data());
  for (int64_t k0 = 0; k0 < w.k;) {
    const int64_t k1 = slice_end(w, k0);
    const uint8_t* from = codes.data() + (sliced ? 0 : k0 * columns);
    if (sliced) unpack_code_rows(matrix, k0, k1 - k0, n0, columns, codes.data());
    for (int64_t block = block0; block < block1; ++block) {
      const int64_t column = (block - block0) * kBlockColumns;
      pack_rows(w, k0, k1 - k0, from + column, columns, std::min(kBlockColumns, columns - column),
                const_cast<uint8_t*>(w.codes(block)));
    }
    k0 = k1;
  }
  for (int64_t block = block0; block < block1; ++block) {
    pack_scales(matrix, block, std::min(kBlockColumns, matrix.n - block * kBlockColumns), w);
  }
}

}  // namespace

Result<PackedWeights> packed_shape(const QuantMatrix& matrix) {
  NIBBLE_TRY(check_quant_matrix(matrix, "weight"));
  PackedWeights w;
  w.k = matrix.k;
  w.n = matrix.n;
  w.group_size = matrix.group_size;
  w.groups = matrix.groups();
  w.quads = quads_of(matrix.group_size);
  w.blocks = (matrix.n + kBlockColumns - 1) / kBlockColumns;
  w.scale_dtype = matrix.scale_dtype;
  // half of it is left for the bias and whatever holds it
  if (w.blocks > std::numeric_limits<int64_t>::max() / 2 / w.block_bytes()) {
    return Status(Code::out_of_memory, "the packed size of a weight overflows");
  }
  return w;
}

int64_t packed_bytes(const PackedWeights& shape, bool has_bias) {
  return shape.bytes() +
         (has_bias ? shape.blocks * kBlockColumns * static_cast<int64_t>(sizeof(float)) : 0);
}

void attach(PackedWeights& shape, const std::byte* memory, bool has_bias) {
  shape.data = memory;
  if (!has_bias) return;
  shape.bias = {reinterpret_cast<const float*>(memory + shape.bytes()),
                static_cast<size_t>(shape.blocks * kBlockColumns)};
}

Status pack_weights_into(const PackSource& source, int threads, std::byte* memory) {
  Result<PackedWeights> shape = packed_shape(source.matrix);
  if (!shape.ok()) return shape.status();
  PackedWeights& w = *shape;
  attach(w, memory, source.bias != nullptr);
  for (int64_t i = 0; i < w.n && source.bias != nullptr; ++i) {
    const_cast<float*>(w.bias.data())[i] = load_as_float(source.bias, i, source.bias_dtype);
  }
  const int team = std::clamp(threads > 0 ? threads : available_cpus(), 1, kMaxThreads);
  std::atomic<bool> out_of_memory = false;
  const int64_t tasks = (w.blocks + kTaskBlocks - 1) / kTaskBlocks;
  parallel_for(team, tasks, [&](int64_t task) {
    try {
      const int64_t block0 = task * kTaskBlocks;
      pack_blocks(source.matrix, block0, std::min(block0 + kTaskBlocks, w.blocks), w);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  if (out_of_memory) return Status(Code::out_of_memory, "cannot allocate scratch to pack a weight");
  return {};
}

Result<PackedWeights> pack_weights(const QuantMatrix& matrix, const void* bias, Dtype bias_dtype,
                                   int threads) try {
  Result<PackedWeights> shape = packed_shape(matrix);
  if (!shape.ok()) return shape.status();
  const int64_t bytes = packed_bytes(*shape, bias != nullptr);
  Result<AlignedBuffer> storage = AlignedBuffer::zeroed(static_cast<size_t>(bytes));
  if (!storage.ok()) return storage.status();
  NIBBLE_TRY(pack_weights_into({matrix, bias, bias_dtype}, threads, storage->data()));
  shape->storage = std::move(*storage);
  attach(*shape, shape->storage.data(), bias != nullptr);
  return shape;
} catch (const std::bad_alloc&) {
  return Status(Code::out_of_memory, "cannot allocate memory to pack a weight");
}

}  // namespace nibble
