// A move-only, 64-byte aligned, zero-initialised byte buffer that reports failure as a Status.
// Large ones sit on huge pages where the system allows it: streaming a weight touches a page every
// few hundred nanoseconds otherwise.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <utility>

#include "base/status.h"

namespace nibble {

inline constexpr size_t kCacheLineBytes = 64;
inline constexpr size_t kHugePageBytes = size_t{2} << 20;

struct FreeBuffer {
  size_t mapped = 0;  // bytes; 0: it came from the heap
  void operator()(std::byte* memory) const {
    if (mapped > 0) {
      munmap(memory, mapped);
    } else {
      std::free(memory);
    }
  }
};

class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  AlignedBuffer(AlignedBuffer&& other) noexcept
      : data_(std::move(other.data_)), bytes_(std::exchange(other.bytes_, 0)) {}
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    data_ = std::move(other.data_);
    bytes_ = std::exchange(other.bytes_, 0);
    return *this;
  }

  static Result<AlignedBuffer> zeroed(size_t bytes) {
    AlignedBuffer buffer;
    const bool huge = bytes >= 2 * kHugePageBytes;
    const size_t alignment = huge ? kHugePageBytes : kCacheLineBytes;
    const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    if (rounded < bytes) return Status(Code::out_of_memory, "allocation size overflows");
    void* memory = huge ? map(rounded) : std::aligned_alloc(alignment, rounded == 0 ? 64 : rounded);
    if (memory == nullptr) {
      return Status(Code::out_of_memory, "cannot allocate " + std::to_string(bytes) + " bytes");
    }
    // Mapped memory is zero already, and is better touched first by the threads that fill it.
    if (!huge) std::memset(memory, 0, bytes);
    buffer.data_ = {static_cast<std::byte*>(memory), FreeBuffer{huge ? rounded : 0}};
    buffer.bytes_ = bytes;
    return buffer;
  }

  /// Gives the memory up; `mapped` says how FreeBuffer is to release it.
  std::byte* release(size_t* mapped) {
    *mapped = data_.get_deleter().mapped;
    bytes_ = 0;
    return data_.release();
  }

  std::byte* data() { return data_.get(); }
  const std::byte* data() const { return data_.get(); }
  size_t bytes() const { return bytes_; }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(data_.get());
  }
  template <class T>
  const T* as() const {
    return reinterpret_cast<const T*>(data_.get());
  }

 private:
  /// Zero pages at a huge page's boundary; null if there are none.
  static void* map(size_t bytes) {
    void* area = mmap(nullptr, bytes + kHugePageBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (area == MAP_FAILED) return nullptr;
    const auto start = reinterpret_cast<uintptr_t>(area);
    const uintptr_t first = (start + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
    if (first > start) munmap(area, first - start);
    const uintptr_t end = start + bytes + kHugePageBytes;
    if (end > first + bytes) munmap(reinterpret_cast<void*>(first + bytes), end - first - bytes);
    auto* memory = reinterpret_cast<void*>(first);
    madvise(memory, bytes, MADV_HUGEPAGE);  // a wish: failure changes nothing
    return memory;
  }

  std::unique_ptr<std::byte, FreeBuffer> data_;
  size_t bytes_ = 0;
};

}  // namespace nibble
