#include "peer_process.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <string_view>
#include <utility>

#include "cli.h"
#include "text.h"
#include "timing.h"

namespace nibble {
namespace {

using nlohmann::json;

constexpr size_t kLongestLine = size_t{1} << 20;
constexpr double kGoodbyeSeconds = 1.0;
constexpr double kStopSeconds = 1.0;
constexpr double kPollSeconds = 0.2;  // Ctrl-C is looked for as often

struct Pipe {
  int read = -1, write = -1;
  bool open() {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0) return false;
    read = ends[0], write = ends[1];
    return true;
  }
  void close() {
    for (int* end : {&read, &write}) {
      if (*end >= 0) ::close(*end);
      *end = -1;
    }
  }
};

/// The tool's own OMP_WAIT_POLICY is for libraries that share its process; a peer is stopped
/// between its turns and may spin within them.
std::vector<char*> environment_for_peers() {
  std::vector<char*> kept;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    if (!std::string_view(*entry).starts_with("OMP_WAIT_POLICY=")) kept.push_back(*entry);
  }
  kept.push_back(nullptr);
  return kept;
}

std::string ending_text(int status) {
  return WIFSIGNALED(status) ? fmt::format("was killed by signal {}", WTERMSIG(status))
                             : fmt::format("ended with exit code {}", WEXITSTATUS(status));
}

/// Makes `fd` known as `place` to the program that is started next. dup2 alone does nothing where
/// they are the same (the tool's own stdin was closed), so that O_CLOEXEC would stay.
bool hand_over(int fd, int place) {
  return fd == place ? ::fcntl(fd, F_SETFD, 0) == 0 : ::dup2(fd, place) == place;
}

/// In the child, after fork: only calls that are safe there. Does not return.
[[noreturn]] void become(char** argv, char** environment, const Pipe& in, const Pipe& out,
                         int failure, pid_t parent) {
  ::setpgid(0, 0);  // Ctrl-C at the terminal is for the tool, which then ends its workers
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != parent) ::_exit(127);  // it died before that was set
  for (const int number : {SIGINT, SIGTERM, SIGHUP, SIGPIPE, SIGBUS}) ::signal(number, SIG_DFL);
  if (hand_over(in.read, STDIN_FILENO) && hand_over(out.write, STDOUT_FILENO)) {
    ::execvpe(argv[0], argv, environment);
  }
  const int error = errno;
  [[maybe_unused]] const ssize_t written = ::write(failure, &error, sizeof error);
  ::_exit(127);
}

}  // namespace

Result<std::unique_ptr<PeerProcess>> PeerProcess::start(const std::vector<std::string>& words) {
  std::vector<std::string> copies = words;
  std::vector<char*> argv;
  for (std::string& word : copies) argv.push_back(word.data());
  argv.push_back(nullptr);
  std::vector<char*> environment = environment_for_peers();
  Pipe in, out, failure;
  const auto refuse = [&](int error) {
    for (Pipe* pipe : {&in, &out, &failure}) pipe->close();
    return Status(Code::unsupported,
                  fmt::format("cannot start {}: {}", words[0], std::strerror(error)));
  };
  if (!in.open() || !out.open() || !failure.open()) return refuse(errno);
  const pid_t parent = ::getpid(), pid = ::fork();
  if (pid < 0) return refuse(errno);
  if (pid == 0) become(argv.data(), environment.data(), in, out, failure.write, parent);
  ::close(std::exchange(failure.write, -1));
  int error = 0;
  if (::read(failure.read, &error, sizeof error) == sizeof error) {
    ::waitpid(pid, nullptr, 0);
    return refuse(error);
  }
  failure.close();
  ::close(in.read);
  ::close(out.write);
  ::fcntl(in.write, F_SETFL, O_NONBLOCK);
  ::fcntl(out.read, F_SETFL, O_NONBLOCK);
  return std::unique_ptr<PeerProcess>(new PeerProcess(pid, in.write, out.read));
}

PeerProcess::~PeerProcess() {
  if (alive()) {
    const double deadline = now_seconds() + kGoodbyeSeconds;
    if (send("{\"op\":\"bye\"}\n", deadline).ok()) {
      ::close(std::exchange(to_, -1));
      (void)reap(deadline);
    }
    if (alive()) (void)give_up("ended");
  }
  if (to_ >= 0) ::close(to_);
  ::close(from_);
}

Status PeerProcess::pause() {
  if (!alive() || paused_) return {};
  const bool told = ::kill(-pid_, SIGSTOP) == 0;
  const double deadline = now_seconds() + kStopSeconds;
  // stopping is not immediate: the next contestant must not begin before it
  while (told) {
    if (const auto ending = reap(0)) return give_up(*ending);
    siginfo_t stopped = {};
    const int asked = ::waitid(P_PID, static_cast<id_t>(pid_), &stopped, WSTOPPED | WNOHANG);
    paused_ = asked == 0 && stopped.si_pid == pid_;
    if (paused_) return {};
    if (cli::interrupted() || now_seconds() > deadline) break;
    ::usleep(100);
  }
  return give_up("cannot be stopped");
}

void PeerProcess::resume() {
  if (!alive() || !paused_) return;
  ::kill(-pid_, SIGCONT);
  paused_ = false;
}

Status PeerProcess::give_up(const std::string& reason) {
  if (alive()) {
    ::kill(-pid_, SIGKILL);
    ::kill(pid_, SIGKILL);  // in case it left its group
    (void)reap(std::numeric_limits<double>::infinity());
  }
  reason_ = reason;
  return Status(Code::io_error, reason);
}

Status PeerProcess::closed(const char* what) {
  const auto ending = reap(now_seconds() + kGoodbyeSeconds);
  return give_up(ending ? *ending : fmt::format("closed its {}", what));
}

std::optional<std::string> PeerProcess::reap(double deadline) {
  for (;;) {
    siginfo_t ended = {};
    // it stays to be waited for, and so the number of its group is nobody else's
    const int asked = ::waitid(P_PID, static_cast<id_t>(pid_), &ended, WEXITED | WNOHANG | WNOWAIT);
    if (asked != 0) {  // where SIGCHLD is ignored, the system itself forgets what has ended
      pid_ = -1;
      return "ended";
    }
    if (ended.si_pid == pid_) break;
    if (now_seconds() >= deadline) return std::nullopt;
    ::usleep(1000);
  }
  ::kill(-pid_, SIGKILL);
  int status = 0;
  ::waitpid(std::exchange(pid_, -1), &status, 0);
  return ending_text(status);
}

Status PeerProcess::wait_ready(int fd, short events, double deadline) {
  for (;;) {
    if (cli::interrupted()) return Status(Code::interrupted, "interrupted");
    const double left = deadline - now_seconds();
    if (left <= 0) return give_up("did not answer in time");
    pollfd wanted = {fd, events, 0};
    const int ready = ::poll(&wanted, 1, static_cast<int>(std::min(left, kPollSeconds) * 1000) + 1);
    if (ready > 0) return {};
    if (ready < 0 && errno != EINTR) return give_up(std::strerror(errno));
  }
}

Status PeerProcess::send(const std::string& line, double deadline) {
  resume();
  for (size_t sent = 0; sent < line.size();) {
    NIBBLE_TRY(wait_ready(to_, POLLOUT, deadline));
    const ssize_t count = ::write(to_, line.data() + sent, line.size() - sent);
    if (count < 0 && errno == EPIPE) return closed("input");
    if (count < 0 && errno != EAGAIN && errno != EINTR) return give_up(std::strerror(errno));
    if (count > 0) sent += static_cast<size_t>(count);
  }
  return {};
}

Result<std::string> PeerProcess::receive(double deadline) {
  for (;;) {
    const size_t end = received_.find('\n');
    if (end != std::string::npos) {
      std::string line = received_.substr(0, end);
      received_.erase(0, end + 1);
      return line;
    }
    if (received_.size() > kLongestLine) return give_up("answered a line that does not end");
    NIBBLE_TRY(wait_ready(from_, POLLIN, deadline));
    char buffer[4096];
    const ssize_t count = ::read(from_, buffer, sizeof buffer);
    if (count == 0) return closed("output");
    if (count < 0 && errno != EAGAIN && errno != EINTR) return give_up(std::strerror(errno));
    if (count > 0) received_.append(buffer, static_cast<size_t>(count));
  }
}

Result<json> PeerProcess::ask(const json& request, double timeout_seconds) {
  if (!alive()) return Status(Code::io_error, reason_);
  const double deadline = now_seconds() + timeout_seconds;
  NIBBLE_TRY(send(request.dump() + "\n", deadline));
  Result<std::string> line = receive(deadline);
  if (!line.ok()) return line.status();
  json answer = json::parse(*line, nullptr, false);
  if (!answer.is_object()) {
    const std::string begin =
        json(line->substr(0, 80)).dump(-1, ' ', true, json::error_handler_t::replace);
    return give_up(fmt::format("answered {}, which is no JSON object", begin));
  }
  const auto error = answer.find("error");
  if (error != answer.end()) {
    return Status(Code::unsupported, error->is_string()
                                         ? cli::printable_text(error->get<std::string>())
                                         : error->dump(-1, ' ', true));
  }
  return answer;
}

}  // namespace nibble
