#pragma once

#include <ATen/record_function.h>

#include <atomic>
#include <memory>
#include <set>
#include <string>

namespace twell::app {

// Counts the calls of PyTorch's operators by name while it lives, those from inside `except` left
// out. One at a time.
class CallCounter {
 public:
  explicit CallCounter(std::set<std::string> names, std::string except = "") {
    names_ = std::move(names);
    except_ = std::move(except);
    count_ = 0;
    handle_ = at::addGlobalCallback(at::RecordFunctionCallback(enter, leave));
  }
  ~CallCounter() { at::removeCallback(handle_); }
  CallCounter(const CallCounter&) = delete;
  CallCounter& operator=(const CallCounter&) = delete;

  int64_t count() const { return count_; }

 private:
  static std::unique_ptr<at::ObserverContext> enter(const at::RecordFunction& call) {
    if (except_ == call.name()) ++excepted_;
    if (excepted_ == 0 && names_.contains(call.name())) ++count_;
    return nullptr;
  }
  static void leave(const at::RecordFunction& call, at::ObserverContext*) {
    if (except_ == call.name()) --excepted_;
  }

  static inline std::set<std::string> names_;
  static inline std::string except_;
  static inline std::atomic<int64_t> count_ = 0;
  static inline thread_local int excepted_ = 0;
  at::CallbackHandle handle_ = 0;
};

}  // namespace twell::app
