#pragma once
// Activation patterns of a model's FFNs, on disk: which neurons are active for which token. A
// folder holds, for each layer L, little-endian and without headers,
//
//   layerL.rowptr.u32  [tokens + 1] offsets; the active neurons of token t are
//   layerL.cols.u16    cols[rowptr[t] .. rowptr[t + 1]), ascending
//   layerL.rate.f32    [neurons] firing rates, possibly over more tokens than these
//   meta.json          {"name", "layers": [{"layer", "tokens", "neurons", figures…}]}

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

namespace twell::app {

struct Trace {
  int layer = 0;
  std::int64_t neurons = 0;
  std::vector<std::uint32_t> rowptr{0};
  std::vector<std::uint16_t> cols;
  std::vector<float> rate;

  std::int64_t tokens() const { return static_cast<std::int64_t>(rowptr.size()) - 1; }
  std::span<const std::uint16_t> row(std::int64_t token) const {
    return std::span(cols).subspan(rowptr[token], rowptr[token + 1] - rowptr[token]);
  }
  // Appends a token; `active` ascends strictly and stays below `neurons`.
  void append(std::span<const std::uint16_t> active);
};

// The layers in the folder, ascending. Throws Error if there are none.
std::vector<int> trace_layers(const std::filesystem::path& folder);

// Reads one layer. Throws Error, naming file and place, for missing or truncated files, offsets
// that do not ascend or do not match, and columns that do not ascend or exceed the neurons.
Trace read_trace(const std::filesystem::path& folder, int layer);

// Writes the layers and their meta.json, each file atomically; creates the folder.
void write_traces(const std::filesystem::path& folder, const std::string& name,
                  std::span<const Trace> traces);

}  // namespace twell::app
