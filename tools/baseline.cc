#include "baseline.h"

#include <omp.h>

#include <algorithm>
#include <bit>
#include <new>

#include "timing.h"

#if NIBBLE_HAVE_OPENBLAS
#include <cblas.h>
extern "C" void openblas_set_num_threads(int);
#endif
#if NIBBLE_HAVE_DNNL
#include <dnnl.hpp>
#include <unordered_map>
#endif

namespace nibble {
namespace {

// GCC emits one version per instruction set and picks the widest when the program starts. Not under
// sanitizers: their runtimes start later than that choice.
#if defined(__x86_64__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define NIBBLE_CLONES __attribute__((target_clones("avx512f", "avx2", "default"), optimize("O3")))
#else
#define NIBBLE_CLONES
#endif

/// codes (n) of one row k to (q - z) * s; zeros and scales (n) are the group's.
[[maybe_unused]] NIBBLE_CLONES void dequantize_row(const uint8_t* codes, const float* zeros,
                                                   const float* scales, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = (static_cast<float>(codes[i]) - zeros[i]) * scales[i];
  }
}

[[maybe_unused]] NIBBLE_CLONES void dequantize_row(const uint8_t* codes, const float* zeros,
                                                   const float* scales, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float value = (static_cast<float>(codes[i]) - zeros[i]) * scales[i];
    const auto bits = std::bit_cast<uint32_t>(value);
    out[i] = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}

/// All of W in chunks of rows, unpacked word-wise into a row that stays in L1, then converted.
/// Every loop is vectorized and all threads work, whatever the group size.
template <class T>
void dequantize_all(const AwqTensors& w, int threads, T* out) {
  constexpr int64_t kChunk = 16;  // rows
  const int64_t chunks = (w.k + kChunk - 1) / kChunk;
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint8_t> codes(static_cast<size_t>(w.n)), zero_codes(codes.size());
    std::vector<float> zeros(codes.size()), scales(codes.size());
    int64_t loaded_group = -1;
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (int64_t k = chunk * kChunk; k < std::min(w.k, (chunk + 1) * kChunk); ++k) {
        const int64_t group = k / w.group_size;
        QuantMatrix row = w.view();  // one row of codes, one of zero points
        row.k = row.group_size = 1;
        row.q += k * w.n / 2;
        row.zeros += group * w.n / 2;
        if (group != loaded_group) {
          unpack_zeros(row, 0, w.n, zero_codes.data());
          for (int64_t i = 0; i < w.n; ++i) {
            zeros[i] = zero_codes[i];
            scales[i] = load_as_float(&w.scales[group * w.n], i, w.scale_dtype);
          }
          loaded_group = group;
        }
        unpack_codes(row, 0, w.n, codes.data());
        dequantize_row(codes.data(), zeros.data(), scales.data(), w.n, out + k * w.n);
      }
    }
  }
}

/// A full matrix on huge pages, like the packed weights it is compared with.
template <class T>
AlignedBuffer full_matrix(const AwqTensors& weight) {
  Result<AlignedBuffer> buffer =
      AlignedBuffer::zeroed(static_cast<size_t>(weight.k * weight.n) * sizeof(T));
  if (!buffer.ok()) throw std::bad_alloc();
  return std::move(*buffer);
}

/// Sets OpenMP's default team for a library that takes no thread count, and puts it back.
class DefaultTeam {
 public:
  explicit DefaultTeam(int threads) : before_(omp_get_max_threads()) {
    omp_set_num_threads(threads);
  }
  ~DefaultTeam() { omp_set_num_threads(before_); }

 private:
  int before_;
};

#if NIBBLE_HAVE_OPENBLAS
class OpenBlasF32 : public Baseline {
 public:
  OpenBlasF32(const AwqTensors& weight, const float* x, int64_t m, int threads)
      : Baseline(weight, full_matrix<float>(weight)),
        x_(x),
        m_(m),
        threads_(threads),
        y_(static_cast<size_t>(m * weight.n)) {
    openblas_set_num_threads(threads);
  }
  const char* name() const override { return "openblas-f32"; }
  void dequantize() override { dequantize_all(weight_, threads_, full_.as<float>()); }
  void multiply() override {
    const auto m = static_cast<int>(m_), n = static_cast<int>(weight_.n),
               k = static_cast<int>(weight_.k);
    const auto* full = full_.as<float>();
    const DefaultTeam team(threads_);
    if (m == 1) {
      cblas_sgemv(CblasRowMajor, CblasTrans, k, n, 1.0f, full, n, x_, 1, 0.0f, y_.data(), 1);
    } else {
      cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, m, n, k, 1.0f, x_, k, full, n, 0.0f,
                  y_.data(), n);
    }
  }
  std::vector<float> result() const override { return y_; }

 private:
  const float* x_;
  int64_t m_;
  int threads_;
  std::vector<float> y_;
};
#endif

#if NIBBLE_HAVE_DNNL
/// oneDNN matmul on bf16 (AMX or AVX-512 where the CPU has them) or f32, plain row-major operands:
/// what dequantize() can write without knowing oneDNN's blocked layouts.
template <class T>
class OneDnn : public Baseline {
 public:
  OneDnn(const AwqTensors& weight, const float* x, int64_t m, int threads)
      : Baseline(weight, full_matrix<T>(weight)),
        threads_(threads),
        x_(static_cast<size_t>(m * weight.k)),
        y_(static_cast<size_t>(m * weight.n)) {
    for (size_t i = 0; i < x_.size(); ++i) {
      if constexpr (kIsBf16) {
        x_[i] = bf16_from_float(x[i]);
      } else {
        x_[i] = x[i];
      }
    }
    using dnnl::memory;
    const auto type = kIsBf16 ? memory::data_type::bf16 : memory::data_type::f32;
    const memory::desc x_desc({m, weight.k}, type, memory::format_tag::ab);
    const memory::desc w_desc({weight.k, weight.n}, type, memory::format_tag::ab);
    const memory::desc y_desc({m, weight.n}, memory::data_type::f32, memory::format_tag::ab);
    const DefaultTeam team(threads);  // oneDNN plans for OpenMP's default team
    const dnnl::matmul::desc desc(x_desc, w_desc, y_desc);
    matmul_ = dnnl::matmul(dnnl::matmul::primitive_desc(desc, engine_));
    arguments_ = {{DNNL_ARG_SRC, memory(x_desc, engine_, x_.data())},
                  {DNNL_ARG_WEIGHTS, memory(w_desc, engine_, full_.data())},
                  {DNNL_ARG_DST, memory(y_desc, engine_, y_.data())}};
  }
  const char* name() const override { return kIsBf16 ? "onednn-bf16" : "onednn-f32"; }
  void dequantize() override { dequantize_all(weight_, threads_, full_.template as<T>()); }
  void multiply() override {
    const DefaultTeam team(threads_);
    matmul_.execute(stream_, arguments_);
    stream_.wait();
  }
  std::vector<float> result() const override { return y_; }

 private:
  static constexpr bool kIsBf16 = sizeof(T) == 2;
  int threads_;
  std::vector<T> x_;
  std::vector<float> y_;
  dnnl::engine engine_{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream_{engine_};
  dnnl::matmul matmul_;
  std::unordered_map<int, dnnl::memory> arguments_;
};
#endif

}  // namespace

void Baseline::flush_matrix() const { flush_from_caches(full_.data(), full_.bytes()); }

void Baseline::flush_weight() const {
  flush_from_caches(weight_.qweight.data(), weight_.qweight.size() * 4);
  flush_from_caches(weight_.qzeros.data(), weight_.qzeros.size() * 4);
  flush_from_caches(weight_.scales.data(), weight_.scales.size() * 2);
}

std::vector<std::unique_ptr<Baseline>> make_baselines(const AwqTensors& weight, const float* x,
                                                      int64_t m, int threads) {
  std::vector<std::unique_ptr<Baseline>> all;
  (void)weight, (void)x, (void)m, (void)threads;
#if NIBBLE_HAVE_OPENBLAS
  all.push_back(std::make_unique<OpenBlasF32>(weight, x, m, threads));
#endif
#if NIBBLE_HAVE_DNNL
  all.push_back(std::make_unique<OneDnn<float>>(weight, x, m, threads));
  try {
    all.push_back(std::make_unique<OneDnn<uint16_t>>(weight, x, m, threads));
  } catch (const dnnl::error&) {
    // this CPU has no bf16 matmul in oneDNN: one contender fewer
  }
#endif
  return all;
}

}  // namespace nibble
