#include "app/hf/pre_tokenizer.h"

#include <map>

namespace twell::app {
namespace {

// The pattern of ByteLevel(use_regex=true), published with GPT-2.
constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
// Digits goes by Rust's tables, which have the digits of Unicode 17 already.
constexpr std::string_view kDigitsPattern = "[\\p{N}\U00011DE0-\U00011DE9]";
constexpr size_t kMaxSteps = 64;

std::string escape(std::string_view text) {
  constexpr std::string_view kSyntax = R"(\[](){}|.^$*+?-&)";
  std::string pattern;
  for (const char c : text) {
    if (kSyntax.find(c) != std::string_view::npos) pattern += '\\';
    pattern += c;
  }
  return pattern;
}

}  // namespace

PreTokenizer::PreTokenizer(const JsonView& json) {
  add(json);
  if (!byte_level_) json.fail("has no ByteLevel; only byte-level tokenizers are supported");
}

void PreTokenizer::add(const JsonView& json) {
  const JsonView type = json["type"];
  // What follows ByteLevel would see its printable alphabet instead of the text.
  if (byte_level_) json.fail("follows ByteLevel, which is not supported");
  if (steps_.size() == kMaxSteps) json.fail("is one of too many steps");
  if (type.string() == "Sequence") {
    json.only({"type", "pretokenizers"});
    const JsonView parts = json["pretokenizers"];
    for (size_t i = 0; i < parts.size(); ++i) add(parts[i]);
  } else if (type.string() == "Split") {
    add_split(json);
  } else if (type.string() == "Digits") {
    json.only({"type", "individual_digits"});
    const bool single = json["individual_digits"].boolean();
    steps_.push_back({Regex(kDigitsPattern, "Digits"),
                      single ? Behavior::kIsolated : Behavior::kContiguous, false});
  } else if (type.string() == "ByteLevel") {
    json.only({"type", "add_prefix_space", "trim_offsets", "use_regex"});
    if (json["add_prefix_space"].boolean()) prefix_space_at_ = steps_.size();
    if (const auto use_regex = json.find("use_regex"); !use_regex || use_regex->boolean()) {
      steps_.push_back({Regex(kGpt2Pattern, "ByteLevel"), Behavior::kIsolated, false});
    }
    byte_level_ = true;
  } else {
    type.refuse("\"Sequence\", \"Split\", \"Digits\" or \"ByteLevel\"");
  }
}

void PreTokenizer::add_split(const JsonView& json) {
  json.only({"type", "pattern", "behavior", "invert"});
  static const std::map<std::string, Behavior> kBehaviors = {
      {"Isolated", Behavior::kIsolated},
      {"Removed", Behavior::kRemoved},
      {"MergedWithPrevious", Behavior::kMergedWithPrevious},
      {"MergedWithNext", Behavior::kMergedWithNext},
      {"Contiguous", Behavior::kContiguous}};
  const JsonView behavior = json["behavior"];
  const auto known = kBehaviors.find(behavior.string());
  if (known == kBehaviors.end()) {
    behavior.refuse("Isolated, Removed, MergedWithPrevious, MergedWithNext or Contiguous");
  }
  const JsonView pattern = json["pattern"];
  pattern.only({"Regex", "String"});
  if (pattern.value().size() != 1) pattern.refuse("{\"Regex\": ..} or {\"String\": ..}");
  const bool is_regex = pattern.has("Regex");
  const JsonView text = pattern[is_regex ? "Regex" : "String"];
  steps_.push_back({Regex(is_regex ? text.string() : escape(text.string()), text.place()),
                    known->second, json["invert"].boolean()});
}

void PreTokenizer::split(std::string_view text, Regex::Scratch& scratch, const Visit& visit) const {
  split_from(0, text, scratch, visit);
}

void PreTokenizer::split_from(size_t index, std::string_view text, Regex::Scratch& scratch,
                              const Visit& visit) const {
  if (text.empty()) return;
  std::string prefixed;
  if (index == prefix_space_at_ && text.front() != ' ') {
    prefixed = " " + std::string(text);
    text = prefixed;
  }
  if (index == steps_.size()) {
    visit(text);
    return;
  }
  const Step& step = steps_[index];

  // The piece that may still grow: [begin, end), and whether it counts as a match.
  size_t begin = 0;
  size_t end = 0;
  bool is_match = false;
  const auto flush = [&] {
    split_from(index + 1, text.substr(begin, end - begin), scratch, visit);
  };
  const auto add = [&](size_t to, bool match) {
    match = match != step.invert;
    bool join = false;
    switch (step.behavior) {
      case Behavior::kIsolated:
      case Behavior::kRemoved:
        break;
      case Behavior::kMergedWithPrevious:
        join = match && !is_match;
        break;
      case Behavior::kMergedWithNext:
        join = !match && is_match;
        break;
      case Behavior::kContiguous:
        join = match == is_match;
        break;
    }
    if (!join) {
      flush();
      begin = end;
    }
    end = to;
    is_match = match;
    if (match && step.behavior == Behavior::kRemoved) begin = end;
  };

  size_t from = 0;
  while (from < text.size()) {
    const auto found = step.regex.find(text, from, scratch);
    const size_t gap_end = found ? found->first : text.size();
    if (gap_end > from) add(gap_end, false);
    if (!found) break;
    add(found->second, true);
    from = found->second;
  }
  flush();
}

}  // namespace twell::app
