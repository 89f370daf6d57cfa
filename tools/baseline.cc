#include "baseline.h"

#include <omp.h>

#include <algorithm>
#include <cstring>

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

/// One row k of W: 8 columns from each packed word. zeros and scales (n) are the group's.
NIBBLE_CLONES void dequantize_row_f32(const uint32_t* words, const float* zeros,
                                      const float* scales, int64_t n, float* out) {
  constexpr uint32_t kShift[8] = {0, 16, 4, 20, 8, 24, 12, 28};
  for (int64_t c = 0; c < n / 8; ++c) {
    for (int j = 0; j < 8; ++j) {
      const auto q = static_cast<float>(static_cast<int32_t>((words[c] >> kShift[j]) & 15u));
      out[8 * c + j] = (q - zeros[8 * c + j]) * scales[8 * c + j];
    }
  }
}

NIBBLE_CLONES void dequantize_row_bf16(const uint32_t* words, const float* zeros,
                                       const float* scales, int64_t n, uint16_t* out) {
  constexpr uint32_t kShift[8] = {0, 16, 4, 20, 8, 24, 12, 28};
  for (int64_t c = 0; c < n / 8; ++c) {
    for (int j = 0; j < 8; ++j) {
      const auto q = static_cast<float>(static_cast<int32_t>((words[c] >> kShift[j]) & 15u));
      const float value = (q - zeros[8 * c + j]) * scales[8 * c + j];
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      out[8 * c + j] = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
  }
}

template <class T, class RowFunction>
void dequantize_all(const AwqTensors& w, int threads, T* out, RowFunction row_function) {
  const int64_t words = w.n / 8, groups = w.k / w.group_size;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> zeros(static_cast<size_t>(w.n)), scales(static_cast<size_t>(w.n));
#pragma omp for schedule(static)
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t n = 0; n < w.n; ++n) {
        constexpr uint32_t kShift[8] = {0, 16, 4, 20, 8, 24, 12, 28};
        zeros[n] = static_cast<float>((w.qzeros[g * words + n / 8] >> kShift[n % 8]) & 15u);
        scales[n] = load_as_float(w.scales.data(), g * w.n + n, w.scale_dtype);
      }
      for (int64_t k = g * w.group_size; k < (g + 1) * w.group_size; ++k) {
        row_function(&w.qweight[k * words], zeros.data(), scales.data(), w.n, out + k * w.n);
      }
    }
  }
}

#if NIBBLE_HAVE_OPENBLAS
class OpenBlasF32 : public Baseline {
 public:
  OpenBlasF32(const AwqTensors& weight, const float* x, int64_t m, int threads)
      : Baseline(weight),
        x_(x),
        m_(m),
        threads_(threads),
        full_(static_cast<size_t>(weight.k * weight.n)),
        y_(static_cast<size_t>(m * weight.n)) {
    openblas_set_num_threads(threads);
  }
  const char* name() const override { return "openblas-f32"; }
  void dequantize() override {
    dequantize_all(weight_, threads_, full_.data(), dequantize_row_f32);
  }
  void multiply() override {
    const auto m = static_cast<int>(m_), n = static_cast<int>(weight_.n),
               k = static_cast<int>(weight_.k);
    if (m == 1) {
      cblas_sgemv(CblasRowMajor, CblasTrans, k, n, 1.0f, full_.data(), n, x_, 1, 0.0f, y_.data(),
                  1);
    } else {
      cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, m, n, k, 1.0f, x_, k, full_.data(), n,
                  0.0f, y_.data(), n);
    }
  }
  std::vector<float> result() const override { return y_; }

 private:
  const float* x_;
  int64_t m_;
  int threads_;
  std::vector<float> full_, y_;
};
#endif

#if NIBBLE_HAVE_DNNL
/// oneDNN matmul on bf16 (AMX or AVX-512 where the CPU has them) or f32, plain row-major operands.
template <class T>
class OneDnn : public Baseline {
 public:
  OneDnn(const AwqTensors& weight, const float* x, int64_t m, int threads)
      : Baseline(weight),
        m_(m),
        threads_(threads),
        x_(static_cast<size_t>(m * weight.k)),
        full_(static_cast<size_t>(weight.k * weight.n)),
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
    const dnnl::matmul::desc desc(x_desc, w_desc, y_desc);
    matmul_ = dnnl::matmul(dnnl::matmul::primitive_desc(desc, engine_));
    arguments_ = {{DNNL_ARG_SRC, memory(x_desc, engine_, x_.data())},
                  {DNNL_ARG_WEIGHTS, memory(w_desc, engine_, full_.data())},
                  {DNNL_ARG_DST, memory(y_desc, engine_, y_.data())}};
  }
  const char* name() const override { return kIsBf16 ? "onednn-bf16" : "onednn-f32"; }
  void dequantize() override {
    if constexpr (kIsBf16) {
      dequantize_all(weight_, threads_, full_.data(), dequantize_row_bf16);
    } else {
      dequantize_all(weight_, threads_, full_.data(), dequantize_row_f32);
    }
  }
  void multiply() override {
    matmul_.execute(stream_, arguments_);
    stream_.wait();
  }
  std::vector<float> result() const override { return y_; }

 private:
  static constexpr bool kIsBf16 = sizeof(T) == 2;
  int64_t m_;
  int threads_;
  std::vector<T> x_, full_;
  std::vector<float> y_;
  dnnl::engine engine_{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream_{engine_};
  dnnl::matmul matmul_;
  std::unordered_map<int, dnnl::memory> arguments_;
};
#endif

}  // namespace

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
  omp_set_num_threads(threads);  // oneDNN takes OpenMP's default team
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
