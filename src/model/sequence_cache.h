// What a sequence has behind it, on whatever device its model runs.
#pragma once

#include <cstdint>

namespace nibble {

/// Keys and values of one sequence, in the memory of the runner that made it, which must outlive
/// it.
class SequenceCache {
 public:
  virtual ~SequenceCache() = default;
  /// Positions [0, length()) are valid.
  virtual int64_t length() const = 0;
  /// Forgets what is behind `length`, which is at most length().
  virtual void set_length(int64_t length) = 0;
};

}  // namespace nibble
