#pragma once

#include <chrono>
#include <string>

namespace twell::app {

// Progress on standard error: a bar that is redrawn in place on a terminal, else a plain line now
// and then. `text` is free ("loss 3.21, active 52.1").
class Progress {
 public:
  // `title` starts every line. `done` is the part that an earlier run has done, in [0, 1].
  explicit Progress(std::string title, double done = 0);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // `done` in [0, 1]. Draws only if the last drawing was long enough ago.
  void update(double done, const std::string& text);
  // Draws a last time and ends the line.
  void finish(const std::string& text);

 private:
  using Clock = std::chrono::steady_clock;
  void draw(double done, const std::string& text);

  std::string title_;
  double first_;
  bool terminal_;
  bool open_ = false;  // the bar's line has not been ended
  Clock::time_point start_;
  Clock::time_point drawn_;
};

// "1:23" or "1:02:03".
std::string format_seconds(double seconds);

}  // namespace twell::app
