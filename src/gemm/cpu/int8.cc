#include "gemm/int8.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "base/cpu_features.h"
#include "base/thread_pool.h"
#include "gemm/cpu/quantize.h"

namespace nibble {

// One per file of the same name.
void run_w8a8_scalar(const Int8Block& block);
#if NIBBLE_SIMD
void run_w8a8_avx2(const Int8Block& block);
void run_w8a8_avx512vnni(const Int8Block& block);
#endif

namespace {

constexpr int64_t kColumns = 16;
constexpr int64_t kBlockRows = 64;

constexpr Int8Kernel kTable[] = {
#if NIBBLE_SIMD
    {"w8a8_avx512vnni", Isa::avx512_vnni, run_w8a8_avx512vnni},
    {"w8a8_avx2", Isa::avx2, run_w8a8_avx2},
#endif
    {"w8a8_scalar", Isa::scalar, run_w8a8_scalar},
};

const Int8Kernel& int8_kernel() {
  return *std::find_if(std::begin(kTable), std::end(kTable), [](const Int8Kernel& kernel) {
    return isa_missing_reason(kernel.isa) == nullptr;
  });
}

}  // namespace

std::span<const Int8Kernel> int8_kernels() { return kTable; }

const char* int8_kernel_name() { return int8_kernel().name; }

Result<Int8Weights> pack_int8(int64_t n, int64_t k, const void* weight, Dtype dtype, int threads) {
  constexpr int64_t kMostK = 1 << 16;  // 255 * 127 * K must stay below 2^31
  if (k > kMostK) {
    return Status(Code::unsupported,
                  fmt::format("an 8-bit lm_head has at most {} inputs, found {}", kMostK, k));
  }
  Int8Weights w;
  w.k = k;
  w.n = n;
  w.quads = (k + 3) / 4;
  w.blocks = (n + kColumns - 1) / kColumns;
  Result<AlignedBuffer> storage =
      AlignedBuffer::zeroed(static_cast<size_t>(w.blocks * w.quads * 64));
  if (!storage.ok()) return storage.status();
  w.storage = std::move(*storage);
  w.scales.assign(static_cast<size_t>(w.blocks * kColumns), 0.0f);
  std::atomic<bool> finite = true;
  const QuantizerOps& ops = quantizer_ops_for(Isa::avx512);
  const auto* bytes = static_cast<const std::byte*>(weight);
  parallel_for(threads > 0 ? threads : available_cpus(), w.blocks, [&](int64_t block) {
    uint8_t* lines = w.storage.as<uint8_t>() + block * w.quads * 64;
    std::fill_n(lines, w.quads * 64, uint8_t{128});
    int8_t codes[kMostK];
    for (int64_t c = 0; c < std::min(kColumns, n - block * kColumns); ++c) {
      const std::byte* row = bytes + (block * kColumns + c) * k * dtype_bytes(dtype);
      const ElementRange range = ops.range(row, dtype, k);
      if (range.max_abs_bits >= kInfinityBits) {
        finite = false;
        return;
      }
      Problem problem;  // symmetric int8
      const Scaling scaling = dynamic_scaling(range, problem, 1.0f);
      w.scales[static_cast<size_t>(block * kColumns + c)] = scaling.scale;
      ops.encode(row, dtype, k, scaling.encoding, codes, 64);
      for (int64_t i = 0; i < k; ++i) {
        lines[i / 4 * 64 + 4 * c + i % 4] = static_cast<uint8_t>(codes[i] + 128);
      }
    }
  });
  if (!finite) return Status(Code::non_finite, "lm_head has a NaN or infinity");
  return w;
}

Status run_int8(const Int8Weights& w, int64_t m, const float* x, int64_t x_stride, float* y,
                int64_t y_stride, int threads) {
  const Int8Kernel& kernel = int8_kernel();
  const QuantizerOps& ops = quantizer_ops_for(kernel.isa);
  const int64_t width = (w.quads * 4 + 63) / 64 * 64;
  std::vector<int8_t> codes(static_cast<size_t>(std::min(m, kBlockRows) * width));
  std::vector<float> scales(static_cast<size_t>(kBlockRows));
  std::vector<int32_t> sums(static_cast<size_t>(kBlockRows));
  for (int64_t row0 = 0; row0 < m; row0 += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, m - row0);
    for (int64_t row = 0; row < rows; ++row) {
      const float* from = x + (row0 + row) * x_stride;
      const ElementRange range = ops.range(from, Dtype::f32, w.k);
      if (range.max_abs_bits >= kInfinityBits) {
        return Status(
            Code::non_finite,
            fmt::format("the input of lm_head has a NaN or infinity in row {}", row0 + row));
      }
      const Scaling scaling = dynamic_scaling(range, Problem{}, 1.0f);
      int8_t* to = codes.data() + row * width;
      std::fill_n(to + w.k, width - w.k, int8_t{0});
      sums[static_cast<size_t>(row)] = ops.encode(from, Dtype::f32, w.k, scaling.encoding, to, 64);
      scales[static_cast<size_t>(row)] = scaling.scale;
    }
    const int64_t run = std::clamp<int64_t>(w.blocks / (8 * std::max(threads, 1)), 1, 64);
    parallel_for(threads, (w.blocks + run - 1) / run, [&](int64_t task) {
      kernel.run({&w, codes.data(), scales.data(), sums.data(), width, rows, task * run,
                  std::min(w.blocks, (task + 1) * run), y + row0 * y_stride, y_stride});
    });
  }
  return {};
}

}  // namespace nibble
