#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "app/data/tokens.h"
#include "app/model/llama.h"
#include "app/trace/trace.h"

namespace twell::app {

struct ObserveOptions {
  std::int64_t context = 256;              // tokens of a window
  std::int64_t max_tokens = 4096;          // looked at; whole windows only, unless there is one
  std::function<void(double)> progress{};  // share done
};

// Runs `stream` through the model in consecutive windows and notes, for every token and layer,
// which neurons are active (x Gᵀ > 0). Throws Error for models without ReLU and for an empty
// stream. One Trace per layer, its rates over the same tokens.
std::vector<Trace> observe(Llama& model, const TokenStream& stream, const ObserveOptions& options);

}  // namespace twell::app
