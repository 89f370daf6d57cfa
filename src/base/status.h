// Status and Result: how every fallible function of the library reports failure. Nothing in the
// library prints, throws across the C ABI, or exits; see include/nibble.h for the public codes.
#pragma once

#include <string>
#include <utility>
#include <variant>

namespace nibble {

/// Values equal nibble_code in include/nibble.h (checked in src/capi.cc).
enum class Code : int {
  ok = 0,
  invalid_argument = 1,  // the caller broke a documented precondition
  unsupported = 2,       // well-formed, but no kernel, format or device here handles it
  corrupt_file = 3,      // a file contradicts its format or itself
  io_error = 4,          // the operating system refused: missing file, permission, full disk
  out_of_memory = 5,
  non_finite = 6,   // NaN or infinity in data that must be finite
  interrupted = 7,  // the caller asked to stop
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Code code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == Code::ok; }
  Code code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  Code code_ = Code::ok;
  std::string message_;
};

/// A value or the Status that explains its absence. value() may be called only when ok().
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::move(value)) {}
  Result(Status status) : state_(std::move(status)) {}

  bool ok() const { return std::holds_alternative<T>(state_); }
  Status status() const { return ok() ? Status{} : std::get<Status>(state_); }
  T& value() { return std::get<T>(state_); }
  const T& value() const { return std::get<T>(state_); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }
  T& operator*() { return value(); }
  const T& operator*() const { return value(); }

 private:
  std::variant<T, Status> state_;
};

}  // namespace nibble

/// Returns the Status of `expr` from the enclosing function unless it is ok.
#define NIBBLE_TRY(expr)                                                        \
  do {                                                                          \
    if (::nibble::Status nibble_try_status = (expr); !nibble_try_status.ok()) { \
      return nibble_try_status;                                                 \
    }                                                                           \
  } while (0)
