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
  [[noreturn]] void fail(const char* step) const;

  std::filesystem::path target_;
  std::filesystem::path temporary_;  // empty once renamed
  int descriptor_ = -1;
};

// Writes `contents` to `target` by an AtomicFile.
void write_file(const std::filesystem::path& target, std::string_view contents);

// Flushes a folder's entries to the disk, so that a rename in it survives a power cut.
void sync_folder(const std::filesystem::path& folder);

}  // namespace twell::app
