// The command-line tool `nibble`: subcommands, --version, and the one place where exceptions and a
// failing stdout become exit codes (cli.h lists them). Each subcommand lives in its own file; start
// reading at its add_*_command().
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <iostream>
#include <new>
#include <system_error>

#include "cli.h"

namespace nibble::cli {
namespace {

std::string version_text() {
  const char* commit = NIBBLE_COMMIT;
  return fmt::format("nibble {} (commit {})", NIBBLE_VERSION, *commit == '\0' ? "unknown" : commit);
}

/// "nibble bench gemm": the deepest subcommand that was named.
std::string chosen_command(const CLI::App& app) {
  std::string text = "nibble";
  const CLI::App* at = &app;
  while (!at->get_subcommands().empty()) {
    at = at->get_subcommands().front();
    text += ' ' + at->get_name();
  }
  return text;
}

int parse_and_run(CLI::App& app, int argc, char** argv, const int& exit_code) {
  try {
    app.parse(argc, argv);
    return exit_code;
  } catch (const CLI::RuntimeError& error) {  // a callback's own exit code
    return error.get_exit_code();
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help and --version
    return fail(Status(Code::invalid_argument,
                       fmt::format("{}\nSee '{} --help'.", error.what(), chosen_command(app))));
  }
}

/// parse_and_run with everything that may be thrown turned into a message and an exit code.
int run_guarded(CLI::App& app, int argc, char** argv, const int& exit_code) {
  try {
    return parse_and_run(app, argc, argv, exit_code);
  } catch (const std::bad_alloc&) {
    return fail(Status(Code::out_of_memory, "out of memory"));
  } catch (const std::system_error& error) {
    // fmt throws this when a write fails; for stdout the message is main's.
    if (std::ferror(stdout) != 0) return kExitBadFile;
    return fail(Status(Code::io_error, error.what()));
  } catch (const std::exception& error) {
    return fail(Status(Code::unsupported, fmt::format("internal error: {}", error.what())));
  }
}

/// What was printed must have arrived: a report cut short by a full disk is no report.
int check_stdout(int exit_code) {
  std::cout.flush();
  errno = 0;
  const bool flushed = std::fflush(stdout) == 0;
  const int reason = errno;
  if (flushed && std::ferror(stdout) == 0) return exit_code;
  std::fprintf(stderr, "nibble: error: cannot write to standard output%s%s\n",
               flushed || reason == 0 ? "" : ": ",
               flushed || reason == 0 ? "" : std::strerror(reason));
  return exit_code == kExitOk || exit_code == kExitFailed ? kExitBadFile : exit_code;
}

/// The BLAS libraries that `verify` and `bench` compare with run on OpenMP, whose idle threads spin
/// for milliseconds on the CPUs of whatever is timed next. OpenMP reads the wish for sleeping ones
/// once, before main: so the program starts itself again with it, unless the user has a wish.
void let_openmp_sleep(char** argv) {
  const bool compares = argv[0] != nullptr && argv[1] != nullptr &&
                        (std::strcmp(argv[1], "verify") == 0 || std::strcmp(argv[1], "bench") == 0);
  if (!compares || std::getenv("OMP_WAIT_POLICY") != nullptr) return;
  if (setenv("OMP_WAIT_POLICY", "passive", 0) == 0) execv("/proc/self/exe", argv);
  // A system that refuses costs accuracy of the timing, no more.
}

int run_tool(int argc, char** argv) {
  let_openmp_sleep(argv);
  install_signal_handlers();
  set_command_line(argc, argv);
  CLI::App app("Runs AutoAWQ 4-bit checkpoints with quantized activations on CPUs.", "nibble");
  app.set_help_flag("-h,--help", "show this help and exit");
  app.set_version_flag("--version", version_text(), "show version and commit and exit");
  app.require_subcommand(1);
  app.get_formatter()->column_width(34);
  app.footer(
      "Each subcommand has its own --help. Exit codes: 0 ok, 1 a check failed, 2 usage,\n"
      "3 unsupported model or device, 4 missing or corrupt file, 130 interrupted.\n"
      "Environment: NIBBLE_KERNEL forces kernels by name (see `nibble doctor`).");
  int exit_code = kExitOk;
  add_bench_command(app, exit_code);
  add_calibrate_command(app, exit_code);
  add_doctor_command(app, exit_code);
  add_generate_command(app, exit_code);
  add_inspect_command(app, exit_code);
  add_perplexity_command(app, exit_code);
  add_plan_command(app, exit_code);
  add_quantize_command(app, exit_code);
  add_report_command(app, exit_code);
  add_verify_command(app, exit_code);
  return check_stdout(run_guarded(app, argc, argv, exit_code));
}

}  // namespace
}  // namespace nibble::cli

int main(int argc, char** argv) { return nibble::cli::run_tool(argc, argv); }
