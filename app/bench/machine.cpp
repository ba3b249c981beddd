#include "app/bench/machine.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <torch/version.h>

#include <cstdlib>
#include <ctime>
#include <fstream>
#include <string>

#include "twell/device.h"

namespace twell::app {
namespace {

std::string cpu_model() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (!line.starts_with("model name")) continue;
    const std::size_t value = line.find(": ");
    if (value != std::string::npos) return line.substr(value + 2);
  }
  return "unknown";
}

std::string commit() {
  const char* name = std::getenv("TWELL_COMMIT");
  return name != nullptr ? name : "unknown";
}

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&now));
  return text;
}

}  // namespace

nlohmann::ordered_json describe_machine(const torch::Device& device) {
  return {{"cpu", cpu_model()},
          {"isa", name_of(detect_cpu_isa())},
          {"threads", at::get_num_threads()},
          {"device", device.str()},
          {"torch_cpu_capability", at::get_cpu_capability()},
          {"twell", TWELL_VERSION},
          {"torch", TORCH_VERSION},
          {"compiler", "g++ " __VERSION__},
          {"commit", commit()},
          {"date", utc_now()}};
}

}  // namespace twell::app
