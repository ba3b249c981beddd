#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>

namespace twell::app {

// Parses one JSON text strictly: well-formed UTF-8, no duplicate keys, no number that overflows, at
// most `max_depth` nested objects and arrays. Throws Error with `name` (a file) and the byte.
nlohmann::json parse_json(std::string_view text, const std::string& name, size_t max_depth = 32);

// A JSON value together with its place, for typed access. Every failure throws Error such as
// `config.json: "hidden_size" is -3, but must be an integer from 1 to 65536`.
class JsonView {
 public:
  // `file` names the document; the view keeps a reference to `value`.
  JsonView(const nlohmann::json& value, std::string file) : JsonView(value, std::move(file), "") {}

  const nlohmann::json& value() const { return *value_; }
  std::string place() const;  // `config.json: "hidden_size"`

  bool has(const std::string& key) const;             // present and not null
  JsonView operator[](const std::string& key) const;  // the member, which must be present
  std::optional<JsonView> find(
      const std::string& key) const;  // the member, if present and not null

  size_t size() const;                      // of an array
  JsonView operator[](size_t index) const;  // of an array

  const std::string& string() const;
  bool boolean() const;
  int64_t integer(int64_t min, int64_t max) const;
  double number(double min, double max) const;

  // Refuses members of this object that are not in `known`.
  void only(const std::set<std::string_view>& known) const;
  // Throws Error: PLACE is VALUE, but must be `permitted`.
  [[noreturn]] void refuse(const std::string& permitted) const;
  // Throws Error: PLACE `problem`.
  [[noreturn]] void fail(const std::string& problem) const;

 private:
  JsonView(const nlohmann::json& value, std::string file, std::string path)
      : value_(&value), file_(std::move(file)), path_(std::move(path)) {}
  const nlohmann::json& object() const;

  const nlohmann::json* value_;
  std::string file_;
  std::string path_;  // "model.merges[3]", empty for the document itself
};

}  // namespace twell::app
