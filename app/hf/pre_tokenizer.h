#pragma once

#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "app/hf/json.h"
#include "app/hf/regex.h"

namespace twell::app {

// The pre_tokenizer of a tokenizer.json: cuts a text into the pieces that BPE works on. A chain of
// Split and Digits steps ended by ByteLevel. Pieces are the text's own bytes: the printable
// alphabet that ByteLevel stands for is undone when the vocabulary is read.
class PreTokenizer {
 public:
  explicit PreTokenizer(const JsonView& json);  // throws Error for what it does not know

  using Visit = std::function<void(std::string_view piece)>;
  // Calls `visit` with the non-empty pieces of UTF-8 `text`, in order.
  void split(std::string_view text, Regex::Scratch& scratch, const Visit& visit) const;

 private:
  // What becomes of a match of the pattern and of the text between two matches.
  enum class Behavior { kIsolated, kRemoved, kMergedWithPrevious, kMergedWithNext, kContiguous };
  struct Step {
    Regex regex;
    Behavior behavior;
    bool invert;  // the text between the matches counts as the matches
  };

  void add(const JsonView& json);
  void add_split(const JsonView& json);
  void split_from(size_t step, std::string_view text, Regex::Scratch& scratch,
                  const Visit& visit) const;

  std::vector<Step> steps_;
  // The steps from this one on see their text with a leading space added.
  std::optional<size_t> prefix_space_at_;
  bool byte_level_ = false;
};

}  // namespace twell::app
