// What the subcommands of the command-line tool share. One file per subcommand, each with one
// function that adds itself to the CLI11 application; main.cc lists them.
#pragma once

#include <CLI/CLI.hpp>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "base/status.h"
#include "gemm/gemm.h"

namespace nibble::cli {

/// Exit codes of every subcommand.
enum Exit : int {
  kExitOk = 0,
  kExitFailed = 1,  // a check or gate failed
  kExitUsage = 2,
  kExitUnsupported = 3,  // model, format or device
  kExitBadFile = 4,      // missing, corrupt or unwritable file
  kExitInterrupted = 130,
};

int exit_code_for(const Status& status);

/// Prints "nibble: error: ..." to stderr and returns exit_code_for(status).
int fail(const Status& status);

/// Each adds one subcommand; when chosen, its callback sets `exit_code`.
void add_bench_command(CLI::App& app, int& exit_code);
void add_bench_model_command(CLI::App& bench, int& exit_code);  // a subcommand of bench
void add_calibrate_command(CLI::App& app, int& exit_code);
void add_doctor_command(CLI::App& app, int& exit_code);
void add_generate_command(CLI::App& app, int& exit_code);
void add_inspect_command(CLI::App& app, int& exit_code);
void add_plan_command(CLI::App& app, int& exit_code);
void add_perplexity_command(CLI::App& app, int& exit_code);
void add_quantize_command(CLI::App& app, int& exit_code);
void add_report_command(CLI::App& app, int& exit_code);
void add_verify_command(CLI::App& app, int& exit_code);

/// schema_version, tool, version, commit, command (line), device, threads and clocks: the head of
/// every --json output. Set by main before a subcommand runs.
nlohmann::json report_header();
void set_command_line(int argc, char** argv);

/// What options call modes and granularities: mode_name() and granularity_name(), inverted.
const std::map<std::string, Mode>& modes_by_name();
const std::map<std::string, Granularity>& granularities_by_name();

/// Of --device: cpu or cuda; what asks for several GPUs is told where to find them.
CLI::Validator one_device();

/// One line for people: CPU, features, threads.
std::string device_summary();

/// True after Ctrl-C (SIGINT) or SIGTERM. Long loops ask and stop with kExitInterrupted.
bool interrupted();
void install_signal_handlers();

enum class ProgressMode { automatic, always, never };
void add_progress_option(CLI::App& command, ProgressMode& mode);

/// Progress on stderr: rewritten in place on a terminal, else one line every few seconds.
///   layer 13/32  42%|####   | [00:12<00:18, 1.1 layer/s] down_proj 31.2 dB
class Progress {
 public:
  Progress(ProgressMode mode, std::string unit, int64_t total);
  ~Progress();                            // clears or ends the line
  void advance(const std::string& note);  // one unit done

 private:
  void draw(const std::string& note, bool last);
  bool enabled_, terminal_;
  std::string unit_;
  int64_t total_, done_ = 0;
  double start_, last_draw_ = 0;
};

}  // namespace nibble::cli
