#include "probe_memory.h"

#include <sys/mman.h>

#include <atomic>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "base/thread_pool.h"

namespace nibble {

ReadBandwidthProbe::ReadBandwidthProbe(int threads, size_t buffer_bytes, size_t slice_bytes)
    : threads_(threads), buffer_bytes_(buffer_bytes), slice_bytes_(slice_bytes) {
  void* memory =
      mmap(nullptr, buffer_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return;
  madvise(memory, buffer_bytes_, MADV_HUGEPAGE);
  std::memset(memory, 1, buffer_bytes_);
  buffer_ = static_cast<unsigned char*>(memory);
}

ReadBandwidthProbe::~ReadBandwidthProbe() {
  if (buffer_ != nullptr) munmap(buffer_, buffer_bytes_);
}

void ReadBandwidthProbe::read_slice() {
  // The best of 1 to 16 streams a thread and distances of 0 to 4 KiB (docs/notes.md).
  constexpr size_t kStreams = 4;
  constexpr size_t kPrefetchBytes = 2048;
  const unsigned char* slice = buffer_ + next_;
  next_ = next_ + 2 * slice_bytes_ > buffer_bytes_ ? 0 : next_ + slice_bytes_;
  const size_t per_stream = slice_bytes_ / (kStreams * static_cast<size_t>(threads_)) / 64 * 64;
  std::atomic<unsigned> all = 0;
  parallel_for(threads_, threads_, [&](int64_t thread) {
    unsigned total = 0;
    const unsigned char* from = slice + static_cast<size_t>(thread) * kStreams * per_stream;
#if defined(__SSE2__)
    __m128i sum[kStreams] = {};
    for (size_t i = 0; i < per_stream; i += 64) {
      for (size_t s = 0; s < kStreams; ++s) {
        const auto* line = reinterpret_cast<const __m128i*>(from + s * per_stream + i);
        _mm_prefetch(reinterpret_cast<const char*>(line) + kPrefetchBytes, _MM_HINT_T0);
        for (int j = 0; j < 4; ++j) sum[s] = _mm_xor_si128(sum[s], _mm_load_si128(line + j));
      }
    }
    for (const __m128i& s : sum) total += static_cast<unsigned>(_mm_cvtsi128_si32(s));
#else
    for (size_t i = 0; i < per_stream; i += 8) {
      for (size_t s = 0; s < kStreams; ++s) total += from[s * per_stream + i];
    }
#endif
    all += total;
  });
  checksum_ += all;  // keeps the reads alive
}

}  // namespace nibble
