// Progress of long commands, on stderr only: stdout is for data. A terminal gets one line that is
// rewritten in place; a log file gets a whole line every few seconds and one at the end.
#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "cli.h"

namespace nibble::cli {
namespace {

constexpr double kTerminalSeconds = 0.1;  // between redraws; more often only flickers
constexpr double kLogSeconds = 5;

double now_seconds() {
  using std::chrono::steady_clock;
  return std::chrono::duration<double>(steady_clock::now().time_since_epoch()).count();
}

/// Rewriting a line needs a terminal that understands "erase to end of line".
bool stderr_is_terminal() {
  const char* term = std::getenv("TERM");
  return ::isatty(STDERR_FILENO) == 1 && term != nullptr && std::strcmp(term, "dumb") != 0;
}

size_t terminal_columns() {
  winsize size{};
  const bool known = ::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
  return known ? size.ws_col : 100;
}

std::string clock_text(double seconds) {
  const auto total = static_cast<int64_t>(std::clamp(seconds, 0.0, 359999.0));
  if (total < 3600) return fmt::format("{:02}:{:02}", total / 60, total % 60);
  return fmt::format("{}:{:02}:{:02}", total / 3600, total / 60 % 60, total % 60);
}

}  // namespace

void add_progress_option(CLI::App& command, ProgressMode& mode) {
  static const std::map<std::string, ProgressMode> kModes = {{"auto", ProgressMode::automatic},
                                                             {"always", ProgressMode::always},
                                                             {"never", ProgressMode::never}};
  // auto: in place on a terminal, else a line every few seconds. always: in place anywhere.
  command
      .add_option_function<std::string>(
          "--progress", [&mode](const std::string& name) { mode = kModes.at(name); },
          "progress on stderr, in place or as lines of a log")
      ->check(CLI::IsMember({"auto", "always", "never"}))
      ->type_name("WHEN")
      ->default_str("auto")
      ->group("Output");
}

Progress::Progress(ProgressMode mode, std::string unit, int64_t total)
    : enabled_(mode != ProgressMode::never),
      terminal_(mode == ProgressMode::always || stderr_is_terminal()),
      unit_(std::move(unit)),
      total_(std::max<int64_t>(total, 1)),
      start_(now_seconds()),
      // A log's first line comes after a full interval, a terminal's with the first unit.
      last_draw_(terminal_ ? start_ - kTerminalSeconds : start_) {}

Progress::~Progress() {
  if (enabled_ && terminal_ && done_ > 0) std::fputs("\r\x1b[K", stderr);
}

void Progress::advance(const std::string& note) {
  ++done_;
  if (!enabled_) return;
  const bool last = done_ == total_;
  const double interval = terminal_ ? kTerminalSeconds : kLogSeconds;
  if (last || now_seconds() - last_draw_ >= interval) draw(note, last);
}

void Progress::draw(const std::string& note, bool last) {
  last_draw_ = now_seconds();
  const double seconds = last_draw_ - start_;
  const double rate = seconds > 0 ? static_cast<double>(done_) / seconds : 0;
  const double left = rate > 0 ? static_cast<double>(total_ - done_) / rate : 0;
  const double share = std::min(1.0, static_cast<double>(done_) / static_cast<double>(total_));
  constexpr size_t kBarColumns = 10;
  const auto filled = static_cast<size_t>(share * kBarColumns);
  const std::string total = fmt::format("{}", total_);
  std::string line =
      fmt::format("{} {:>{}}/{} {:3.0f}%|{:<{}}| [{}<{}, {:.1f} {}/s] {}", unit_, done_,
                  total.size(), total, share * 100, std::string(filled, '#'), kBarColumns,
                  clock_text(seconds), clock_text(last ? 0 : left), rate, unit_, note);
  // One write per line, and never wider than the terminal: a wrapped line cannot be rewritten.
  if (terminal_) {
    line = "\r" + line.substr(0, terminal_columns() - 1) + "\x1b[K";
  } else {
    line += '\n';
  }
  std::fputs(line.c_str(), stderr);
}

}  // namespace nibble::cli
