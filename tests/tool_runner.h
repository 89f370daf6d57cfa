// Starts the built tool (NIBBLE_CLI) as its users do, and keeps what it said.
#pragma once

#include <fcntl.h>
#include <sys/types.h>
#include <unistd.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/check.h"

namespace nibble::test {

struct Outcome {
  int code = -1;  // exit code; 128 + signal if killed by one
  std::string out, err;
};

struct Setting {
  std::string kernel = "";       // NIBBLE_KERNEL; empty: unset
  std::string stdout_path = "";  // instead of a file of our own
  std::string stdin_path = "/dev/null";
};

int open_or_die(const std::string& path, int flags);

/// Starts the tool with these as stdout and stderr.
pid_t start_tool(const std::vector<std::string>& arguments, int out, int err,
                 const std::string& kernel = "", const std::string& stdin_path = "/dev/null");
int wait_for(pid_t child);  // the exit code, or 128 + signal

Outcome run_tool(const std::vector<std::string>& arguments, const Setting& setting = {});

/// stdout as JSON; a test failure if it is none.
nlohmann::json parse_output(const Outcome& outcome);

/// A pipe that takes not one byte more until it is drained.
class FullPipe {
 public:
  FullPipe() {
    NIBBLE_CHECK(::pipe2(ends_, O_CLOEXEC) == 0);
    const int flags = ::fcntl(ends_[1], F_GETFL);
    ::fcntl(ends_[1], F_SETFL, flags | O_NONBLOCK);
    const char byte = 'x';
    while (::write(ends_[1], &byte, 1) == 1) {
    }
    ::fcntl(ends_[1], F_SETFL, flags);
  }
  ~FullPipe() {
    close_input();
    ::close(ends_[0]);
  }
  int input() const { return ends_[1]; }
  void close_input() {
    if (ends_[1] >= 0) ::close(ends_[1]);
    ends_[1] = -1;
  }
  std::string drain() {
    close_input();
    std::string text;
    char buffer[4096];
    for (ssize_t n; (n = ::read(ends_[0], buffer, sizeof buffer)) > 0;) {
      text.append(buffer, static_cast<size_t>(n));
    }
    return text.substr(text.find_last_of('x') + 1);
  }

 private:
  int ends_[2];
};

}  // namespace nibble::test

#define EXPECT_HAS(text, part) \
  EXPECT_NE((text).find(part), std::string::npos) << "expected \"" << (part) << "\" in:\n" << (text)
