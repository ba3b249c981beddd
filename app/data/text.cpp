#include "app/data/text.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "app/error.h"
#include "app/hf/json.h"
#include "app/util/file.h"
#include "app/util/utf8.h"

namespace twell::app {
namespace {

namespace fs = std::filesystem;

constexpr size_t kReadBytes = 1 << 20;

std::string size_text(uint64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f MB", static_cast<double>(bytes) / 1e6);
  return text;
}

class Reader {
 public:
  Reader(const TextOptions& options, const std::function<void(Document)>& visit)
      : options_(options), visit_(visit) {}

  void read(const fs::path& path) {
    std::error_code error;
    const fs::file_status status = fs::status(path, error);
    if (!fs::exists(status)) throw Error("no such file or folder: " + path.string());
    if (fs::is_directory(status)) {
      read_folder(path);
    } else if (path.extension() == ".jsonl") {
      read_json_lines(path);
    } else {
      const std::string problem = read_text(path);
      if (!problem.empty()) {
        throw Error("cannot use " + path.string() + " as text: it is " + problem +
                    ", but must be UTF-8 text");
      }
    }
  }

  TextReport take() { return std::move(report_); }

 private:
  // Reads one file as one document; returns why it cannot be one, or "".
  std::string read_text(const fs::path& path) {
    const InputFile file(path);
    const uint64_t size = file.size();
    if (size > options_.max_document_bytes) {
      return "over " + std::to_string(options_.max_document_bytes) + " bytes";
    }
    std::string text(size, '\0');
    text.resize(file.read_some(0, text.data(), text.size()));
    if (text.empty()) return "empty";
    if (text.find('\0') != std::string::npos) return "binary";
    if (find_invalid_utf8(text)) return "not UTF-8";
    ++report_.files;
    emit({path.string(), std::move(text)});
    return "";
  }

  void read_folder(const fs::path& folder) {
    std::vector<std::string> files;
    std::error_code error;
    fs::recursive_directory_iterator entry(folder, error);
    if (error) throw Error("cannot read folder " + folder.string() + ": " + error.message());
    for (; entry != fs::recursive_directory_iterator(); entry.increment(error)) {
      const bool folder_entry = entry->is_directory(error);
      if (entry->path().filename().string().starts_with('.')) {
        ++report_.skipped["hidden"];
        if (folder_entry) entry.disable_recursion_pending();
      } else if (folder_entry) {
        if (entry->is_symlink(error)) {
          ++report_.skipped["links to folders"];
        } else if (::access(entry->path().c_str(), R_OK | X_OK) != 0) {
          ++report_.skipped["unreadable"];
          entry.disable_recursion_pending();
        }
      } else if (!entry->is_regular_file(error)) {
        ++report_.skipped["not regular files"];
      } else if (::access(entry->path().c_str(), R_OK) != 0) {
        ++report_.skipped["unreadable"];
      } else {
        files.push_back(entry->path().string());
      }
    }
    if (error) throw Error("cannot read folder " + folder.string() + ": " + error.message());
    std::sort(files.begin(), files.end());
    for (const std::string& file : files) {
      if (fs::path(file).extension() == ".jsonl") {
        read_json_lines(file);
      } else if (const std::string problem = read_text(file); !problem.empty()) {
        ++report_.skipped[problem];
      }
    }
  }

  void read_json_lines(const fs::path& path) {
    const InputFile file(path);
    std::string buffer;  // the line so far, and what was read beyond it
    uint64_t offset = 0;
    int64_t line = 0;
    size_t searched = 0;
    ++report_.files;
    for (bool end = false; !end;) {
      const size_t before = buffer.size();
      buffer.resize(before + kReadBytes);
      const size_t got = file.read_some(offset, buffer.data() + before, kReadBytes);
      buffer.resize(before + got);
      offset += got;
      end = got < kReadBytes;
      size_t begin = 0;
      for (size_t stop; (stop = buffer.find('\n', std::max(begin, searched))) != std::string::npos;
           begin = stop + 1) {
        read_line(path, ++line, std::string_view(buffer).substr(begin, stop - begin));
      }
      buffer.erase(0, begin);
      searched = buffer.size();
      if (buffer.size() > options_.max_document_bytes) {
        throw Error(path.string() + ":" + std::to_string(line + 1) + ": the line has over " +
                    std::to_string(options_.max_document_bytes) + " bytes");
      }
    }
    if (!buffer.empty()) read_line(path, ++line, buffer);
  }

  void read_line(const fs::path& path, int64_t line, std::string_view text) {
    if (text.find_first_not_of(" \t\r") == std::string_view::npos) return;
    const std::string place = path.string() + ":" + std::to_string(line);
    const nlohmann::json document = parse_json(text, place);
    const JsonView field = JsonView(document, place)["text"];
    const std::string& content = field.string();
    if (content.empty()) {
      ++report_.skipped["empty"];
    } else {
      emit({place, content});
    }
  }

  void emit(Document document) {
    ++report_.documents;
    report_.bytes += document.text.size();
    if (report_.bytes > options_.max_total_bytes) {
      throw Error("the texts have over " + std::to_string(options_.max_total_bytes) +
                  " bytes, the limit, at " + document.source);
    }
    visit_(std::move(document));
  }

  const TextOptions& options_;
  const std::function<void(Document)>& visit_;
  TextReport report_;
};

}  // namespace

std::string TextReport::summary() const {
  std::string text = std::to_string(documents) + " documents, " + size_text(bytes) + " in " +
                     std::to_string(files) + " files";
  const char* separator = "; skipped: ";
  for (const auto& [reason, count] : skipped) {
    text += separator + std::to_string(count) + " " + reason;
    separator = ", ";
  }
  return text;
}

TextReport read_documents(const std::vector<std::filesystem::path>& paths,
                          const TextOptions& options, const std::function<void(Document)>& visit) {
  if (paths.empty()) throw Error("no text given: name files, folders or .jsonl files");
  Reader reader(options, visit);
  for (const fs::path& path : paths) reader.read(path);
  TextReport report = reader.take();
  if (report.documents == 0) throw Error("no text found in the given paths: " + report.summary());
  return report;
}

bool is_heldout(std::string_view text, double fraction) {
  uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  // Spreads the last bytes' influence over the high bits: the finalizer of MurmurHash3.
  hash = (hash ^ hash >> 33) * 0xff51afd7ed558ccd;
  hash = (hash ^ hash >> 33) * 0xc4ceb9fe1a85ec53;
  hash ^= hash >> 33;
  return static_cast<double>(hash >> 11) * 0x1p-53 < fraction;
}

}  // namespace twell::app
