#include "app/util/atomic_file.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "app/util/file.h"
#include "tests/app/fixtures.h"

namespace twell::app {
namespace {

size_t entries(const std::filesystem::path& folder) {
  return static_cast<size_t>(std::distance(std::filesystem::directory_iterator(folder), {}));
}

// Makes every write beyond `bytes` fail, as a full disk does.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) {
    handler_ = signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &old_);
    const rlimit limit{bytes, old_.rlim_max};
    setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() {
    setrlimit(RLIMIT_FSIZE, &old_);
    signal(SIGXFSZ, handler_);
  }

 private:
  rlimit old_;
  void (*handler_)(int);
};

TEST(AtomicFile, WritesAndReplaces) {
  const TemporaryFolder folder;
  const auto path = folder / "file";
  for (const std::string& text : {std::string("first"), std::string(3 << 20, 'x'), std::string()}) {
    write_file(path, text);
    EXPECT_EQ(contents(path), text);
    EXPECT_EQ(entries(folder.path()), 1u);
  }
}

TEST(AtomicFile, TakesTheModeOfTheProcess) {
  const TemporaryFolder folder;
  const mode_t old = umask(027);
  write_file(folder / "file", "text");
  umask(old);
  struct stat status;
  ASSERT_EQ(stat((folder / "file").c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0640u);
}

TEST(AtomicFile, WithoutCommitLeavesNothing) {
  const TemporaryFolder folder;
  write_file(folder / "file", "old");
  {
    AtomicFile file(folder / "file");
    file.write("new");
    EXPECT_EQ(entries(folder.path()), 2u);
  }
  EXPECT_EQ(contents(folder / "file"), "old");
  EXPECT_EQ(entries(folder.path()), 1u);
}

TEST(AtomicFile, TwoWritersDoNotMix) {
  const TemporaryFolder folder;
  AtomicFile first(folder / "file");
  AtomicFile second(folder / "file");
  first.write("one");
  second.write("two");
  first.commit();
  EXPECT_EQ(contents(folder / "file"), "one");
  second.commit();
  EXPECT_EQ(contents(folder / "file"), "two");
  EXPECT_EQ(entries(folder.path()), 1u);
}

TEST(AtomicFile, FullDiskKeepsTheOldFile) {
  const TemporaryFolder folder;
  write_file(folder / "file", "old");
  {
    const FileSizeLimit limit(1000);
    EXPECT_ERROR(write_file(folder / "file", std::string(5000, 'x')), "cannot write");
  }
  EXPECT_EQ(contents(folder / "file"), "old");
  EXPECT_EQ(entries(folder.path()), 1u);
}

TEST(AtomicFile, NamesWhatItCannotWrite) {
  const TemporaryFolder folder;
  EXPECT_ERROR(write_file(folder / "missing/file", "x"), "missing/file");
  EXPECT_ERROR(write_file(folder.path(), "x"), "it is a folder");
}

TEST(InputFile, RefusesWhatIsNoRegularFile) {
  const TemporaryFolder folder;
  EXPECT_ERROR(InputFile(folder / "missing"), "No such file");
  EXPECT_ERROR(InputFile(folder.path()), "not a regular file");
  ASSERT_EQ(mkfifo((folder / "pipe").c_str(), 0600), 0);
  EXPECT_ERROR(InputFile(folder / "pipe"), "not a regular file");
  EXPECT_ERROR(InputFile("/dev/zero"), "not a regular file");
}

TEST(InputFile, ReadsAtOffsetsAndNoticesTruncation) {
  const TemporaryFolder folder;
  write_file(folder / "file", "0123456789");
  const InputFile file(folder / "file");
  char buffer[10];
  file.read(3, buffer, 4);
  EXPECT_EQ(std::string_view(buffer, 4), "3456");
  EXPECT_EQ(file.read_some(8, buffer, 10), 2u);
  std::filesystem::resize_file(folder / "file", 5);
  EXPECT_ERROR(file.read(3, buffer, 4), "shorter");
  EXPECT_ERROR(read_file(folder / "file", 4), "at most 4");
  EXPECT_EQ(read_file(folder / "file", 5), "01234");
}

}  // namespace
}  // namespace twell::app
