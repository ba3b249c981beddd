#include "app/train/metrics.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <string>
#include <utility>

#include "app/error.h"

namespace twell::app {
namespace {

// The bytes of the leading lines whose step is at most `last_step`.
int64_t kept_bytes(const std::filesystem::path& path, int64_t last_step) {
  std::ifstream file(path, std::ios::binary);
  int64_t bytes = 0;
  for (std::string line; std::getline(file, line) && !file.eof();) {
    const auto object = nlohmann::json::parse(line, nullptr, false);
    if (!object.is_object() || !object.contains("step") || !object["step"].is_number_integer() ||
        object["step"].get<int64_t>() > last_step) {
      break;
    }
    bytes += static_cast<int64_t>(line.size()) + 1;
  }
  return bytes;
}

}  // namespace

Metrics::Metrics(std::filesystem::path path, int64_t last_step) : path_(std::move(path)) {
  descriptor_ = open(path_.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
  if (descriptor_ < 0 || ftruncate(descriptor_, kept_bytes(path_, last_step)) != 0 ||
      lseek(descriptor_, 0, SEEK_END) < 0) {
    const int error = errno;
    if (descriptor_ >= 0) close(descriptor_);
    throw Error(path_.string() + ": cannot be written: " + std::strerror(error));
  }
}

Metrics::~Metrics() { close(descriptor_); }

void Metrics::write(const nlohmann::ordered_json& line) {
  const std::string text = line.dump() + "\n";
  for (size_t done = 0; done < text.size();) {
    const ssize_t written = ::write(descriptor_, text.data() + done, text.size() - done);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) throw Error(path_.string() + ": cannot be written: " + std::strerror(errno));
    done += static_cast<size_t>(written);
  }
}

void Metrics::flush_to_disk() {
  if (fdatasync(descriptor_) != 0) {
    throw Error(path_.string() + ": cannot be written: " + std::strerror(errno));
  }
}

}  // namespace twell::app
