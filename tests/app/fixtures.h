#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>

#include "app/error.h"

namespace twell::app {

// What tests/fixtures/make.py wrote at build time.
inline std::filesystem::path fixtures() { return TWELL_FIXTURES; }

inline std::string contents(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file.good()) << path;
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

inline void put(const std::filesystem::path& path, std::string_view text) {
  std::filesystem::create_directories(path.parent_path());
  std::ofstream(path, std::ios::binary) << text;
}

// An empty folder that is removed at the end of the test.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "twell-test-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) std::abort();
    path_ = name;
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

// The message of the Error that `run` throws; it must be one line of readable length.
inline std::string error_of(const std::function<void()>& run) {
  try {
    run();
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    EXPECT_LT(message.size(), 1000u) << message;
    return message;
  }
  return "no error";
}

// Runs tests/fixtures/check.py with PyTorch's Python; true if it exits with 0.
inline bool check_with_python(const std::string& arguments) {
  const std::string command = std::string(TWELL_PYTHON " ") + TWELL_CHECK_SCRIPT " " + arguments;
  return std::system(command.c_str()) == 0;
}

}  // namespace twell::app

// Expects an Error whose message contains `part`.
#define EXPECT_ERROR(statement, part)                                                     \
  do {                                                                                    \
    const std::string message = ::twell::app::error_of([&] { statement; });               \
    EXPECT_NE(message.find(part), std::string::npos) << message << "\n  lacks: " << part; \
  } while (false)
