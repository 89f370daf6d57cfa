// packed.h's layout on the host: what a lane finds in a slab is what its comment says, and packing
// loses nothing. The device's packing is checked by the products that read it (test_cuda).
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

#include "gemm/cuda/pack_host.h"

namespace nibble::cuda {
namespace {

struct Shape {
  int64_t n, k, group_size;
};

struct Weight {
  std::vector<uint8_t> codes, zeros;
  std::vector<uint16_t> scales;
  AwqTensors tensors;

  explicit Weight(const Shape& shape) {
    std::mt19937 random(static_cast<unsigned>(shape.n * 7 + shape.k));
    const auto n = static_cast<size_t>(shape.n);
    codes.resize(static_cast<size_t>(shape.k) * n);
    zeros.resize(static_cast<size_t>(shape.k / shape.group_size) * n);
    scales.resize(zeros.size());
    for (auto& q : codes) q = random() % 16;
    for (auto& z : zeros) z = random() % 16;
    for (auto& s : scales) s = static_cast<uint16_t>(random());
    tensors = pack_awq_gemm(shape.k, shape.n, shape.group_size, codes.data(), zeros.data(),
                            scales.data(), Dtype::f16);
  }
};

class PackHost : public ::testing::TestWithParam<Shape> {};

TEST_P(PackHost, UnpackingGivesBackEveryValueAndZerosBeyond) {
  const Shape shape = GetParam();
  const Weight weight(shape);
  const PackedLayout layout = packed_layout(shape.n, shape.k, shape.group_size);
  const std::vector<uint8_t> slabs = pack_host(weight.tensors.view());
  ASSERT_EQ(static_cast<int64_t>(slabs.size()), layout.bytes());
  for (int64_t tile = 0; tile < layout.tiles; ++tile) {
    for (int64_t slice = 0; slice < layout.slices; ++slice) {
      const SlabValues values = unpack_slab(
          layout, slabs.data() + (tile * layout.slices + slice) * layout.slab_bytes);
      for (int column = 0; column < kSlabColumns; ++column) {
        const int64_t n = tile * kSlabColumns + column;
        for (int row = 0; row < kSlabDepth; ++row) {
          const int64_t k = slice * kSlabDepth + row;
          const bool inside = n < shape.n && k < shape.k;
          ASSERT_EQ(values.codes[row][column], inside ? weight.codes[k * shape.n + n] : 0);
          const int group = row / layout.promoted;
          const int64_t first = slice * kSlabDepth + group * layout.promoted;
          const bool scaled = n < shape.n && first < shape.k;
          const int64_t at = first / shape.group_size * shape.n + n;
          ASSERT_EQ(values.zeros[group][column], scaled ? weight.zeros[at] : 0);
          ASSERT_EQ(values.scales[group][column], scaled ? weight.scales[at] : 0);
        }
      }
    }
  }
}

TEST_P(PackHost, LanesFindTheirCodes) {
  const Shape shape = GetParam();
  const Weight weight(shape);
  const PackedLayout layout = packed_layout(shape.n, shape.k, shape.group_size);
  const std::vector<uint8_t> slabs = pack_host(weight.tensors.view());
  for (int64_t slab = 0; slab < layout.tiles * layout.slices; ++slab) {
    const int64_t tile = slab / layout.slices, slice = slab % layout.slices;
    for (int place = 0; place < kSlabCodeBytes; ++place) {  // block, half, lane, word, byte
      const int block = place / 1024, h = place / 512 % 2, lane = place / 16 % 32;
      const int w = place / 4 % 4, b = place % 4, r = lane / 4, c = lane % 4;
      const int64_t n = tile * kSlabColumns + r + w % 2 * 8;
      const int64_t k0 = slice * kSlabDepth + block * kBlockDepth + 64 * h + 8 * c + w / 2 * 4 + b;
      const auto code = [&](int64_t k) -> int {
        return n < shape.n && k < shape.k ? weight.codes[k * shape.n + n] : 0;
      };
      const uint8_t byte = slabs[static_cast<size_t>(slab * layout.slab_bytes + place)];
      ASSERT_EQ(byte & 15, code(k0));
      ASSERT_EQ(byte >> 4, code(k0 + 32));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, PackHost,
                         ::testing::Values(Shape{16, 512, 128}, Shape{24, 1024, 128},
                                           Shape{8, 640, 128}, Shape{40, 96, 32},
                                           Shape{16, 1536, 32}, Shape{56, 576, 64},
                                           Shape{32, 2048, 256}, Shape{24, 768, 384},
                                           Shape{8, 200, 200}, Shape{72, 1100, 1100}));

TEST(PackHost, SymmetricWeightsGetZeroPointEight) {
  const Shape shape{16, 512, 128};
  Weight weight(shape);
  QuantMatrix matrix = weight.tensors.view();
  matrix.zeros = nullptr;
  const SlabValues values = unpack_slab(packed_layout(16, 512, 128), pack_host(matrix).data());
  for (int group = 0; group < 4; ++group) {
    for (int column = 0; column < kSlabColumns; ++column) EXPECT_EQ(values.zeros[group][column], 8);
  }
}

}  // namespace
}  // namespace nibble::cuda
