// nibble report: one self-contained HTML page from the JSON of other subcommands. The page is made
// by the Python package python/nibble_report; this finds it and an interpreter, and becomes that.
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>

#include "cli.h"
#include "python_package.h"

namespace nibble::cli {
namespace {

struct Options {
  std::vector<std::string> runs;
  std::string output = "report.html", title;
};

constexpr const char* kPackage = "nibble_report";

/// Returns only if Python cannot be started.
int run_report(const Options& options) {
  const Result<std::string> directory = find_python_package(kPackage);
  if (!directory.ok()) return fail(directory.status());
  const std::string python = python_interpreter();
  // "--output=NAME", so that no name is taken for an option.
  std::vector<std::string> words = {python,     "-c",     kRunModule,
                                    *directory, kPackage, "--output=" + options.output};
  if (!options.title.empty()) words.push_back("--title=" + options.title);
  words.push_back("--");
  words.insert(words.end(), options.runs.begin(), options.runs.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  ::execvp(argv[0], argv.data());
  return fail(Status(
      Code::unsupported,
      fmt::format("cannot start {}: {}. The report needs Python 3.11 or newer with the packages of "
                  "{}: install python3 and python3-venv, or set NIBBLE_PYTHON to an interpreter",
                  python, std::strerror(errno), *directory + "/requirements-report.txt")));
}

}  // namespace

void add_report_command(CLI::App& app, int& exit_code) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("report", "Make one HTML page from the JSON of other subcommands");
  command
      ->add_option("RUN.json", options->runs,
                   "output of verify, perplexity, bench, plan, doctor, inspect (--json or --output "
                   "json, jsonl), or the config.json of a model with a plan")
      ->required();
  command->add_option("-o,--output", options->output, "the page")
      ->type_name("FILE")
      ->capture_default_str();
  command->add_option("--title", options->title, "title instead of the models' names");
  command->footer(
      "The page needs no network. It is made by Python with matplotlib: $NIBBLE_PYTHON, else\n"
      "build/venv/bin/python of the source tree, else python3.\n"
      "Exit codes: 0 ok, 3 Python or a package is missing, 4 a file is no output of nibble.\n"
      "\nExample:\n  nibble verify DIR --json > verify.json\n"
      "  nibble report verify.json -o report.html");
  command->callback([options, &exit_code] { exit_code = run_report(*options); });
}

}  // namespace nibble::cli
