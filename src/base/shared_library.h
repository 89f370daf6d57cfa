// Libraries that are opened at run time, because the program is to start without them.
#pragma once

#include <dlfcn.h>

#include <memory>
#include <string>
#include <vector>

#include "base/status.h"

namespace nibble {

/// Closed on destruction, so what its functions made is to be destroyed before.
class SharedLibrary {
 public:
  SharedLibrary() = default;

  /// The first of `names` that can be opened; unsupported, with the loader's words about each.
  static Result<SharedLibrary> open(const std::vector<std::string>& names) {
    SharedLibrary library;
    std::string problem;
    for (const std::string& name : names) {
      library.handle_.reset(dlopen(name.c_str(), RTLD_NOW));
      if (library.handle_ != nullptr) return library;
      problem += std::string(problem.empty() ? "" : "; ") + dlerror();
    }
    return Status(Code::unsupported, problem);
  }

  /// False if it has no function of that name.
  template <class Function>
  bool find(Function& function, const char* name) const {
    function = reinterpret_cast<Function>(dlsym(handle_.get(), name));
    return function != nullptr;
  }

 private:
  struct Close {
    void operator()(void* handle) const { dlclose(handle); }
  };
  std::unique_ptr<void, Close> handle_;
};

}  // namespace nibble
