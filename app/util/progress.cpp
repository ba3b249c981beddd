#include "app/util/progress.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <utility>

namespace twell::app {
namespace {

constexpr size_t kBarWidth = 24;
constexpr auto kTerminalInterval = std::chrono::milliseconds(200);
constexpr auto kLogInterval = std::chrono::seconds(10);

size_t terminal_columns() {
  winsize size{};
  return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 20 ? size.ws_col : 80;
}

}  // namespace

std::string format_seconds(double seconds) {
  const auto total = static_cast<long>(std::lround(std::max(0.0, seconds)));
  char text[32];
  if (total >= 3600) {
    std::snprintf(text, sizeof text, "%ld:%02ld:%02ld", total / 3600, total / 60 % 60, total % 60);
  } else {
    std::snprintf(text, sizeof text, "%ld:%02ld", total / 60, total % 60);
  }
  return text;
}

Progress::Progress(std::string title, double done)
    : title_(std::move(title)),
      first_(done),
      terminal_(isatty(STDERR_FILENO) == 1),
      start_(Clock::now()),
      drawn_(start_) {}

Progress::~Progress() {
  if (open_) std::fputc('\n', stderr);
}

void Progress::update(double done, const std::string& text) {
  const auto now = Clock::now();
  if (now - drawn_ < (terminal_ ? Clock::duration(kTerminalInterval) : kLogInterval)) return;
  drawn_ = now;
  draw(std::clamp(done, 0.0, 1.0), text);
}

void Progress::finish(const std::string& text) {
  draw(1, text);
  if (terminal_) std::fputc('\n', stderr);
  open_ = false;
}

void Progress::draw(double done, const std::string& text) {
  const double elapsed = std::chrono::duration<double>(Clock::now() - start_).count();
  std::string line = title_ + " ";
  if (terminal_) {
    const auto filled = static_cast<size_t>(done * kBarWidth);
    line.append("[").append(filled, '#').append(kBarWidth - filled, '.').append("] ");
  }
  char percent[16];
  std::snprintf(percent, sizeof percent, "%3.0f%%", 100 * done);
  line += percent;
  if (!text.empty()) line += ", " + text;
  if (done > first_ && done < 1) {
    line += ", " + format_seconds(elapsed * (1 - done) / (done - first_)) + " left";
  } else if (done >= 1) {
    line += ", " + format_seconds(elapsed);
  }
  if (terminal_) {
    line.resize(std::min(line.size(), terminal_columns() - 1));
    std::fprintf(stderr, "\r\033[K%s", line.c_str());
    open_ = true;
  } else {
    std::fprintf(stderr, "%s\n", line.c_str());
  }
  std::fflush(stderr);
}

}  // namespace twell::app
