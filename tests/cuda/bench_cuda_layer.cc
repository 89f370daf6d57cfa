// Times the kernels around the products of a decoder layer at the shapes of Llama-3.1-8B (hidden
// 4096, 32 heads of 128, 8 KV heads, MLP 14336): bench_cuda_layer [NAME-PREFIX [--flashinfer
// LIBRARY]], the library that scripts/flashinfer_peer.sh makes. Device memory is rotated so that L2
// does not hold what a kernel reads, launches are chained in a CUDA graph as in a model, and
// medians of several replays are printed with what they move or compute a second, and as a share of
// what a copy moves in the same run where neither finds anything in L2.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "model/cuda/kernels.h"

namespace nibble::cuda {
namespace {

constexpr int64_t kHidden = 4096, kHeads = 32, kKvHeads = 8, kHeadDim = 128, kMlp = 14336;
constexpr int64_t kVocab = 128256;
constexpr int64_t kColdBytes = int64_t{256} << 20;  // more than any L2

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  fmt::print(stderr, "{}: {}\n", what, cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK(call) check((call), #call)

/// Device memory of random bytes that are small bf16 and f16 numbers, freed at the end.
struct Memory {
  void* data = nullptr;
  explicit Memory(int64_t bytes, bool zero = false) {
    CHECK(cudaMalloc(&data, static_cast<size_t>(bytes)));
    if (zero) {
      CHECK(cudaMemset(data, 0, static_cast<size_t>(bytes)));
      return;
    }
    static const std::vector<uint16_t> noise = [] {
      std::vector<uint16_t> bits(1 << 22);
      std::mt19937 random(1);
      for (uint16_t& b : bits) b = static_cast<uint16_t>(0x3800u | (random() & 0x87ffu));
      return bits;
    }();
    const auto block = static_cast<int64_t>(noise.size() * 2);
    for (int64_t at = 0; at < bytes; at += block) {
      CHECK(cudaMemcpy(static_cast<char*>(data) + at, noise.data(),
                       static_cast<size_t>(std::min(block, bytes - at)), cudaMemcpyHostToDevice));
    }
  }
  template <class T>
  explicit Memory(const std::vector<T>& values) {
    CHECK(cudaMalloc(&data, values.size() * sizeof(T)));
    CHECK(cudaMemcpy(data, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  Memory(const Memory&) = delete;
  ~Memory() { (void)cudaFree(data); }
  template <class T>
  T* as(int64_t byte_offset = 0) const {
    return reinterpret_cast<T*>(static_cast<char*>(data) + byte_offset);
  }
};

cudaStream_t stream() {
  static cudaStream_t s = [] {
    cudaStream_t made = nullptr;
    CHECK(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking));
    return made;
  }();
  return s;
}

/// Median microseconds of one launch: graphs of `launches`, launch i working on copy i % copies.
double microseconds(int launches, const std::function<cudaError_t(int)>& launch) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  CHECK(launch(0));
  CHECK(cudaStreamSynchronize(stream()));
  CHECK(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeRelaxed));
  for (int i = 0; i < launches; ++i) CHECK(launch(i));
  CHECK(cudaStreamEndCapture(stream(), &graph));
  CHECK(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < 13; ++i) {
    CHECK(cudaEventRecord(begin, stream()));
    CHECK(cudaGraphLaunch(exec, stream()));
    CHECK(cudaEventRecord(end, stream()));
    CHECK(cudaStreamSynchronize(stream()));
    float milliseconds = 0;
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    if (i >= 2) times.push_back(milliseconds);
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  CHECK(cudaGraphExecDestroy(exec));
  CHECK(cudaGraphDestroy(graph));
  return 1e3 * times[times.size() / 2] / launches;
}

int copies_of(int64_t bytes) {
  return static_cast<int>(std::clamp<int64_t>((kColdBytes + bytes - 1) / bytes, 1, 64));
}
int launches_of(int copies) { return (std::max(copies, 32) + copies - 1) / copies * copies; }

/// GB/s, both ways together; measured before everything else.
double& copy_rate() {
  static double rate = 0;
  return rate;
}

void print(const std::string& name, double us, double bytes, double operations = 0) {
  constexpr double kBeyondL2 = 64e6;
  fmt::print("{:44} {:9.2f} us {:8.0f} GB/s", name, us, bytes / us * 1e-3);
  if (operations > 0) {
    fmt::print(" {:7.0f} TFLOPS", operations / us * 1e-6);
  } else if (copy_rate() > 0 && bytes >= kBeyondL2) {
    fmt::print(" {:6.1f} % of a copy", 100 * bytes / us * 1e-3 / copy_rate());
  }
  fmt::print("\n");
  std::fflush(stdout);
}

std::vector<int32_t> shuffled_table(int64_t pages) {
  std::vector<int32_t> table(static_cast<size_t>(pages));
  std::iota(table.begin(), table.end(), 0);
  std::mt19937 random(2);
  std::shuffle(table.begin(), table.end(), random);
  return table;
}

KvPages pages_of(const Memory& keys, const Memory& values, const Memory& table, int64_t max_pages) {
  KvPages kv;
  kv.type = Element::bf16;
  kv.keys = keys.data;
  kv.values = values.data;
  kv.page_stride = page_elements(kKvHeads, kHeadDim);
  kv.page_table = table.as<int32_t>();
  kv.max_pages = max_pages;
  kv.kv_heads = kKvHeads;
  kv.head_dim = kHeadDim;
  return kv;
}

AttentionArgs attention_of(const KvPages& kv, const Memory& q, const Memory& out) {
  AttentionArgs a;
  a.q = q.data;
  a.q_stride = a.out_stride = kHeads * kHeadDim;
  a.heads = kHeads;
  a.kv = kv;
  a.scale = 0.088388f;
  a.type = Element::bf16;
  a.out = out.data;
  a.programmatic = true;
  return a;
}

void decode(int64_t rows, int64_t context, int64_t max_context, int multiprocessors) {
  const int64_t pages = rows * (context / kPagePositions);
  const int64_t copy_bytes = pages * page_elements(kKvHeads, kHeadDim) * 2;
  const int copies = copies_of(2 * copy_bytes);
  const Memory keys(copy_bytes * copies), values(copy_bytes * copies);
  // the table is as wide as the longest context, as a model's is
  const int64_t max_pages = max_context / kPagePositions, used = context / kPagePositions;
  const std::vector<int32_t> shuffled = shuffled_table(pages);
  std::vector<int32_t> wide(static_cast<size_t>(rows * max_pages), -1);
  for (int64_t i = 0; i < pages; ++i) wide[i / used * max_pages + i % used] = shuffled[i];
  std::vector<int32_t> order(static_cast<size_t>(rows));
  std::iota(order.begin(), order.end(), 0);
  const Memory table(wide), sequence(order);
  const Memory position(
      std::vector<int32_t>(static_cast<size_t>(rows), static_cast<int32_t>(context - 1)));
  const Memory q(rows * kHeads * kHeadDim * 2), out(rows * kHeads * kHeadDim * 2);
  const Memory scratch(decode_scratch_bytes(rows, kHeads, kHeadDim, max_context), true);
  DecodeArgs args;
  args.attention = attention_of(pages_of(keys, values, table, max_pages), q, out);
  args.rows = rows;
  args.sequence = sequence.as<int32_t>();
  args.position = position.as<int32_t>();
  args.max_context = max_context;
  args.scratch = scratch.data;
  args.multiprocessors = multiprocessors;
  const double us = microseconds(launches_of(copies), [&](int i) {
    DecodeArgs a = args;
    a.attention.kv.keys = keys.as<void>(i % copies * copy_bytes);
    a.attention.kv.values = values.as<void>(i % copies * copy_bytes);
    return launch_attention_decode(a, stream());
  });
  print(fmt::format("decode batch {} context {}", rows, context), us,
        2.0 * static_cast<double>(copy_bytes));
}

struct Prefill {
  int64_t count, before;
  double bytes() const { return 4.0 * static_cast<double>((before + count) * kKvHeads * kHeadDim); }
  double operations() const {
    const auto n = static_cast<double>(count);
    return 4.0 * n * (static_cast<double>(before) + (n + 1) / 2) * kHeads * kHeadDim;
  }
  std::string name(const char* kernel) const {
    return fmt::format("prefill {} {} after {}", kernel, count, before);
  }
};

void prefill(const Prefill& p, bool wgmma) {
  const int64_t pages = (p.before + p.count + kPagePositions - 1) / kPagePositions;
  const int64_t bytes = pages * page_elements(kKvHeads, kHeadDim) * 2;
  const Memory keys(bytes), values(bytes), table(shuffled_table(pages));
  const Memory q(p.count * kHeads * kHeadDim * 2), out(p.count * kHeads * kHeadDim * 2);
  const std::vector<PrefillTile> tiles =
      prefill_tiles({{0, 0, static_cast<int32_t>(p.before), static_cast<int32_t>(p.count)}});
  const Memory device_tiles(tiles);
  PrefillArgs args;
  args.attention = attention_of(pages_of(keys, values, table, pages), q, out);
  args.tiles = device_tiles.as<PrefillTile>();
  args.num_tiles = static_cast<int64_t>(tiles.size());
  args.wgmma = wgmma;
  const double us = microseconds(8, [&](int) { return launch_attention_prefill(args, stream()); });
  print(p.name(wgmma ? "wgmma" : "mma"), us, p.bytes(), p.operations());
}

using FlashinferPrefill = cudaError_t(const void* q, const void* k, const void* v, void* out,
                                      int heads, int kv_heads, int queries, int keys, float scale,
                                      cudaStream_t stream);

/// The same with keys and values one after the other, which is what that library's kernel takes.
void prefill(const Prefill& p, FlashinferPrefill* flashinfer) {
  const int64_t keys = p.before + p.count;
  const Memory k(keys * kKvHeads * kHeadDim * 2), v(keys * kKvHeads * kHeadDim * 2);
  const Memory q(p.count * kHeads * kHeadDim * 2), out(p.count * kHeads * kHeadDim * 2);
  const double us = microseconds(8, [&](int) {
    return flashinfer(q.data, k.data, v.data, out.data, kHeads, kKvHeads, static_cast<int>(p.count),
                      static_cast<int>(keys), 0.088388f, stream());
  });
  print(p.name("flashinfer"), us, p.bytes(), p.operations());
}

FlashinferPrefill* load_flashinfer(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  void* function = library != nullptr ? dlsym(library, "flashinfer_prefill") : nullptr;
  if (function == nullptr) {
    fmt::print(stderr, "{}\n", dlerror());
    std::exit(1);
  }
  return reinterpret_cast<FlashinferPrefill*>(function);
}

void rope(int64_t rows) {
  const int64_t width = (kHeads + 2 * kKvHeads) * kHeadDim;
  const int copies = copies_of(rows * width * 4);
  const int64_t pages = (rows + kPagePositions - 1) / kPagePositions;
  const int64_t bytes = pages * page_elements(kKvHeads, kHeadDim) * 2;
  const Memory qkv(rows * width * 2 * copies), q(rows * kHeads * kHeadDim * 2 * copies);
  const Memory keys(bytes * copies), values(bytes * copies), table(shuffled_table(pages));
  const Memory angles(rows * kHeadDim * 4), faults(4, true), sequence(rows * 4, true);
  std::vector<int32_t> order(static_cast<size_t>(rows));
  std::iota(order.begin(), order.end(), 0);
  const Memory position(order);
  RopeArgs args;
  args.type = Element::bf16;
  args.qkv_stride = width;
  args.rows = rows;
  args.heads = kHeads;
  args.q_stride = kHeads * kHeadDim;
  args.kv = pages_of(keys, values, table, pages);
  args.sequence = sequence.as<int32_t>();
  args.position = position.as<int32_t>();
  args.cosine = args.sine = angles.as<float>();
  args.faults = faults.as<int32_t>();
  args.programmatic = true;
  const double us = microseconds(launches_of(copies), [&](int i) {
    RopeArgs a = args;
    a.qkv = qkv.as<void>(i % copies * rows * width * 2);
    a.q = q.as<void>(i % copies * rows * kHeads * kHeadDim * 2);
    a.kv.keys = keys.as<void>(i % copies * bytes);
    a.kv.values = values.as<void>(i % copies * bytes);
    return launch_rope(a, stream());
  });
  print(fmt::format("rope rows {}", rows), us, static_cast<double>(rows * width * 4));
}

QuantizeArgs codes_of(int64_t rows, int64_t k, const Memory& codes, const Memory& scales) {
  QuantizeArgs to;
  to.m = rows;
  to.k = to.padded_k = k;
  to.group_size = 128;
  to.type = Element::bf16;
  to.codes = codes.as<int8_t>();
  to.scales = scales.as<float>();
  to.programmatic = true;
  return to;
}

void norm(int64_t rows, bool quantized) {
  const int64_t elements = rows * kHidden;
  const int copies = copies_of(elements * 11);
  const Memory hidden(elements * 4 * copies), delta(elements * 2 * copies), weight(kHidden * 4);
  const Memory out(elements * 2 * copies), scales(rows * 4);
  NormArgs args;
  args.m = rows;
  args.k = kHidden;
  args.norm = weight.as<float>();
  args.eps = 1e-5f;
  args.programmatic = true;
  const QuantizeArgs to = codes_of(rows, kHidden, out, scales);
  const double us = microseconds(launches_of(copies), [&](int i) {
    NormArgs a = args;
    const int64_t at = i % copies * elements;
    a.hidden = hidden.as<float>(at * 4);
    a.delta = delta.as<void>(at * 2);
    if (!quantized) return launch_norm(a, out.as<void>(at * 2), kHidden, stream());
    QuantizeArgs q = to;
    q.codes = out.as<int8_t>(at * 2);
    return launch_norm_quantize(a, q, stream());
  });
  print(fmt::format("norm to {} rows {}", quantized ? "codes" : "16 bits", rows), us,
        static_cast<double>(elements) * (quantized ? 11 : 12));
}

void gate(int64_t rows, bool quantized) {
  const int64_t elements = rows * kMlp;
  const int copies = copies_of(elements * 5);
  const Memory x(elements * 4 * copies), out(elements * 2 * copies), scales(rows * 4);
  GateQuantizeArgs args;
  args.to = codes_of(rows, kMlp, out, scales);
  args.to.x_stride = args.up_stride = 2 * kMlp;
  args.clusters = true;
  const double us = microseconds(launches_of(copies), [&](int i) {
    GateQuantizeArgs a = args;
    const int64_t at = i % copies * elements;
    a.to.x = x.as<void>(at * 4);
    a.up = x.as<void>(at * 4 + kMlp * 2);
    if (!quantized) return launch_gate(a, out.as<void>(at * 2), kMlp, stream());
    a.to.codes = out.as<int8_t>(at * 2);
    return launch_gate_quantize(a, stream());
  });
  print(fmt::format("gate to {} rows {}", quantized ? "codes" : "16 bits", rows), us,
        static_cast<double>(elements) * (quantized ? 5 : 6));
}

/// Quantizing by itself: o's input, and what down's would be without the gate in front.
void quantize(int64_t rows, int64_t k) {
  const int64_t elements = rows * k;
  const int copies = copies_of(elements * 3);
  const Memory x(elements * 2 * copies), out(elements * copies), scales(rows * 4);
  QuantizeArgs args = codes_of(rows, k, out, scales);
  args.x_stride = k;
  const double us = microseconds(launches_of(copies), [&](int i) {
    QuantizeArgs a = args;
    a.x = x.as<void>(i % copies * elements * 2);
    a.codes = out.as<int8_t>(i % copies * elements);
    return launch_quantize(a, stream());
  });
  print(fmt::format("quantize {} rows {}", k, rows), us, static_cast<double>(elements) * 3);
}

void tokens(int64_t rows) {
  const Memory table(kVocab * kHidden * 2), ids(rows * 4, true), hidden(rows * kHidden * 4);
  EmbeddingArgs embedding;
  embedding.type = Element::bf16;
  embedding.table = table.data;
  embedding.vocab = kVocab;
  embedding.width = kHidden;
  embedding.tokens = ids.as<int32_t>();
  embedding.rows = rows;
  embedding.hidden = hidden.as<float>();
  embedding.programmatic = true;
  print(fmt::format("embedding rows {}", rows),
        microseconds(32, [&](int) { return launch_embedding(embedding, stream()); }),
        static_cast<double>(rows * kHidden) * 6);
  const Memory logits(rows * kVocab * 4), scratch(argmax_scratch_bytes(rows), true);
  ArgmaxArgs argmax;
  argmax.logits = logits.as<float>();
  argmax.stride = argmax.vocab = kVocab;
  argmax.rows = rows;
  argmax.tokens = ids.as<int32_t>();
  argmax.scratch = scratch.data;
  argmax.programmatic = true;
  print(fmt::format("argmax rows {}", rows),
        microseconds(32, [&](int) { return launch_argmax(argmax, stream()); }),
        static_cast<double>(rows * kVocab) * 4);
}

/// What the figures may be compared with.
void copy() {
  const int64_t bytes = int64_t{1} << 30;
  const Memory from(bytes), to(bytes);
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < 10; ++i) {
    CHECK(cudaEventRecord(begin, stream()));
    CHECK(cudaMemcpyAsync(to.data, from.data, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice,
                          stream()));
    CHECK(cudaEventRecord(end, stream()));
    CHECK(cudaStreamSynchronize(stream()));
    float milliseconds = 0;
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    times.push_back(1e3f * milliseconds);
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  const double us = times[times.size() / 2], moved = 2.0 * static_cast<double>(bytes);
  print("copy (read + write)", us, moved);
  copy_rate() = moved / us * 1e-3;
}

int run(const std::string& only, FlashinferPrefill* flashinfer) {
  int device = 0, multiprocessors = 0, capability = 0;
  CHECK(cudaGetDevice(&device));
  CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  CHECK(cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, device));
  const auto wanted = [&](const char* name) {
    return std::strncmp(name, only.c_str(), only.size()) == 0;
  };
  copy();
  if (wanted("decode")) {
    for (const int64_t context : {64, 512, 4096}) {
      for (const int64_t rows : {1, 8, 32, 64}) decode(rows, context, 8192, multiprocessors);
    }
  }
  for (const Prefill& p : {Prefill{2048, 0}, Prefill{2048, 6144}, Prefill{8192, 0}}) {
    if (!wanted("prefill")) break;
    if (capability == 9) prefill(p, true);
    prefill(p, false);
    if (flashinfer != nullptr) prefill(p, flashinfer);
  }
  for (const int64_t rows : {1, 8, 32, 64, 512, 2048, 8192}) {
    if (wanted("rope")) rope(rows);
    if (wanted("quantize")) quantize(rows, kHidden), quantize(rows, kMlp);
    if (wanted("norm")) norm(rows, true), norm(rows, false);
    if (wanted("gate")) gate(rows, true), gate(rows, false);
    if (wanted("tokens") && rows <= 64) tokens(rows);
  }
  return 0;
}

}  // namespace
}  // namespace nibble::cuda

int main(int argc, char** argv) {
  using namespace nibble::cuda;
  const bool peer = argc == 4 && std::strcmp(argv[2], "--flashinfer") == 0;
  if (argc > 2 && !peer) {
    fmt::print(stderr, "usage: bench_cuda_layer [NAME-PREFIX [--flashinfer LIBRARY]]\n");
    return 2;
  }
  return run(argc > 1 ? argv[1] : "", peer ? load_flashinfer(argv[3]) : nullptr);
}
