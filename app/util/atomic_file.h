#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>

namespace twell::app {

// A file that appears whole or not at all. Bytes go to a temporary file in the target's folder;
// commit() flushes it to the disk, renames it over the target and flushes the folder. Without
// commit(), or after any error (a full disk, say), the destructor removes the temporary file and
// the old target stays as it was. Every failure throws Error naming the target.
class AtomicFile {
 public:
  explicit AtomicFile(std::filesystem::path target);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* data, size_t bytes);
  void write(std::string_view text) { write(text.data(), text.size()); }
  void commit();

 private:
  std::filesystem::path target_;
  std::string temporary_;
  int descriptor_ = -1;
};

// Writes `contents` to `target` by an AtomicFile.
void write_file(const std::filesystem::path& target, std::string_view contents);

// Reads a whole regular file of at most `limit` bytes. `what` names its kind in errors
// ("config.json"). Throws Error if it is missing, not a regular file, too long or unreadable.
std::string read_file(const std::filesystem::path& path, std::string_view what, size_t limit);

}  // namespace twell::app
