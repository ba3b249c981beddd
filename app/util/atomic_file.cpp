#include "app/util/atomic_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <random>

#include "app/error.h"

namespace twell::app {
namespace {

std::filesystem::path folder_of(const std::filesystem::path& file) {
  const std::filesystem::path folder = file.parent_path();
  return folder.empty() ? "." : folder;
}

}  // namespace

AtomicFile::AtomicFile(std::filesystem::path target) : target_(std::move(target)) {
  if (std::error_code ignored; std::filesystem::is_directory(target_, ignored)) {
    throw Error("cannot write " + target_.string() + ": it is a folder");
  }
  std::random_device random;
  do {  // a name of its own, so that two writers never share a temporary file
    temporary_ = folder_of(target_) /
                 ("." + target_.filename().string() + "." + std::to_string(random()) + ".tmp");
    descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  } while (descriptor_ < 0 && errno == EEXIST);
  if (descriptor_ < 0) fail("create a file");
}

AtomicFile::~AtomicFile() {
  if (descriptor_ >= 0) {
    ::close(descriptor_);
    ::unlink(temporary_.c_str());
  }
}

void AtomicFile::fail(const char* step) const {
  throw Error("cannot write " + target_.string() + ": " + step + ": " + std::strerror(errno));
}

void AtomicFile::write(const void* data, size_t bytes) {
  constexpr size_t kChunk = size_t{1} << 30;  // write calls stop short of 2 GiB
  const char* next = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = ::write(descriptor_, next, std::min(bytes, kChunk));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail("the old file, if any, is untouched");
    next += n;
    bytes -= static_cast<size_t>(n);
  }
}

void AtomicFile::commit() {
  if (::fsync(descriptor_) != 0) fail("flush");
  if (::rename(temporary_.c_str(), target_.c_str()) != 0) fail("rename");
  const int closed = ::close(descriptor_);
  descriptor_ = -1;
  if (closed != 0) fail("close");
  sync_folder(folder_of(target_));
}

void write_file(const std::filesystem::path& target, std::string_view contents) {
  AtomicFile file(target);
  file.write(contents);
  file.commit();
}

void sync_folder(const std::filesystem::path& folder) {
  const int descriptor = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  // Some file systems cannot flush folders (EINVAL): nothing better is to be had there.
  const bool failed = descriptor < 0 || (::fsync(descriptor) != 0 && errno != EINVAL);
  const int error = errno;
  if (descriptor >= 0) ::close(descriptor);
  if (failed) throw Error("cannot flush folder " + folder.string() + ": " + std::strerror(error));
}

}  // namespace twell::app
