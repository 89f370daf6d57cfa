// Timing that can be defended: contenders take turns in one run, weights are flushed from every
// cache before each sample, and what is reported is the median with its spread. Also the probe for
// the read bandwidth that decode is measured against.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

namespace nibble {

double now_seconds();

/// Writes back and drops [data, data + bytes) from all caches of all cores (x86; elsewhere no-op).
void flush_from_caches(const void* data, size_t bytes);

struct Samples {
  std::vector<double> microseconds;  // in the order taken

  double median() const;
  double min() const;
  double max() const;
};

/// One thing that is timed. `prepare` is not timed: it makes the inputs cold.
struct Contender {
  std::string name;
  std::function<void()> prepare;
  std::function<void()> run;
  Samples samples;
};

struct TimingBudget {
  int threads = 1;  // of the contenders: they are awake when a sample starts
  int min_rounds = 5;
  int max_rounds = 200;
  double seconds = 0.5;  // over all contenders; min_rounds has precedence
};

/// Rounds of all contenders in turn: A B C, A B C, ... One untimed round first. Stops early, with
/// what it has, when `stop` (may be empty) returns true.
void time_interleaved(std::vector<Contender>& contenders, const TimingBudget& budget,
                      const std::function<bool()>& stop = {});

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
