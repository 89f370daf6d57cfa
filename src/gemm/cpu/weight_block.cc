#include "gemm/cpu/weight_block.h"

#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "base/cpu_features.h"
#include "base/thread_pool.h"
#include "gemm/gemm.h"

namespace nibble {
namespace {

constexpr uint64_t kWeightMagic = 0x3147494557424e49u;  // "NIBWEIG1"
constexpr size_t kHashedWords = 6;

/// FNV-1a over words: tells a header from memory that was overwritten, not from a forged one.
uint64_t header_check(const WeightHeader& header) {
  uint64_t words[kHashedWords];
  std::memcpy(words, &header, sizeof words);
  uint64_t hash = 0xcbf29ce484222325u;
  for (const uint64_t word : words) hash = (hash ^ word) * 0x100000001b3u;
  return hash;
}

bool aligned(const void* memory) {
  return reinterpret_cast<uintptr_t>(memory) % kCacheLineBytes == 0;
}

Status refuse(std::string reason) { return Status(Code::invalid_argument, std::move(reason)); }

/// Asks for huge pages where none have been touched yet, as AlignedBuffer does for its own; a wish.
void wish_huge_pages(void* memory, size_t bytes) {
  const auto start = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (start + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  const uintptr_t end = (start + bytes) / kHugePageBytes * kHugePageBytes;
  if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
}

void clear(std::byte* memory, size_t bytes, int threads) {
  wish_huge_pages(memory, bytes);
  const auto parts = static_cast<int64_t>((bytes + kHugePageBytes - 1) / kHugePageBytes);
  parallel_for(std::clamp(threads > 0 ? threads : available_cpus(), 1, kMaxThreads), parts,
               [&](int64_t part) {
                 const size_t from = static_cast<size_t>(part) * kHugePageBytes;
                 std::memset(memory + from, 0, std::min(kHugePageBytes, bytes - from));
               });
}

}  // namespace

Result<size_t> weight_block_bytes(const QuantMatrix& matrix, bool has_bias) {
  const Result<PackedWeights> shape = packed_shape(matrix);
  if (!shape.ok()) return shape.status();
  return sizeof(WeightHeader) + static_cast<size_t>(packed_bytes(*shape, has_bias));
}

Status write_weight_block(const PackSource& source, int threads, void* memory, size_t bytes,
                          bool zeroed) {
  const bool has_bias = source.bias != nullptr;
  const Result<size_t> expected = weight_block_bytes(source.matrix, has_bias);
  if (!expected.ok()) return expected.status();
  if (bytes != *expected) {
    return refuse(fmt::format("memory has {} bytes, expected {}", bytes, *expected));
  }
  if (!aligned(memory)) return refuse("memory is not 64-byte aligned");
  auto* to = static_cast<std::byte*>(memory);
  if (!zeroed) clear(to, bytes, threads);
  NIBBLE_TRY(pack_weights_into(source, threads, to + sizeof(WeightHeader)));
  WeightHeader header;
  header.magic = kWeightMagic;
  header.k = source.matrix.k;
  header.n = source.matrix.n;
  header.group_size = source.matrix.group_size;
  header.scale_dtype = static_cast<int32_t>(source.matrix.scale_dtype);
  header.has_bias = has_bias ? 1 : 0;
  header.bytes = bytes;
  header.check = header_check(header);
  std::memcpy(to, &header, sizeof header);
  return {};
}

Result<PackedWeights> open_weight_block(const void* memory, const char* name) {
  if (memory == nullptr) return refuse(fmt::format("{} is null", name));
  if (!aligned(memory)) return refuse(fmt::format("{} is not 64-byte aligned", name));
  WeightHeader header;
  std::memcpy(&header, memory, sizeof header);
  if (header.magic != kWeightMagic || header.check != header_check(header)) {
    return refuse(
        fmt::format("{} was not made by nibble_weight_create or nibble_weight_pack", name));
  }
  QuantMatrix matrix;  // whose packed form this is
  matrix.k = header.k;
  matrix.n = header.n;
  matrix.group_size = header.group_size;
  matrix.layout = WeightLayout::ct_pack;  // any N
  matrix.scale_dtype = static_cast<Dtype>(header.scale_dtype);
  Result<PackedWeights> w = packed_shape(matrix);
  if (!w.ok()) return w;
  const bool has_bias = header.has_bias != 0;
  if (header.bytes != sizeof header + static_cast<uint64_t>(packed_bytes(*w, has_bias))) {
    return refuse(fmt::format("{} says that it has {} bytes; its shape needs {}", name,
                              header.bytes,
                              sizeof header + static_cast<uint64_t>(packed_bytes(*w, has_bias))));
  }
  attach(*w, static_cast<const std::byte*>(memory) + sizeof header, has_bias);
  return w;
}

}  // namespace nibble
