#include "app/trace/trace.h"

#include <algorithm>
#include <bit>
#include <charconv>
#include <nlohmann/json.hpp>
#include <string_view>

#include "app/error.h"
#include "app/trace/statistics.h"
#include "app/util/atomic_file.h"
#include "app/util/file.h"

namespace twell::app {
namespace {

static_assert(std::endian::native == std::endian::little, "trace files are little-endian");

constexpr std::int64_t kMaxNeurons = 65536;
constexpr std::size_t kMaxFileBytes = std::size_t{1} << 34;
constexpr std::string_view kPrefix = "layer";
constexpr std::string_view kRowptr = ".rowptr.u32";
constexpr std::string_view kCols = ".cols.u16";
constexpr std::string_view kRate = ".rate.f32";

std::filesystem::path file_of(const std::filesystem::path& folder, int layer,
                              std::string_view suffix) {
  return folder / (std::string(kPrefix) + std::to_string(layer) + std::string(suffix));
}

template <class T>
std::vector<T> read_array(const std::filesystem::path& path) {
  const std::string bytes = read_file(path, kMaxFileBytes);
  if (bytes.size() % sizeof(T) != 0) {
    throw Error(path.string() + ": " + std::to_string(bytes.size()) +
                " bytes is not a whole number of " + std::to_string(sizeof(T)) +
                "-byte values (truncated?)");
  }
  std::vector<T> values(bytes.size() / sizeof(T));
  std::copy_n(bytes.data(), bytes.size(), reinterpret_cast<char*>(values.data()));
  return values;
}

template <class T>
void write_array(const std::filesystem::path& path, const std::vector<T>& values) {
  write_file(path, std::string_view(reinterpret_cast<const char*>(values.data()),
                                    values.size() * sizeof(T)));
}

void check(const std::filesystem::path& folder, const Trace& trace) {
  const std::string rows = file_of(folder, trace.layer, kRowptr).string();
  const std::string cols = file_of(folder, trace.layer, kCols).string();
  if (trace.neurons < 1 || trace.neurons > kMaxNeurons) {
    throw Error(file_of(folder, trace.layer, kRate).string() + ": holds " +
                std::to_string(trace.neurons) + " neurons; 1 to 65536 are permitted");
  }
  if (trace.rowptr.empty() || trace.rowptr.front() != 0) {
    throw Error(rows + ": must start with offset 0");
  }
  for (std::size_t i = 1; i < trace.rowptr.size(); ++i) {
    if (trace.rowptr[i] < trace.rowptr[i - 1]) {
      throw Error(rows + ": offset " + std::to_string(i) + " is smaller than the one before it");
    }
  }
  if (trace.rowptr.back() != trace.cols.size()) {
    throw Error(cols + ": holds " + std::to_string(trace.cols.size()) + " columns, but " + rows +
                " ends at " + std::to_string(trace.rowptr.back()));
  }
  for (std::int64_t token = 0; token < trace.tokens(); ++token) {
    int previous = -1;
    for (const std::uint16_t column : trace.row(token)) {
      if (column <= previous || column >= trace.neurons) {
        throw Error(cols + ": token " + std::to_string(token) + " has column " +
                    std::to_string(column) + " after " + std::to_string(previous) +
                    "; columns must ascend and stay below " + std::to_string(trace.neurons));
      }
      previous = column;
    }
  }
}

nlohmann::ordered_json describe(const Trace& trace) {
  const TraceStatistics statistics = trace_statistics(trace);
  return {{"layer", trace.layer},
          {"tokens", trace.tokens()},
          {"neurons", trace.neurons},
          {"mean_nnz", statistics.mean_active},
          {"p99_nnz", statistics.p99_active},
          {"max_nnz", statistics.max_active},
          {"mean_union_of_128_tokens", statistics.mean_union(128)},
          {"max_nnz_in_a_256_tile", statistics.max_in_tile},
          {"tiles_over_31", statistics.overflow(32)},
          {"neurons_never_active", statistics.silent}};
}

}  // namespace

void Trace::append(std::span<const std::uint16_t> active) {
  cols.insert(cols.end(), active.begin(), active.end());
  if (cols.size() > UINT32_MAX) {
    throw Error("trace of layer " + std::to_string(layer) +
                ": more than 4294967295 active neurons; use fewer tokens");
  }
  rowptr.push_back(static_cast<std::uint32_t>(cols.size()));
}

std::vector<int> trace_layers(const std::filesystem::path& folder) {
  std::error_code error;
  std::vector<int> layers;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename().string();
    int layer = 0;
    if (!name.starts_with(kPrefix) || !name.ends_with(kRowptr)) continue;
    const char* end = name.data() + name.size() - kRowptr.size();
    const auto parsed = std::from_chars(name.data() + kPrefix.size(), end, layer);
    if (parsed.ec == std::errc() && parsed.ptr == end && layer >= 0) layers.push_back(layer);
  }
  if (error) throw Error("trace folder " + folder.string() + ": " + error.message());
  if (layers.empty()) {
    throw Error("trace folder " + folder.string() + ": holds no layerL" + std::string(kRowptr));
  }
  std::sort(layers.begin(), layers.end());
  return layers;
}

Trace read_trace(const std::filesystem::path& folder, int layer) {
  const std::vector<int> layers = trace_layers(folder);
  if (!std::binary_search(layers.begin(), layers.end(), layer)) {
    std::string there;
    for (const int each : layers) there += (there.empty() ? "" : ", ") + std::to_string(each);
    throw Error("trace folder " + folder.string() + ": has no layer " + std::to_string(layer) +
                "; it has " + there);
  }
  Trace trace;
  trace.layer = layer;
  trace.rowptr = read_array<std::uint32_t>(file_of(folder, layer, kRowptr));
  trace.cols = read_array<std::uint16_t>(file_of(folder, layer, kCols));
  trace.rate = read_array<float>(file_of(folder, layer, kRate));
  trace.neurons = static_cast<std::int64_t>(trace.rate.size());
  check(folder, trace);
  return trace;
}

void write_traces(const std::filesystem::path& folder, const std::string& name,
                  std::span<const Trace> traces) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) throw Error("trace folder " + folder.string() + ": " + error.message());
  nlohmann::ordered_json meta = {{"name", name}, {"layers", nlohmann::ordered_json::array()}};
  for (const Trace& trace : traces) {
    check(folder, trace);
    write_array(file_of(folder, trace.layer, kRowptr), trace.rowptr);
    write_array(file_of(folder, trace.layer, kCols), trace.cols);
    write_array(file_of(folder, trace.layer, kRate), trace.rate);
    meta["layers"].push_back(describe(trace));
  }
  write_file(folder / "meta.json", meta.dump(1) + "\n");
}

}  // namespace twell::app
