#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace twell::app {

struct TextOptions {
  uint64_t max_document_bytes = uint64_t{1} << 28;  // a longer document is an error (or skipped)
  uint64_t max_total_bytes = uint64_t{1} << 40;     // reading stops with an Error beyond this
};

// What reading gave. Files inside folders that are not used are counted by reason ("binary",
// "not UTF-8", "empty", "too long", "hidden", "unreadable", "not a regular file").
struct TextReport {
  int64_t files = 0;
  int64_t documents = 0;
  uint64_t bytes = 0;
  std::map<std::string, int64_t> skipped;

  // "1234 documents, 56.7 MB in 1200 files; skipped: 3 binary, 1 empty"
  std::string summary() const;
};

struct Document {
  std::string source;  // the file, with ":LINE" for .jsonl
  std::string text;    // valid UTF-8, not empty
};

// Calls `visit` for every document of `paths`, in order. A path is
// - a file: one document. It must be non-empty UTF-8 without NUL bytes, or Error names it;
// - a .jsonl file: one document per line, the string "text" of a JSON object; empty lines are
//   allowed, and an ill-formed line is an Error that names file and line;
// - a folder: its files, recursively, ordered by path bytes. Files that are hidden, empty, binary
// or
//   not UTF-8 are skipped and counted; symbolic links to files are followed, to folders are not.
// Throws Error if a path does not exist, or if there is no document at all.
TextReport read_documents(const std::vector<std::filesystem::path>& paths,
                          const TextOptions& options, const std::function<void(Document)>& visit);

// Whether a document belongs to the held-out part: a hash of its text alone decides, so that the
// split survives reordered, added and renamed files. `fraction` in [0, 1).
bool is_heldout(std::string_view text, double fraction);

}  // namespace twell::app
