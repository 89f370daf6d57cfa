// A move-only, 64-byte aligned, zero-initialised byte buffer that reports failure as a Status.
// Large ones sit on huge pages where the system allows it: streaming a weight touches a page every
// few hundred nanoseconds otherwise.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "base/status.h"

namespace nibble {

inline constexpr size_t kCacheLineBytes = 64;
inline constexpr size_t kHugePageBytes = size_t{2} << 20;

class AlignedBuffer {
 public:
  AlignedBuffer() = default;

  static Result<AlignedBuffer> zeroed(size_t bytes) {
    AlignedBuffer buffer;
    const bool huge = bytes >= 2 * kHugePageBytes;
    const size_t alignment = huge ? kHugePageBytes : kCacheLineBytes;
    const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    if (rounded < bytes) return Status(Code::out_of_memory, "allocation size overflows");
    void* memory = std::aligned_alloc(alignment, rounded == 0 ? alignment : rounded);
    if (memory == nullptr) {
      return Status(Code::out_of_memory, "cannot allocate " + std::to_string(bytes) + " bytes");
    }
    if (huge) madvise(memory, rounded, MADV_HUGEPAGE);  // a wish: failure changes nothing
    std::memset(memory, 0, bytes);
    buffer.data_.reset(static_cast<std::byte*>(memory));
    buffer.bytes_ = bytes;
    return buffer;
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
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  std::unique_ptr<std::byte, Free> data_;
  size_t bytes_ = 0;
};

}  // namespace nibble
