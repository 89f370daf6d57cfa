// Packing, quantizing and multiplying on the device of host_device.h.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "gemm/cuda/fused_product.h"
#include "gemm/cuda/head_product.h"
#include "gemm/cuda/pack_host.h"
#include "gemm/cuda/ss_image.h"
#include "gemm/cuda/w4a4_mma_sm80.h"
#include "gemm/float_ops.h"
#include "gemm/ref.h"
#include "host_device.h"
#include "host_quantize.h"

namespace nibble::cuda {
namespace {

/// The weights of args, one value each: (k, n).
struct Unpacked {
  std::vector<float> values;  // q - z
  std::vector<float> scales;  // of the promoted group: (padded_k / promoted, n)
};

Unpacked unpack(const GemmArgs& args) {
  const PackedLayout& layout = args.layout;
  Unpacked u;
  u.values.resize(static_cast<size_t>(layout.padded_k() * layout.n));
  u.scales.resize(static_cast<size_t>(layout.padded_k() / layout.promoted * layout.n));
  for (int64_t tile = 0; tile < layout.tiles; ++tile) {
    for (int64_t slice = 0; slice < layout.slices; ++slice) {
      const SlabValues slab =
          unpack_slab(layout, args.slabs + (tile * layout.slices + slice) * layout.slab_bytes);
      for (int c = 0; c < kSlabColumns; ++c) {
        const int64_t column = tile * kSlabColumns + c;
        if (column >= layout.n) break;
        for (int k = 0; k < kSlabDepth; ++k) {
          const int group = k / layout.promoted;
          u.values[static_cast<size_t>((slice * kSlabDepth + k) * layout.n + column)] =
              static_cast<float>(slab.codes[k][c] - slab.zeros[group][c]);
          u.scales[static_cast<size_t>((slice * layout.slab_groups + group) * layout.n + column)] =
              load_as_float(&slab.scales[group][c], 0, args.bf16_scales ? Dtype::bf16 : Dtype::f16);
        }
      }
    }
  }
  return u;
}

/// Where k of an operand lies: of each 32, words 0 1 2 3 4 5 6 7 come as 0 2 4 6 1 3 5 7.
int64_t wgmma_place(int64_t k) {
  const int64_t word = k % 32 / 4, place = word % 2 == 0 ? word / 2 : 4 + word / 2;
  return k / 32 * 32 + place * 4 + k % 4;
}

/// e4m3 numbers as bytes.
uint8_t e4m3_byte(float value) {
  int exponent = 0;
  const float fraction = std::frexp(std::fabs(value), &exponent);  // [1/2, 1)
  const int biased = value == 0 ? 0 : std::max(exponent - 1 + 7, 0);
  const float steps = biased > 0 ? fraction * 16 - 8 : std::ldexp(std::fabs(value), 9);
  return static_cast<uint8_t>((std::signbit(value) ? 128 : 0) | biased << 3 |
                              static_cast<int>(steps));
}
float from_e4m3(uint8_t byte) {
  const int biased = byte >> 3 & 15, steps = byte & 7;
  const float magnitude = biased == 0 ? std::ldexp(static_cast<float>(steps), -9)
                                      : std::ldexp(static_cast<float>(8 + steps), biased - 10);
  return byte & 128 ? -magnitude : magnitude;
}

/// What the activations of a product are.
enum class Acts { codes, wgmma_codes, e4m3, wgmma_e4m3, rows };

float activation(const GemmArgs& args, Acts acts, int64_t m, int64_t k) {
  const int64_t at = m * args.layout.padded_k();
  switch (acts) {
    case Acts::codes: return static_cast<float>(args.codes[at + k]);
    case Acts::wgmma_codes: return static_cast<float>(args.codes[at + wgmma_place(k)]);
    case Acts::e4m3: return from_e4m3(static_cast<uint8_t>(args.codes[at + k]));
    case Acts::wgmma_e4m3: return from_e4m3(static_cast<uint8_t>(args.codes[at + wgmma_place(k)]));
    case Acts::rows: break;
  }
  return host::load(args.x, args.x_type, m * args.x_stride + k);
}

void multiply(const GemmArgs& args, Acts acts) {
  const PackedLayout& layout = args.layout;
  const Unpacked w = unpack(args);
  const int64_t groups = layout.k / layout.group_size;
  for (int64_t m = 0; m < args.m; ++m) {
    for (int64_t n = 0; n < layout.n; ++n) {
      float acc = 0;
      for (int64_t first = 0; first < layout.k; first += layout.promoted) {
        float sum = 0;  // of integers, and of codes: exact
        for (int64_t k = first; k < std::min(layout.k, first + layout.promoted); ++k) {
          const float v = w.values[static_cast<size_t>(k * layout.n + n)];
          sum = std::fma(activation(args, acts, m, k), v, sum);
        }
        if (args.group_scales) sum *= args.scales[m * groups + first / layout.group_size];
        acc = std::fma(sum, w.scales[static_cast<size_t>(first / layout.promoted * layout.n + n)],
                       acc);
      }
      const float bias = args.out.bias == nullptr ? 0 : args.out.bias[n];
      const float t = args.scales == nullptr || args.group_scales ? 1 : args.scales[m];
      host::store(args.out.y, args.out.type, m * args.out.stride + n, std::fma(acc, t, bias));
    }
  }
}

std::vector<float> loaded_rows(const QuantizeArgs& args) {
  std::vector<float> x;
  for (int64_t m = 0; m < args.m; ++m) {
    for (int64_t k = 0; k < args.k; ++k) {
      x.push_back(host::load(args.x, args.type, m * args.x_stride + k));
    }
  }
  return x;
}

cudaError_t product(const GemmArgs& args, Acts acts, cudaStream_t stream) {
  host::enqueue(stream, [=] { multiply(args, acts); });
  return cudaSuccess;
}

}  // namespace

namespace host {

void write_codes(const QuantizeArgs& to, const std::vector<float>& x) {
  Problem problem;
  problem.m = to.m;
  problem.k = to.k;
  problem.n = 8;
  problem.group_size = to.group_size;
  problem.mode = to.limit == 448 ? Mode::w4a8_fp8 : to.limit == 127 ? Mode::w4a8 : Mode::w4a4;
  problem.symmetric = to.symmetric;
  problem.granularity = static_cast<Granularity>(to.scaling);
  GemmInput input;
  input.x = x.data();
  input.x_stride = to.k;
  input.clip = to.clip;
  input.static_scales = to.static_scales;
  const ref::Activations a = ref::quantize(problem, input);
  for (int64_t m = 0; m < to.m; ++m) {
    for (int64_t k = 0; k < to.padded_k; ++k) {
      const auto from = static_cast<size_t>(m * to.k + k);
      const int64_t row = m * to.padded_k;
      const int64_t place = to.wgmma_order ? wgmma_place(k) : k;
      if (to.kind == Codes::int8) {
        to.codes[row + place] = k < to.k ? a.codes[from] : int8_t{0};
        continue;
      }
      const bool integers = to.kind == Codes::int_as_e4m3;
      const float value = k >= to.k  ? 0.0f
                          : integers ? static_cast<float>(a.codes[from])
                                     : a.values[from];
      if (to.kind != Codes::halves) {
        to.codes[row + place] = static_cast<int8_t>(e4m3_byte(value));
      } else {
        host::store(to.codes, Element::f16, row + k, value);
      }
    }
  }
  std::copy(a.scales.begin(), a.scales.end(), to.scales);
}

}  // namespace host

static_assert(static_cast<int>(Scaling::static_group) ==
              static_cast<int>(Granularity::static_group));

cudaError_t launch_pack(const PackArgs& args, cudaStream_t stream) {
  host::enqueue(stream, [=] {
    QuantMatrix matrix;
    matrix.k = args.layout.k;
    matrix.n = args.layout.n;
    matrix.group_size = args.layout.group_size;
    matrix.q = reinterpret_cast<const std::byte*>(args.q);
    matrix.zeros = reinterpret_cast<const std::byte*>(args.zeros);
    matrix.scales = reinterpret_cast<const std::byte*>(args.scales);
    const std::vector<uint8_t> packed = pack_host(matrix);
    std::copy(packed.begin(), packed.end(), args.slabs);
  });
  return cudaSuccess;
}

cudaError_t launch_quantize(const QuantizeArgs& args, cudaStream_t stream) {
  host::enqueue(stream, [=] { host::write_codes(args, loaded_rows(args)); });
  return cudaSuccess;
}

cudaError_t launch_w4a8_slab_sm90(const GemmArgs& args, const SlabConfig&, cudaStream_t stream) {
  return product(args, Acts::codes, stream);
}
cudaError_t launch_w4a16_slab_sm90(const GemmArgs& args, const SlabConfig&, cudaStream_t stream) {
  return product(args, Acts::rows, stream);
}
cudaError_t launch_w4a8_slab_handed_sm90(const QuantizeArgs& x, const GemmArgs& args,
                                         const SlabConfig&, void*, cudaStream_t stream) {
  const cudaError_t error = launch_quantize(x, stream);
  return error == cudaSuccess ? product(args, Acts::codes, stream) : error;
}
namespace {

/// Rows (m, k) that nobody sees: quantized, multiplied.
void multiply_made(GemmArgs args, QuantizeArgs to, const std::vector<float>& x) {
  std::vector<int8_t> codes(static_cast<size_t>(args.m * args.layout.padded_k()));
  std::vector<float> scales(static_cast<size_t>(args.m * args.layout.k));
  to.m = args.m;
  to.k = args.layout.k;
  to.padded_k = args.layout.padded_k();
  to.codes = codes.data();
  to.scales = scales.data();
  host::write_codes(to, x);
  args.codes = codes.data();
  args.scales = scales.data();
  multiply(args, Acts::codes);
}

void multiply_gated(const NormProductArgs& a, const std::vector<float>& x) {
  const int64_t n = a.product.layout.n, width = n / 2;
  std::vector<uint16_t> y(static_cast<size_t>(a.product.m * n));
  GemmArgs product = a.product;
  product.out.y = y.data();
  product.out.stride = n;
  multiply_made(product, a.to, x);
  for (int64_t m = 0; m < product.m; ++m) {
    std::vector<float> halves;
    for (int64_t i = 0; i < n; ++i) {
      halves.push_back(host::load(y.data(), product.out.type, m * n + i));
    }
    const auto function =
        a.function == GateFunction::silu ? float_ops().silu_mul : float_ops().gelu_tanh_mul;
    function(halves.data(), halves.data() + width, width, a.gated + m * a.gated_stride);
  }
}

}  // namespace

cudaError_t launch_w4a8_slab_rows_sm90(const QuantizeArgs& x, const GemmArgs& args,
                                       const SlabConfig&, cudaStream_t stream, const RowRanges&) {
  host::enqueue(stream, [=] { multiply_made(args, x, loaded_rows(x)); });
  return cudaSuccess;
}
cudaError_t launch_w4a8_slab_norm_sm90(const NormProductArgs& args, const SlabConfig&,
                                       cudaStream_t stream) {
  host::enqueue(stream, [=] {
    const NormArgs& a = args.norm;
    std::vector<float> rows;
    for (int64_t r = 0; r < a.m; ++r) {
      std::vector<float> row =
          host::residual_row(a.hidden, a.delta, a.type, a.post_norm, r, a.k, a.eps);
      if (a.delta != nullptr) std::copy(row.begin(), row.end(), args.sum + r * a.k);
      host::normalize(row, a.norm, a.eps);
      rows.insert(rows.end(), row.begin(), row.end());
    }
    if (args.gated != nullptr) {
      multiply_gated(args, rows);
    } else {
      multiply_made(args.product, args.to, rows);
    }
  });
  return cudaSuccess;
}
cudaError_t launch_w4a8_rs_sm90(const GemmArgs& args, const RsConfig&, void*, cudaStream_t stream) {
  return product(args, Acts::wgmma_codes, stream);
}
cudaError_t launch_w4a8_fp8_rs_sm90(const GemmArgs& args, const RsConfig&, void*,
                                    cudaStream_t stream) {
  return product(args, Acts::wgmma_e4m3, stream);
}
cudaError_t launch_w4a16_rs_sm90(const GemmArgs& args, const RsConfig&, void*, void*,
                                 cudaStream_t stream) {
  return product(args, Acts::rows, stream);
}
/// A mark instead of an image.
cudaError_t launch_expand_weights(const GemmArgs& args, bool e4m3, uint8_t* image,
                                  cudaStream_t stream) {
  host::enqueue(stream, [=] { std::fill_n(image, kKeptImage.bytes(args.layout), e4m3 ? 2 : 1); });
  return cudaSuccess;
}
cudaError_t launch_w4a8_ss_sm90(const GemmArgs& args, const SsConfig& config, void*,
                                cudaStream_t stream) {
  if (config.expanded) {
    host::enqueue(stream, [=] {
      if (args.image[kKeptImage.bytes(args.layout) - 1] == (config.e4m3 ? 2 : 1)) return;
      std::fprintf(stderr, "a product was given another image than its own\n");
      std::abort();
    });
  }
  return product(args, config.e4m3 ? Acts::e4m3 : Acts::codes, stream);
}
cudaError_t launch_w4a16_ss_sm90(const GemmArgs& args, const SsConfig&, void*,
                                 cudaStream_t stream) {
  return product(args, Acts::rows, stream);
}
cudaError_t launch_w4a8_mma_sm80(const GemmArgs& args, cudaStream_t stream) {
  return product(args, Acts::codes, stream);
}
cudaError_t launch_w4a4_mma_sm80(const GemmArgs& args, bool, void*, cudaStream_t stream) {
  return product(args, Acts::codes, stream);
}
cudaError_t launch_w4a16_mma_sm80(const GemmArgs& args, cudaStream_t stream) {
  return product(args, Acts::rows, stream);
}

// ---- before and in the head
// ----------------------------------------------------------------------

namespace {

void split(const SplitRows& to, int64_t at, float x) {
  host::store(to.high, to.type, at, x);
  host::store(to.low, to.type, at, x - host::load(to.high, to.type, at));
}

}  // namespace

cudaError_t launch_split(const float* x, int64_t rows, int64_t k, const SplitRows& to,
                         cudaStream_t stream) {
  host::enqueue(stream, [=] {
    for (int64_t i = 0; i < rows * k; ++i) split(to, i, x[i]);
  });
  return cudaSuccess;
}

cudaError_t launch_head_norm(const HeadNormArgs& a, cudaStream_t stream) {
  host::enqueue(stream, [=] {
    for (int64_t r = 0; r < a.rows; ++r) {
      const int64_t from = a.gather == nullptr ? r : a.gather[r];
      std::vector<float> row =
          host::residual_row(a.hidden, a.delta, a.delta_type, a.post_norm, from, a.k, a.eps);
      host::normalize(row, a.norm, a.eps);
      for (int64_t i = 0; i < a.k; ++i) {
        a.out[r * a.k + i] = row[static_cast<size_t>(i)];
        split(a.parts, r * a.k + i, row[static_cast<size_t>(i)]);
      }
    }
  });
  return cudaSuccess;
}

cudaError_t launch_w16_head_mma_sm80(const HeadArgs& a, cudaStream_t stream) {
  host::enqueue(stream, [=] {
    for (int64_t r = 0; r < a.rows; ++r) {
      for (int64_t n = 0; n < a.n; ++n) {
        float sum = 0;
        for (int64_t k = 0; k < a.k; ++k) {
          const float w = host::load(a.w, a.x.type, n * a.k + k);
          sum = std::fma(host::load(a.x.high, a.x.type, r * a.k + k), w, sum);
          sum = std::fma(host::load(a.x.low, a.x.type, r * a.k + k), w, sum);
        }
        a.y[r * a.y_stride + n] = sum;
      }
    }
  });
  return cudaSuccess;
}

cudaError_t launch_add_bias(Element type, void* y, int64_t y_stride, int64_t rows, int64_t n,
                            const float* bias, cudaStream_t stream) {
  host::enqueue(stream, [=] {
    for (int64_t i = 0; i < rows * n; ++i) {
      const int64_t at = i / n * y_stride + i % n;
      host::store(y, type, at, host::load(y, type, at) + bias[i % n]);
    }
  });
  return cudaSuccess;
}

}  // namespace nibble::cuda
