#pragma once
// Errors are values: no function of the core throws, prints or exits.

#include <string>
#include <utility>
#include <variant>

namespace twell {

enum class StatusCode {
  kOk,
  kInvalidArgument,  // the caller passed something that no device accepts
  kUnsupported,      // valid in itself, but not offered for this device, type or size
  kCorrupt,          // a buffer's contents contradict its format
  kDevice,           // the device reported an error
};

class [[nodiscard]] Status {
 public:
  Status() = default;  // ok
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  // One line that names the argument, its value and what is permitted.
  const std::string& message() const { return message_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

// Either a value or the Status that says why there is none.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : held_(std::move(value)) {}         // NOLINT: implicit by design
  Result(Status status) : held_(std::move(status)) {}  // NOLINT: implicit by design

  bool ok() const { return std::holds_alternative<T>(held_); }
  Status status() const { return ok() ? Status() : std::get<Status>(held_); }
  const T& value() const& { return std::get<T>(held_); }
  T&& value() && { return std::get<T>(std::move(held_)); }
  const T* operator->() const { return &std::get<T>(held_); }

 private:
  std::variant<T, Status> held_;
};

}  // namespace twell
