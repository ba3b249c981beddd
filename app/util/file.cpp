#include "app/util/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "app/error.h"

namespace twell::app {

InputFile::InputFile(std::filesystem::path path) : path_(std::move(path)) {
  // O_NONBLOCK: opening a pipe must not wait for a writer; regular files ignore it.
  descriptor_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor_ < 0) throw Error("cannot read " + path_.string() + ": " + std::strerror(errno));
  struct stat status;
  if (::fstat(descriptor_, &status) != 0 || !S_ISREG(status.st_mode)) {
    ::close(descriptor_);
    throw Error("cannot read " + path_.string() + ": it is not a regular file");
  }
}

InputFile::~InputFile() { ::close(descriptor_); }

uint64_t InputFile::size() const {
  struct stat status;
  if (::fstat(descriptor_, &status) != 0) {
    throw Error("cannot read " + path_.string() + ": " + std::strerror(errno));
  }
  return static_cast<uint64_t>(status.st_size);
}

size_t InputFile::read_some(uint64_t offset, void* data, size_t bytes) const {
  constexpr size_t kChunk = size_t{1} << 30;  // read calls stop short of 2 GiB
  size_t done = 0;
  while (done < bytes) {
    const ssize_t n = ::pread(descriptor_, static_cast<char*>(data) + done,
                              std::min(bytes - done, kChunk), static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw Error("cannot read " + path_.string() + ": " + std::strerror(errno));
    if (n == 0) break;
    done += static_cast<size_t>(n);
  }
  return done;
}

void InputFile::read(uint64_t offset, void* data, size_t bytes) const {
  const size_t done = read_some(offset, data, bytes);
  if (done < bytes) {
    throw Error(path_.string() + " has become shorter while it was read: it ends at byte " +
                std::to_string(offset + done) + ", but " + std::to_string(offset + bytes) +
                " bytes are needed; write or copy it again");
  }
}

std::string read_file(const std::filesystem::path& path, uint64_t limit) {
  const InputFile file(path);
  const uint64_t size = file.size();
  if (size > limit) {
    throw Error(path.string() + " has " + std::to_string(size) + " bytes, but at most " +
                std::to_string(limit) + " are permitted");
  }
  std::string text(size, '\0');
  file.read(0, text.data(), size);
  return text;
}

}  // namespace twell::app
