#include "app/hf/json.h"

#include <sstream>
#include <vector>

#include "app/error.h"

namespace twell::app {
namespace {

using nlohmann::json;

// Builds the document while parsing: the library's own builder keeps the last of duplicate keys and
// has no limit of depth.
class Builder : public nlohmann::json_sax<json> {
 public:
  Builder(const std::string& name, size_t max_depth) : name_(name), max_depth_(max_depth) {}

  json take() { return std::move(root_); }

  bool null() override { return add(nullptr); }
  bool boolean(bool value) override { return add(value); }
  bool number_integer(number_integer_t value) override { return add(value); }
  bool number_unsigned(number_unsigned_t value) override { return add(value); }
  bool number_float(number_float_t value, const string_t&) override { return add(value); }
  bool string(string_t& value) override { return add(std::move(value)); }
  bool binary(binary_t&) override { return false; }  // not in JSON text
  bool start_object(size_t) override { return open(json::object()); }
  bool start_array(size_t) override { return open(json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }

  bool key(string_t& value) override {
    const auto [member, added] = open_.back()->get_ref<json::object_t&>().emplace(value, nullptr);
    if (!added) throw Error(name_ + " has the key " + quote(value) + " twice in one object");
    slot_ = &member->second;
    return true;
  }

  bool parse_error(size_t byte, const std::string&, const json::exception& error) override {
    const bool overflow = dynamic_cast<const json::out_of_range*>(&error) != nullptr;
    throw Error(name_ + (overflow ? " has a number out of range" : " is not valid JSON") +
                " at byte " + std::to_string(byte));
  }

 private:
  // Puts `value` at the place that is next in the innermost open object or array.
  json* place(json&& value) {
    if (open_.empty()) return &(root_ = std::move(value));
    if (open_.back()->is_object()) return &(*slot_ = std::move(value));
    auto& elements = open_.back()->get_ref<json::array_t&>();
    return &elements.emplace_back(std::move(value));
  }
  bool add(json&& value) {
    place(std::move(value));
    return true;
  }
  bool open(json&& value) {
    if (open_.size() == max_depth_) {
      throw Error(name_ + " nests objects and arrays deeper than " + std::to_string(max_depth_));
    }
    open_.push_back(place(std::move(value)));
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }

  const std::string& name_;
  const size_t max_depth_;
  json root_;
  std::vector<json*> open_;
  json* slot_ = nullptr;  // of the key just read
};

std::string describe(const json& value) {
  switch (value.type()) {
    case json::value_t::object:
      return "an object";
    case json::value_t::array:
      return "an array of " + std::to_string(value.size());
    case json::value_t::string:
      return quote(value.get_ref<const std::string&>());
    default:
      return value.dump();
  }
}

std::string shown(double value) {
  std::ostringstream text;
  text << value;
  return text.str();
}

}  // namespace

json parse_json(std::string_view text, const std::string& name, size_t max_depth) {
  Builder builder(name, max_depth);
  json::sax_parse(text, &builder);
  return builder.take();
}

std::string JsonView::place() const { return path_.empty() ? file_ : file_ + ": " + quote(path_); }

const json& JsonView::object() const {
  if (!value_->is_object()) refuse("an object");
  return *value_;
}

bool JsonView::has(const std::string& key) const {
  const auto member = object().find(key);
  return member != value_->end() && !member->is_null();
}

JsonView JsonView::operator[](const std::string& key) const {
  const auto member = object().find(key);
  if (member == value_->end()) fail("has no " + quote(key));
  return {*member, file_, path_.empty() ? key : path_ + "." + key};
}

std::optional<JsonView> JsonView::find(const std::string& key) const {
  if (!has(key)) return std::nullopt;
  return (*this)[key];
}

size_t JsonView::size() const {
  if (!value_->is_array()) refuse("an array");
  return value_->size();
}

JsonView JsonView::operator[](size_t index) const {
  return {(*value_)[index], file_, path_ + "[" + std::to_string(index) + "]"};
}

const std::string& JsonView::string() const {
  if (!value_->is_string()) refuse("a string");
  return value_->get_ref<const std::string&>();
}

bool JsonView::boolean() const {
  if (!value_->is_boolean()) refuse("true or false");
  return value_->get<bool>();
}

int64_t JsonView::integer(int64_t min, int64_t max) const {
  const bool fits = value_->is_number_unsigned()
                        ? value_->get<uint64_t>() <= static_cast<uint64_t>(INT64_MAX)
                        : value_->is_number_integer();
  const int64_t number = fits ? value_->get<int64_t>() : 0;
  if (!fits || number < min || number > max) {
    refuse("an integer from " + std::to_string(min) + " to " + std::to_string(max));
  }
  return number;
}

double JsonView::number(double min, double max) const {
  const double number = value_->is_number() ? value_->get<double>() : 0;
  if (!value_->is_number() || number < min || number > max) {
    refuse("a number from " + shown(min) + " to " + shown(max));
  }
  return number;
}

void JsonView::only(const std::set<std::string_view>& known) const {
  for (const auto& member : object().items()) {
    if (!known.contains(member.key())) {
      fail("has " + quote(member.key()) + " = " + describe(member.value()) +
           ", which is not supported");
    }
  }
}

void JsonView::refuse(const std::string& permitted) const {
  fail("is " + describe(*value_) + ", but must be " + permitted);
}

void JsonView::fail(const std::string& problem) const { throw Error(place() + " " + problem); }

}  // namespace twell::app
