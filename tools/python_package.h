// Where the Python packages that belong to this tool lie, and an interpreter for them.
#pragma once

#include <string>

#include "base/status.h"

namespace nibble::cli {

/// The directory that holds `package`: in the installed tree of this program, else in the source
/// tree. Fails with where it looked.
Result<std::string> find_python_package(const std::string& package);

/// $NIBBLE_PYTHON, else the virtual environment of the source tree, else the system's.
std::string python_interpreter();

}  // namespace nibble::cli
