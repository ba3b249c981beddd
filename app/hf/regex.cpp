#include "app/hf/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <array>

#include "app/error.h"

namespace twell::app {
namespace {

template <auto kFree>
struct Free {
  template <typename T>
  void operator()(T* object) const {
    kFree(object);
  }
};

using CodePointer = std::unique_ptr<pcre2_code, Free<pcre2_code_free>>;
using CompileContext = std::unique_ptr<pcre2_compile_context, Free<pcre2_compile_context_free>>;
using MatchData = std::unique_ptr<pcre2_match_data, Free<pcre2_match_data_free>>;

std::string message_of(int error) {
  std::array<unsigned char, 256> text{};
  pcre2_get_error_message(error, text.data(), text.size());
  return reinterpret_cast<const char*>(text.data());
}

}  // namespace

struct Regex::Code {
  CodePointer pointer;
  std::string name;  // "FILE: "place": pattern "..."", for errors
};

struct Regex::Scratch::Data {
  MatchData match{pcre2_match_data_create(1, nullptr)};
};

Regex::Scratch::Scratch() : data_(std::make_unique<Data>()) {
  if (!data_->match) throw std::bad_alloc();
}
Regex::Scratch::~Scratch() = default;

Regex::Regex(std::string_view pattern, const std::string& place) {
  const std::string translated = translate_pattern(pattern, place);
  const std::string name = place + ": pattern " + quote(pattern);
  const CompileContext context(pcre2_compile_context_create(nullptr));
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);  // as in Oniguruma, for . ^ and $
  int error = 0;
  size_t offset = 0;
  // In Oniguruma's syntax ^ and $ always match at lines.
  CodePointer code(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                                 PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE, &error, &offset,
                                 context.get()));
  if (!code) throw Error(name + " is not supported: " + message_of(error));
  uint32_t matches_empty = 0;
  pcre2_pattern_info(code.get(), PCRE2_INFO_MATCHEMPTY, &matches_empty);
  if (matches_empty != 0) throw Error(name + " matches the empty string, which is not supported");
  pcre2_jit_compile(code.get(), PCRE2_JIT_COMPLETE);  // without it, matching is only slower
  code_ = std::make_shared<const Code>(Code{std::move(code), name});
}

std::optional<std::pair<size_t, size_t>> Regex::find(std::string_view text, size_t from,
                                                     Scratch& scratch) const {
  pcre2_match_data* match = scratch.data_->match.get();
  const auto run = [&](uint32_t options) {
    return pcre2_match(code_->pointer.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                       from, PCRE2_NO_UTF_CHECK | options, match, nullptr);
  };
  int result = run(0);
  // The compiled code has a small stack; the interpreter uses the heap.
  if (result == PCRE2_ERROR_JIT_STACKLIMIT) result = run(PCRE2_NO_JIT);
  if (result == PCRE2_ERROR_NOMATCH) return std::nullopt;
  if (result < 0) {
    throw Error(code_->name + " failed at byte " + std::to_string(from) +
                " of a text: " + message_of(result));
  }
  const size_t* bounds = pcre2_get_ovector_pointer(match);
  return std::pair(bounds[0], bounds[1]);
}

}  // namespace twell::app
