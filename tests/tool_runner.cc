#include "tool_runner.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>

#include "base/check.h"
#include "checkpoint_builder.h"

namespace nibble::test {

int open_or_die(const std::string& path, int flags) {
  const int fd = ::open(path.c_str(), flags | O_CLOEXEC, 0600);
  NIBBLE_CHECK(fd >= 0);
  return fd;
}

pid_t start_tool(const std::vector<std::string>& arguments, int out, int err,
                 const std::string& kernel, const std::string& stdin_path) {
  std::vector<std::string> words = {NIBBLE_CLI};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  const pid_t child = ::fork();
  NIBBLE_CHECK(child >= 0);
  if (child != 0) return child;
  const int in = open_or_die(stdin_path, O_RDONLY);
  // Whoever started the tests may have had them ignored.
  ::signal(SIGINT, SIG_DFL);
  ::signal(SIGPIPE, SIG_DFL);
  ::unsetenv("NIBBLE_KERNEL");
  if (!kernel.empty()) ::setenv("NIBBLE_KERNEL", kernel.c_str(), 1);
  ::dup2(in, STDIN_FILENO);
  ::dup2(out, STDOUT_FILENO);
  ::dup2(err, STDERR_FILENO);
  ::execv(argv[0], argv.data());
  ::_exit(127);
}

int wait_for(pid_t child) {
  int status = 0;
  while (::waitpid(child, &status, 0) < 0) NIBBLE_CHECK(errno == EINTR);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

Outcome run_tool(const std::vector<std::string>& arguments, const Setting& setting) {
  TempDir dir;
  const bool redirected = !setting.stdout_path.empty();
  const int out = redirected ? open_or_die(setting.stdout_path, O_WRONLY)
                             : open_or_die(dir.file("out"), O_RDWR | O_CREAT);
  const int err = open_or_die(dir.file("err"), O_RDWR | O_CREAT);
  Outcome outcome;
  outcome.code = wait_for(start_tool(arguments, out, err, setting.kernel, setting.stdin_path));
  ::close(out);
  ::close(err);
  if (!redirected) outcome.out = read_text(dir.file("out"));
  outcome.err = read_text(dir.file("err"));
  return outcome;
}

nlohmann::json parse_output(const Outcome& outcome) {
  const auto document = nlohmann::json::parse(outcome.out, nullptr, false);
  EXPECT_FALSE(document.is_discarded()) << outcome.out << outcome.err;
  return document;
}

}  // namespace nibble::test
