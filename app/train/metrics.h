#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>

namespace twell::app {

// A JSON-lines file: one object with a "step" per line.
class Metrics {
 public:
  // Opens `path` and drops what follows the last whole line with a step of at most `last_step`
  // (all of it if that is negative): what a killed run wrote after its checkpoint.
  Metrics(std::filesystem::path path, int64_t last_step);
  ~Metrics();
  Metrics(const Metrics&) = delete;
  Metrics& operator=(const Metrics&) = delete;

  void write(const nlohmann::ordered_json& line);  // Error if the disk is full
  void flush_to_disk();                            // before a checkpoint that counts on them

 private:
  std::filesystem::path path_;
  int descriptor_ = -1;
};

}  // namespace twell::app
