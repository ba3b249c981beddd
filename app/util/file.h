#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>

namespace twell::app {

// A regular file open for reading. Every failure throws Error naming the file.
class InputFile {
 public:
  explicit InputFile(std::filesystem::path path);  // also refuses folders, pipes and devices
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  const std::filesystem::path& path() const { return path_; }
  int descriptor() const { return descriptor_; }
  uint64_t size() const;  // now, not at opening

  // Up to `bytes` bytes from `offset`; fewer only at the end of the file.
  size_t read_some(uint64_t offset, void* data, size_t bytes) const;
  // Exactly `bytes` bytes, or an Error that the file has become shorter.
  void read(uint64_t offset, void* data, size_t bytes) const;

 private:
  std::filesystem::path path_;
  int descriptor_ = -1;
};

// Reads a whole regular file of at most `limit` bytes, or throws Error.
std::string read_file(const std::filesystem::path& path, uint64_t limit);

}  // namespace twell::app
