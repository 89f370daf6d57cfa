#include "peer_spec.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>

#include "python_package.h"

namespace nibble::cli {
namespace {

constexpr const char* kPackage = "nibble_peers";
constexpr std::string_view kExec = "exec:";

struct Kind {
  const char* name;      // also its module: nibble_peers.<name>_peer
  const char* argument;  // what follows the equals sign
  bool is_interpreter;   // the argument is the Python that has the library; else it is passed on
};
constexpr Kind kKinds[] = {
    {"ggml", "DIRECTORY of libggml-base.so and libggml-cpu.so", false},
    {"onnxruntime", "PYTHON that has onnxruntime, onnx and numpy", true},
    {"openvino", "PYTHON that has openvino and numpy", true},
    {"humming", "PYTHON that has humming-kernels, torch and numpy; --device cuda", true},
};

Result<std::vector<std::string>> argv_of(const std::string& name, const std::string& argument) {
  if (argument.starts_with(kExec)) return std::vector{argument.substr(kExec.size())};
  const Kind* kind = std::find_if(std::begin(kKinds), std::end(kKinds),
                                  [&](const Kind& k) { return name == k.name; });
  if (kind == std::end(kKinds)) {
    return Status(Code::invalid_argument,
                  fmt::format("no peer is named '{}': expected\n{}", name, peer_kinds()));
  }
  const Result<std::string> directory = find_python_package(kPackage);
  if (!directory.ok()) return directory.status();
  const std::string python = kind->is_interpreter ? argument : python_interpreter();
  std::vector<std::string> argv = {python, "-c", kRunModule, *directory,
                                   fmt::format("{}.{}_peer", kPackage, name)};
  if (!kind->is_interpreter) argv.push_back(argument);
  return argv;
}

}  // namespace

std::string peer_kinds() {
  std::string text;
  for (const Kind& kind : kKinds) text += fmt::format("  {}={}\n", kind.name, kind.argument);
  return text + fmt::format("  NAME={}PROGRAM, a worker that speaks the protocol", kExec);
}

Result<std::vector<PeerSpec>> parse_peers(const std::vector<std::string>& texts) {
  std::vector<PeerSpec> specs;
  for (const std::string& text : texts) {
    const size_t equals = text.find('=');
    const std::string name = text.substr(0, equals);
    if (equals == std::string::npos || name.empty() || equals + 1 == text.size()) {
      return Status(
          Code::invalid_argument,
          fmt::format("--peers '{}': expected NAME=WHAT, such as\n{}", text, peer_kinds()));
    }
    Result<std::vector<std::string>> argv = argv_of(name, text.substr(equals + 1));
    if (!argv.ok()) return argv.status();
    const auto same = std::count_if(specs.begin(), specs.end(), [&](const PeerSpec& spec) {
      return spec.label == name || spec.label.starts_with(name + "#");
    });
    specs.push_back({same == 0 ? name : fmt::format("{}#{}", name, same + 1), std::move(*argv)});
  }
  return specs;
}

}  // namespace nibble::cli
