#include "python_package.h"

#include <fmt/format.h>

#include <cstdlib>
#include <filesystem>
#include <vector>

namespace nibble::cli {
namespace {

namespace fs = std::filesystem;

bool is_there(const fs::path& path) {
  std::error_code ignored;
  return fs::exists(path, ignored);
}

std::vector<fs::path> package_places() {
  std::vector<fs::path> places;
  std::error_code error;
  const fs::path self = fs::read_symlink("/proc/self/exe", error);
  if (!error) places.push_back(self.parent_path().parent_path() / "share" / "nibble");
  places.push_back(fs::path(NIBBLE_SOURCE_DIR) / "python");
  return places;
}

}  // namespace

Result<std::string> find_python_package(const std::string& package) {
  std::string looked_in;
  for (const fs::path& place : package_places()) {
    if (is_there(place / package / "__init__.py")) return place.string();
    looked_in += fmt::format("\n  {}", (place / package).string());
  }
  return Status(Code::unsupported, fmt::format("the Python package {} is not there; looked for{}",
                                               package, looked_in));
}

std::string python_interpreter() {
  const char* chosen = std::getenv("NIBBLE_PYTHON");
  if (chosen != nullptr && *chosen != '\0') return chosen;
  const fs::path venv = fs::path(NIBBLE_SOURCE_DIR) / "build" / "venv" / "bin" / "python";
  return is_there(venv) ? venv.string() : "python3";
}

}  // namespace nibble::cli
