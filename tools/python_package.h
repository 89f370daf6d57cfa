// Where the Python packages that belong to this tool lie, and an interpreter for them.
#pragma once

#include <string>

#include "base/status.h"

namespace nibble::cli {

/// The directory that holds `package`: in the installed tree of this program, else in the source
/// tree. Fails with where it looked.
Result<std::string> find_python_package(const std::string& package);

/// python -c kRunModule DIRECTORY MODULE ARGUMENTS...: as python -m MODULE, but the directory of
/// its package takes the place of the working directory, where nothing must be imported from.
inline constexpr const char* kRunModule =
    "import runpy, sys\n"
    "sys.path[0] = sys.argv.pop(1)\n"
    "sys.dont_write_bytecode = True\n"
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)\n";

/// $NIBBLE_PYTHON, else the virtual environment of the source tree, else the system's.
std::string python_interpreter();

}  // namespace nibble::cli
