#include "app/trace/trace.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <set>

#include "app/error.h"
#include "app/trace/statistics.h"

namespace twell::app {
namespace {

namespace fs = std::filesystem;

class TraceTest : public testing::Test {
 protected:
  void SetUp() override {
    const auto* test = testing::UnitTest::GetInstance()->current_test_info();
    folder_ = fs::path(testing::TempDir()) / (std::string("trace_") + test->name());
    fs::remove_all(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  void overwrite(const std::string& name, const std::string& bytes) {
    std::ofstream(folder_ / name, std::ios::binary) << bytes;
  }
  std::string bytes_of(const std::string& name) {
    std::ifstream in(folder_ / name, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  // The message of the Error that reading `layer` throws; empty if it throws none.
  std::string error_of(int layer) {
    try {
      read_trace(folder_, layer);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  }

  fs::path folder_;
};

Trace random_trace(int layer, std::int64_t tokens, std::int64_t neurons, double density) {
  std::mt19937_64 random(layer + 1);
  std::bernoulli_distribution fires(density);
  Trace trace;
  trace.layer = layer;
  trace.neurons = neurons;
  trace.rate.assign(neurons, 0);
  for (std::int64_t token = 0; token < tokens; ++token) {
    std::vector<std::uint16_t> active;
    for (std::int64_t n = 0; n < neurons; ++n) {
      if (fires(random)) active.push_back(static_cast<std::uint16_t>(n));
    }
    for (const auto n : active) trace.rate[n] += 1.0f / static_cast<float>(tokens);
    trace.append(active);
  }
  return trace;
}

TEST_F(TraceTest, RoundTrip) {
  const std::vector<Trace> traces = {random_trace(0, 300, 1000, 0.02), random_trace(3, 1, 8, 1.0),
                                     random_trace(11, 0, 65536, 0.0), random_trace(12, 5, 8, 0.0)};
  write_traces(folder_, "round trip", traces);
  EXPECT_EQ(trace_layers(folder_), (std::vector<int>{0, 3, 11, 12}));
  for (const Trace& trace : traces) {
    const Trace read = read_trace(folder_, trace.layer);
    EXPECT_EQ(read.neurons, trace.neurons);
    EXPECT_EQ(read.rowptr, trace.rowptr);
    EXPECT_EQ(read.cols, trace.cols);
    EXPECT_EQ(read.rate, trace.rate);
  }
}

TEST_F(TraceTest, FilesAreAsDocumented) {
  Trace trace;
  trace.layer = 4;
  trace.neurons = 600;
  trace.rate.assign(600, 0.5f);
  trace.rate[1] = 0;
  const std::uint16_t first[] = {2, 259};
  trace.append(first);
  trace.append({});
  write_traces(folder_, "tiny", {&trace, 1});
  using std::string_literals::operator""s;
  EXPECT_EQ(bytes_of("layer4.rowptr.u32"), "\0\0\0\0\2\0\0\0\2\0\0\0"s);
  EXPECT_EQ(bytes_of("layer4.cols.u16"), "\2\0\3\1"s);
  EXPECT_EQ(bytes_of("layer4.rate.f32").size(), 2400u);
  const auto meta = nlohmann::json::parse(bytes_of("meta.json"));
  const auto expected = nlohmann::json::parse(R"({"name": "tiny", "layers": [{
      "layer": 4, "tokens": 2, "neurons": 600, "mean_nnz": 1.0, "p99_nnz": 0, "max_nnz": 2,
      "mean_union_of_128_tokens": 2.0, "max_nnz_in_a_256_tile": 1, "tiles_over_31": 0,
      "neurons_never_active": 1}]})");
  EXPECT_EQ(meta, expected);
}

TEST_F(TraceTest, RefusesDamage) {
  const Trace trace = random_trace(1, 20, 64, 0.3);
  const auto restore = [&] { write_traces(folder_, "x", {&trace, 1}); };
  restore();
  EXPECT_NE(error_of(2).find("has no layer 2; it has 1"), std::string::npos);

  const std::string cols = bytes_of("layer1.cols.u16");
  overwrite("layer1.cols.u16", cols.substr(0, cols.size() - 1));
  EXPECT_NE(error_of(1).find("truncated"), std::string::npos);
  overwrite("layer1.cols.u16", cols.substr(0, cols.size() - 2));
  EXPECT_NE(error_of(1).find("ends at"), std::string::npos);
  std::string swapped = cols;
  std::swap(swapped[0], swapped[2]);
  overwrite("layer1.cols.u16", swapped);
  EXPECT_NE(error_of(1).find("token 0"), std::string::npos);
  std::string large = cols;
  large[large.size() - 2] = 64;
  overwrite("layer1.cols.u16", large);
  EXPECT_NE(error_of(1).find("column 64"), std::string::npos);

  restore();
  std::string rows = bytes_of("layer1.rowptr.u32");
  rows[4] = 127;
  overwrite("layer1.rowptr.u32", rows);
  EXPECT_NE(error_of(1).find("offset 2 is smaller"), std::string::npos);
  overwrite("layer1.rowptr.u32", "");
  EXPECT_NE(error_of(1).find("must start with offset 0"), std::string::npos);

  restore();
  overwrite("layer1.rate.f32", "");
  EXPECT_NE(error_of(1).find("0 neurons"), std::string::npos);
  fs::remove(folder_ / "layer1.rate.f32");
  EXPECT_NE(error_of(1).find("layer1.rate.f32"), std::string::npos);
  EXPECT_THROW(trace_layers(folder_ / "nothing"), Error);
}

TEST_F(TraceTest, WillNotWriteWhatItWouldNotRead) {
  Trace trace = random_trace(1, 4, 64, 0.3);
  trace.cols[0] = 64;
  EXPECT_THROW(write_traces(folder_, "x", {&trace, 1}), Error);
}

// An independent count: sets and a dense bitmap instead of streaming.
TEST_F(TraceTest, StatisticsMatchABruteForceCount) {
  for (const double density : {0.0, 0.01, 0.5, 1.0}) {
    const Trace trace = random_trace(0, 333, 700, density);
    const TraceStatistics s = trace_statistics(trace);
    std::vector<std::vector<char>> dense(333, std::vector<char>(700));
    std::vector<std::int64_t> counts;
    for (int t = 0; t < 333; ++t) {
      for (const auto n : trace.row(t)) dense[t][n] = 1;
      counts.push_back(std::accumulate(dense[t].begin(), dense[t].end(), std::int64_t{0}));
    }
    for (const int slots : kSlotChoices) {
      std::int64_t over = 0;
      for (int t = 0; t < 333; ++t) {
        for (int tile = 0; tile < 700; tile += 256) {
          const auto end = dense[t].begin() + std::min(tile + 256, 700);
          over += std::accumulate(dense[t].begin() + tile, end, 0) > slots - 1;
        }
      }
      EXPECT_EQ(s.overflow(slots), over) << density << " " << slots;
    }
    for (const int width : kUnionTokens) {
      double sum = 0;
      for (int tile = 0; tile < 333 / width; ++tile) {
        std::set<int> seen;
        for (int t = tile * width; t < (tile + 1) * width; ++t) {
          seen.insert(trace.row(t).begin(), trace.row(t).end());
        }
        sum += static_cast<double>(seen.size());
      }
      EXPECT_DOUBLE_EQ(s.mean_union(width), sum / (333 / width)) << density << " " << width;
    }
    std::sort(counts.begin(), counts.end());
    EXPECT_EQ(s.max_active, counts.back());
    EXPECT_EQ(s.p99_active, counts[328]);
    EXPECT_EQ(s.tile_rows, 333 * 3);
    EXPECT_EQ(std::accumulate(s.active_histogram.begin(), s.active_histogram.end(), 0), 333);
    EXPECT_EQ(std::accumulate(s.rate_histogram.begin(), s.rate_histogram.end(), 0), 700);
    EXPECT_EQ(s.silent, std::count(trace.rate.begin(), trace.rate.end(), 0.0f));
  }
}

TEST_F(TraceTest, StatisticsOfNothing) {
  const TraceStatistics s = trace_statistics(random_trace(0, 0, 16, 0));
  EXPECT_EQ(s.mean_active, 0);
  EXPECT_EQ(s.max_active, 0);
  EXPECT_EQ(s.mean_union(128), 0);
  EXPECT_EQ(s.silent, 16);
}

TEST_F(TraceTest, HistogramBucketsArePowersOfTwo) {
  Trace trace;
  trace.neurons = 8;
  trace.rate = {0, 5e-5f, 5e-4f, 5e-3f, 5e-2f, 0.2f, 0.5f, 1};
  for (const std::size_t active : {0, 1, 2, 3, 4, 7, 8}) {
    const std::uint16_t all[] = {0, 1, 2, 3, 4, 5, 6, 7};
    trace.append(std::span(all).first(active));
  }
  const TraceStatistics s = trace_statistics(trace);
  EXPECT_EQ(s.active_histogram, (std::vector<std::int64_t>{1, 1, 2, 2, 1}));
  EXPECT_EQ(s.rate_histogram, (std::vector<std::int64_t>{1, 1, 1, 1, 1, 1, 2}));
}

}  // namespace
}  // namespace twell::app
