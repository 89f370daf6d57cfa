#include "gemm/cuda/pack_host.h"

#include <algorithm>
#include <cstring>

namespace nibble::cuda {
namespace {

/// A code's place in a block: byte, and whether it is the high nibble.
struct CodePlace {
  int byte;
  bool high;
};

/// k and column within the block and the tile.
CodePlace code_place(int k, int column) {
  const int step = k / 32, c = k % 32 / 8, b = k % 4, upper_word = k % 8 / 4;
  const int half = step / 2, lane = 4 * (column % 8) + c;
  const int word = 2 * upper_word + column / 8;
  return {half * 512 + lane * 16 + word * 4 + b, step % 2 == 1};
}

void pack_code(uint8_t* slab, int k, int column, uint8_t code) {
  const CodePlace place = code_place(k % kBlockDepth, column);
  uint8_t& byte = slab[k / kBlockDepth * 1024 + place.byte];
  byte = static_cast<uint8_t>(byte | (place.high ? code << 4 : code));
}

void pack_group(const PackedLayout& layout, uint8_t* slab, int group, int column, uint16_t scale,
                uint8_t zero) {
  const int row = column % 8 * layout.slab_groups + group, upper = column / 8;
  std::memcpy(slab + kSlabCodeBytes + row * 4 + upper * 2, &scale, sizeof scale);
  uint8_t& byte = slab[layout.zeros_offset() + row];
  byte = static_cast<uint8_t>(byte | (upper == 1 ? zero << 4 : zero));
}

}  // namespace

std::vector<uint8_t> pack_host(const QuantMatrix& matrix) {
  const PackedLayout layout = packed_layout(matrix.n, matrix.k, matrix.group_size);
  const auto n = static_cast<size_t>(matrix.n), k = static_cast<size_t>(matrix.k);
  const auto groups = static_cast<size_t>(matrix.groups());
  std::vector<uint8_t> codes(k * n), zeros(groups * n);
  std::vector<uint16_t> scales(groups * n);
  unpack_codes(matrix, 0, matrix.n, codes.data());
  unpack_zeros(matrix, 0, matrix.n, zeros.data());
  unpack_scales(matrix, 0, matrix.n, scales.data());

  std::vector<uint8_t> slabs(static_cast<size_t>(layout.bytes()));
  for (size_t column = 0; column < n; ++column) {
    const auto tile = static_cast<int64_t>(column) / kSlabColumns;
    const auto in_tile = static_cast<int>(column % kSlabColumns);
    const auto slab_of = [&](size_t row) {
      const int64_t slice = static_cast<int64_t>(row) / kSlabDepth;
      return slabs.data() + (tile * layout.slices + slice) * layout.slab_bytes;
    };
    for (size_t row = 0; row < k; ++row) {
      pack_code(slab_of(row), static_cast<int>(row % kSlabDepth), in_tile, codes[row * n + column]);
    }
    for (size_t row = 0; row < k; row += static_cast<size_t>(layout.promoted)) {
      const size_t from = row / static_cast<size_t>(matrix.group_size) * n + column;
      const auto group = static_cast<int>(row % kSlabDepth) / layout.promoted;
      pack_group(layout, slab_of(row), group, in_tile, scales[from], zeros[from]);
    }
  }
  return slabs;
}

SlabValues unpack_slab(const PackedLayout& layout, const uint8_t* slab) {
  SlabValues values{};
  for (int column = 0; column < kSlabColumns; ++column) {
    const int r = column % 8, upper = column / 8;
    for (int k = 0; k < kSlabDepth; ++k) {
      const CodePlace place = code_place(k % kBlockDepth, column);
      const uint8_t byte = slab[k / kBlockDepth * 1024 + place.byte];
      values.codes[k][column] = place.high ? byte >> 4 : byte & 15;
    }
    for (int group = 0; group < layout.slab_groups; ++group) {
      const int row = r * layout.slab_groups + group;
      const uint8_t zero = slab[layout.zeros_offset() + row];
      values.zeros[group][column] = upper == 1 ? zero >> 4 : zero & 15;
      std::memcpy(&values.scales[group][column], slab + kSlabCodeBytes + row * 4 + upper * 2, 2);
    }
  }
  return values;
}

}  // namespace nibble::cuda
