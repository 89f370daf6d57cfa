// What every subcommand says about itself and the machine, how failures become exit codes, and the
// signals. Not here: what the machine's kernels can do (doctor.cc).
#include <fmt/format.h>
#include <signal.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <optional>

#include "base/cpu_features.h"
#include "cli.h"
#include "text.h"

namespace nibble::cli {
namespace {

using nlohmann::json;

std::string& command_line() {
  static std::string text;
  return text;
}

/// As one would type it again; arguments with anything unusual in single quotes.
std::string shell_word(const std::string& word) {
  constexpr const char* kPlain =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+=./:,@%";
  if (!word.empty() && word.find_first_not_of(kPlain) == std::string::npos) return word;
  std::string quoted = "'";
  for (const char c : word) quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return quoted + "'";
}

/// Arguments may hold any byte, JSON only UTF-8.
std::string valid_utf8(const std::string& text) {
  const std::string dumped = json(text).dump(-1, ' ', false, json::error_handler_t::replace);
  return json::parse(dumped).get<std::string>();
}

std::optional<double> number_in_file(const char* path) {
  std::ifstream file(path);
  double value = 0;
  if (!(file >> value)) return std::nullopt;
  return value;
}

/// MHz of the first CPU at this moment; nothing where the system does not say.
std::optional<double> current_mhz() {
  if (const auto khz = number_in_file("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")) {
    return *khz / 1000;
  }
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with("cpu MHz")) continue;
    const size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    const double mhz = std::atof(line.c_str() + colon + 1);
    if (mhz > 0) return mhz;
  }
  return std::nullopt;
}

json clocks() {
  const auto now = current_mhz();
  const auto highest = number_in_file("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq");
  json result = {{"cpu_mhz", nullptr}, {"cpu_max_mhz", nullptr}};
  if (now) result["cpu_mhz"] = *now;
  if (highest) result["cpu_max_mhz"] = *highest / 1000;
  return result;
}

std::string system_name() {
  utsname names{};
  if (::uname(&names) != 0) return "unknown";
  return fmt::format("{} {} {}", names.sysname, names.release, names.machine);
}

std::atomic<bool> signalled{false};
static_assert(std::atomic<bool>::is_always_lock_free, "set in a signal handler");

void note_signal(int) { signalled.store(true, std::memory_order_relaxed); }

/// Checkpoints are read through memory maps, and one that shrinks meanwhile answers with SIGBUS.
void explain_bus_error(int) {
  constexpr char kText[] =
      "nibble: error: a mapped file could not be read: it was cut short, or its disk failed\n";
  [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, kText, sizeof kText - 1);
  ::_exit(kExitBadFile);
}

}  // namespace

void set_command_line(int argc, char** argv) {
  std::string& text = command_line();
  text = "nibble";  // not argv[0], which holds the path of one machine
  for (int i = 1; i < argc; ++i) text += ' ' + shell_word(argv[i]);
}

CLI::Validator one_device() {
  const auto check = [](const std::string& device) -> std::string {
    if (device == "cpu" || device == "cuda") return "";
    if (device.starts_with("cuda")) {
      return fmt::format(
          "{}: expected cpu or cuda, the first GPU that CUDA_VISIBLE_DEVICES leaves; one model on "
          "several GPUs is vLLM's tensor parallelism (docs/vllm.md)",
          printable(device));
    }
    return fmt::format("{}: expected cpu or cuda", printable(device));
  };
  return {check, "{cpu,cuda}"};
}

std::string device_summary() {
  const CpuFeatures& f = cpu_features();
  std::string text = f.brand.empty() ? "unknown CPU" : f.brand;
  text += ",";
  if (f.avx2) text += " AVX2";
  if (f.avx_vnni) text += " AVX-VNNI";
  if (f.avx512) text += " AVX-512";
  if (f.avx512_vnni) text += " AVX-512-VNNI";
  if (f.amx_int8) text += " AMX-INT8";
  if (text.back() == ',') text += " no vector extension in use";
  const int cpus = available_cpus();
  return text + fmt::format(", {} CPU{}", cpus, cpus == 1 ? "" : "s");
}

json report_header() {
  const char* commit = NIBBLE_COMMIT;
  return {{"schema_version", 1},
          {"tool", "nibble"},
          {"version", NIBBLE_VERSION},
          {"commit", *commit == '\0' ? json(nullptr) : json(commit)},
          {"command", valid_utf8(command_line())},
          {"device", device_summary()},
          {"driver", nullptr},  // of a GPU: this version uses none
          {"system", system_name()},
          {"threads", available_cpus()},
          {"clocks", clocks()}};
}

int exit_code_for(const Status& status) {
  switch (status.code()) {
    case Code::ok: return kExitOk;
    case Code::invalid_argument: return kExitUsage;
    case Code::unsupported: return kExitUnsupported;
    case Code::corrupt_file: return kExitBadFile;
    case Code::io_error: return kExitBadFile;
    case Code::out_of_memory: return kExitUnsupported;  // does not fit this device
    case Code::non_finite: return kExitBadFile;
    case Code::interrupted: return kExitInterrupted;
  }
  return kExitFailed;
}

int fail(const Status& status) {
  std::fflush(stdout);  // so that what was found comes before why it ended
  // Not fmt::print, which throws if stderr is closed.
  std::fputs(fmt::format("nibble: error: {}\n", status.message()).c_str(), stderr);
  return exit_code_for(status);
}

bool interrupted() { return signalled.load(std::memory_order_relaxed); }

void install_signal_handlers() {
  struct sigaction action {};
  action.sa_handler = note_signal;
  // SA_RESETHAND: a second Ctrl-C ends the process at once.
  action.sa_flags = SA_RESTART | SA_RESETHAND;
  for (const int signal_number : {SIGINT, SIGTERM, SIGHUP}) {
    struct sigaction before {};
    ::sigaction(signal_number, nullptr, &before);
    if (before.sa_handler != SIG_IGN) ::sigaction(signal_number, &action, nullptr);  // nohup, `&`
  }
  struct sigaction bus {};
  bus.sa_handler = explain_bus_error;
  ::sigaction(SIGBUS, &bus, nullptr);
  // A closed pipe is then a failed write, which main() reports.
  ::signal(SIGPIPE, SIG_IGN);
}

const std::map<std::string, Mode>& modes_by_name() {
  static const std::map<std::string, Mode> modes = [] {
    std::map<std::string, Mode> map;
    for (const Mode mode : {Mode::w4a16, Mode::w4a8, Mode::w4a8_fp8, Mode::w4a4}) {
      map[mode_name(mode)] = mode;
    }
    return map;
  }();
  return modes;
}

const std::map<std::string, Granularity>& granularities_by_name() {
  static const std::map<std::string, Granularity> granularities = [] {
    std::map<std::string, Granularity> map;
    for (const Granularity granularity :
         {Granularity::tensor, Granularity::token, Granularity::group, Granularity::static_tensor,
          Granularity::static_group}) {
      map[granularity_name(granularity)] = granularity;
    }
    return map;
  }();
  return granularities;
}

}  // namespace nibble::cli
