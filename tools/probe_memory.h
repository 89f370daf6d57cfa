// How fast the memory can be read: what decoding is measured against.
#pragma once

#include <cstddef>

namespace nibble {

/// Reads slices of a large buffer with `threads` threads, several streams each. Each call reads the
/// next `slice_bytes` of the buffer, so that nothing is found in a cache.
class ReadBandwidthProbe {
 public:
  explicit ReadBandwidthProbe(int threads, size_t buffer_bytes = size_t{1} << 30,
                              size_t slice_bytes = size_t{64} << 20);
  ~ReadBandwidthProbe();
  ReadBandwidthProbe(const ReadBandwidthProbe&) = delete;
  ReadBandwidthProbe& operator=(const ReadBandwidthProbe&) = delete;

  bool ok() const { return buffer_ != nullptr; }  // false: no memory for the buffer
  void read_slice();
  size_t slice_bytes() const { return slice_bytes_; }

 private:
  int threads_;
  size_t buffer_bytes_, slice_bytes_, next_ = 0;
  unsigned char* buffer_ = nullptr;
  unsigned checksum_ = 0;
};

}  // namespace nibble
