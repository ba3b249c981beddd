#include "app/hf/safetensors.h"

#include <gtest/gtest.h>

#include <cstring>
#include <nlohmann/json.hpp>

#include "tests/app/fixtures.h"
#include "tests/app/mutate.h"

namespace twell::app {
namespace {

using nlohmann::json;

// A file with the given header and data, whose length field may be overridden.
std::string file_of(const std::string& header, const std::string& data,
                    std::optional<uint64_t> length = {}) {
  const uint64_t size = length.value_or(header.size());
  std::string file(sizeof size, '\0');
  std::memcpy(file.data(), &size, sizeof size);
  return file + header + data;
}

std::string entry(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}";
}

std::string bytes_of(const torch::Tensor& tensor) {
  const torch::Tensor flat = tensor.contiguous();
  return {static_cast<const char*>(flat.data_ptr()), static_cast<size_t>(flat.nbytes())};
}

class ModelFixture : public testing::TestWithParam<const char*> {};

TEST_P(ModelFixture, ReadsWhatTransformersWrote) {
  const auto folder = fixtures() / "models" / GetParam();
  const Safetensors file = Safetensors::open(folder);
  const json expected = json::parse(contents(folder / "expected.json"));
  const std::string data = contents(folder / "expected.bin");
  ASSERT_EQ(file.tensors().size(), expected.size());
  size_t offset = 0;
  for (const json& one : expected) {
    const std::string name = one["name"];
    const std::string dtype = one["dtype"];
    for (const torch::Tensor& tensor : {file.load(name), file.view(name)}) {
      EXPECT_EQ(tensor.scalar_type(), dtype == "bfloat16" ? torch::kBFloat16 : torch::kFloat32);
      EXPECT_EQ(tensor.sizes().vec(), one["shape"].get<std::vector<int64_t>>()) << name;
      EXPECT_EQ(bytes_of(tensor), data.substr(offset, static_cast<size_t>(tensor.nbytes())))
          << name;
    }
    offset += static_cast<size_t>(file.load(name).nbytes());
  }
  EXPECT_EQ(offset, data.size());
  EXPECT_EQ(file.metadata().at("format"), "pt");
  EXPECT_ERROR(file.load("no.such.weight"), "no.such.weight");
}

INSTANTIATE_TEST_SUITE_P(Models, ModelFixture, testing::Values("llama", "qwen2_sharded"),
                         [](const auto& info) { return std::string(info.param); });

std::map<std::string, torch::Tensor> all_dtypes() {
  torch::manual_seed(4);
  std::map<std::string, torch::Tensor> tensors;
  for (const auto dtype :
       {torch::kFloat64, torch::kFloat32, torch::kFloat16, torch::kBFloat16, torch::kInt64,
        torch::kInt32, torch::kInt16, torch::kInt8, torch::kUInt8, torch::kBool}) {
    const std::string name = c10::toString(dtype);
    tensors[name] = (torch::rand({3, 5}) * 100).to(dtype);
    tensors["transposed." + name] = tensors[name].t();
    tensors["scalar." + name] = (torch::rand({}) * 100).to(dtype);
    tensors["empty." + name] = torch::empty({2, 0, 3}, dtype);
  }
  tensors["strange \"name\"\n\u00e9"] = torch::full({1}, std::nan(""));
  return tensors;
}

TEST(Safetensors, RoundTripsEveryDtype) {
  const TemporaryFolder folder;
  const auto path = folder / "model.safetensors";
  const auto tensors = all_dtypes();
  write_safetensors(path, tensors, {{"format", "pt"}, {"note", "a\tb"}});
  const Safetensors file = Safetensors::open(folder.path());
  ASSERT_EQ(file.tensors().size(), tensors.size());
  for (const auto& [name, tensor] : tensors) {
    for (const torch::Tensor& back : {file.load(name), file.view(name)}) {
      EXPECT_EQ(back.scalar_type(), tensor.scalar_type());
      EXPECT_EQ(back.sizes(), tensor.sizes());
      EXPECT_EQ(bytes_of(back), bytes_of(tensor)) << name;
    }
    const TensorInfo& info = file.tensors().at(name);
    EXPECT_EQ(info.offset % c10::elementSize(info.dtype), 0u) << name;
  }
  EXPECT_EQ(file.metadata().at("note"), "a\tb");
}

TEST(Safetensors, IsReadByPython) {
  const TemporaryFolder folder;
  std::string expected;
  const auto tensors = all_dtypes();
  for (const auto& [name, tensor] : tensors) expected += bytes_of(tensor);
  put(folder / "expected", expected);
  write_safetensors(folder / "file.safetensors", tensors);
  EXPECT_TRUE(check_with_python("safetensors " + (folder / "file.safetensors").string() + " " +
                                (folder / "expected").string()));
}

TEST(Safetensors, WritesTheSameBytesEveryTime) {
  const TemporaryFolder folder;
  write_safetensors(folder / "a", all_dtypes());
  write_safetensors(folder / "b", all_dtypes());
  EXPECT_EQ(contents(folder / "a"), contents(folder / "b"));
  write_safetensors(folder / "c", {});
  EXPECT_TRUE(Safetensors::open(folder / "c").tensors().empty());
}

TEST(Safetensors, RefusesToWriteWhatItCannotExpress) {
  const TemporaryFolder folder;
  const auto path = folder / "f";
  EXPECT_ERROR(write_safetensors(path, {{"w", torch::zeros({1}, torch::kComplexFloat)}}), "\"w\"");
  EXPECT_ERROR(write_safetensors(path, {{"__metadata__", torch::zeros({1})}}), "reserved");
  EXPECT_ERROR(write_safetensors(path, {{"w", torch::Tensor()}}), "undefined");
  EXPECT_ERROR(write_safetensors(path, {{"w", torch::eye(2).to_sparse()}}), "dense");
  EXPECT_ERROR(write_safetensors(path, {{"\xff", torch::zeros({1})}}), "UTF-8");
  EXPECT_FALSE(std::filesystem::exists(path));
}

TEST(Safetensors, ViewsOutliveTheReaderAndProtectTheFile) {
  const TemporaryFolder folder;
  write_safetensors(folder / "f", {{"w", torch::ones({1000})}});
  const std::string before = contents(folder / "f");
  torch::Tensor view = Safetensors::open(folder / "f").view("w");
  std::filesystem::remove(folder / "f");
  put(folder / "f", before);
  view.add_(1);
  EXPECT_EQ(view.sum().item<float>(), 2000.0f);
  EXPECT_EQ(contents(folder / "f"), before);
}

TEST(Safetensors, CopiesTensorsThatAreNotAligned) {
  const TemporaryFolder folder;
  const float value = 1.5f;
  std::string data = "?" + std::string(reinterpret_cast<const char*>(&value), sizeof value);
  put(folder / "f", file_of("{\"a\":" + entry("U8", "[1]", "[0,1]") +
                                ",\"b\":" + entry("F32", "[1]", "[1,5]") + "}",
                            data));
  const Safetensors file = Safetensors::open(folder / "f");
  EXPECT_EQ(file.view("b").item<float>(), value);
  EXPECT_EQ(file.load("b").item<float>(), value);
}

TEST(Safetensors, NoticesAFileThatShrinks) {
  const TemporaryFolder folder;
  write_safetensors(folder / "f", {{"w", torch::ones({100000})}});
  const Safetensors file = Safetensors::open(folder / "f");
  std::filesystem::resize_file(folder / "f", 5000);
  EXPECT_ERROR(file.load("w"), "shorter");
  EXPECT_ERROR(file.view("w"), "shrunk");
}

TEST(Safetensors, RefusesEveryTruncation) {
  const TemporaryFolder folder;
  write_safetensors(folder / "f", {{"w", torch::ones({20})}, {"v", torch::ones({3})}});
  const std::string whole = contents(folder / "f");
  for (size_t size = 0; size < whole.size(); ++size) {
    put(folder / "cut", whole.substr(0, size));
    EXPECT_NE(error_of([&] { Safetensors::open(folder / "cut"); }), "no error") << size;
  }
  put(folder / "longer", whole + "x");
  EXPECT_ERROR(Safetensors::open(folder / "longer"), "bytes of data");
}

TEST(Safetensors, RefusesHostileFiles) {
  const TemporaryFolder folder;
  const std::string good = entry("F32", "[2]", "[0,8]");
  const auto expect = [&](const std::string& file, const std::string& part) {
    put(folder / "f", file);
    EXPECT_ERROR(Safetensors::open(folder / "f"), part);
  };
  const auto header = [&](const std::string& text, const std::string& part) {
    expect(file_of(text, std::string(8, '\0')), part);
  };
  expect(file_of("{}", "", 1), "not valid JSON");
  expect(file_of("{}", "", 3), "truncated");
  expect(file_of("{}", "", 100'000'001), "100000000");
  expect(file_of("{}", "", UINT64_MAX), "not a safetensors file");
  expect(file_of("{}", "", UINT64_MAX - 7), "not a safetensors file");
  header("", "does not start with {");
  header(" {}", "does not start with {");
  header("[]", "does not start with {");
  header("{}", "8 bytes of data");
  header("{\"w\":" + good + "} x", "not valid JSON");
  header("{\"w\":" + good + ",\"w\":" + good + "}", "twice");
  header("{\"\xff\":" + good + "}", "not valid JSON");
  header("{\"w\":5}", "an object");
  header("{\"w\":{\"a\":{\"b\":{}}}}", "deeper");
  header("{\"w\":" + std::string(100000, '['), "deeper");
  header("{\"w\":{\"dtype\":\"F32\",\"shape\":[2]}}", "data_offsets");
  header("{\"w\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8],\"x\":1}}", "\"x\"");
  header("{\"w\":" + entry("F8_E4M3", "[8]", "[0,8]") + "}", "F8_E4M3");
  header("{\"w\":" + entry("F32", "[-2]", "[0,8]") + "}", "-2");
  header("{\"w\":" + entry("F32", "[2.0]", "[0,8]") + "}", "2.0");
  header("{\"w\":" + entry("F32", "[1e999]", "[0,8]") + "}", "out of range");
  header("{\"w\":" + entry("F32", "[18446744073709551618]", "[0,8]") + "}", "must be an integer");
  header("{\"w\":" + entry("F32", "[4294967296,4294967296]", "[0,8]") + "}", "overflows");
  header("{\"w\":" + entry("F32", "[9223372036854775807,0]", "[0,8]") + "}", "overflows");
  header("{\"w\":" + entry("F32", "[3]", "[0,8]") + "}", "12");
  header("{\"w\":" + entry("F32", "2", "[0,8]") + "}", "an array");
  header("{\"w\":" + entry("F32", "[2]", "[0,9]") + "}", "\"w.data_offsets[1]\" is 9");
  header("{\"w\":" + entry("F32", "[2]", "[8,0]") + "}", "data_offsets");
  header("{\"w\":" + entry("F32", "[2]", "[-1,7]") + "}", "-1");
  header("{\"w\":" + entry("F32", "[2]", "[0,8,8]") + "}", "[begin, end]");
  header("{\"w\":" + entry("F32", "[1]", "[4,8]") + "}", "hole");
  header("{\"w\":" + entry("F32", "[1]", "[0,4]") + "}", "8 bytes of data");
  header("{\"v\":" + entry("F32", "[1]", "[0,4]") + ",\"w\":" + good + "}", "inside another");
  header("{\"__metadata__\":{\"a\":1},\"w\":" + good + "}", "a string");
  header("{\"__metadata__\":[],\"w\":" + good + "}", "an object");
  header("{\"a\\nb\\u001b[31m\":{}}", "\\x0a");  // never a line break or an escape in a message
  put(folder / "f", file_of("{\"w\":" + entry("BOOL", "[2]", "[0,2]") + "}", std::string("\1\2")));
  EXPECT_ERROR(Safetensors::open(folder / "f").load("w"), "BOOL");
  EXPECT_ERROR(Safetensors::open(folder / "f").view("w"), "BOOL");
  EXPECT_ERROR(Safetensors::open(folder / "missing"), "missing");
  std::filesystem::create_directory(folder / "empty");
  EXPECT_ERROR(Safetensors::open(folder / "empty"), "neither");
}

TEST(Safetensors, RefusesHostileIndexes) {
  const TemporaryFolder folder;
  write_safetensors(folder / "a.safetensors", {{"w", torch::ones({2})}, {"v", torch::ones({2})}});
  write_safetensors(folder / "b.safetensors", {{"w", torch::ones({2})}});
  const auto index = folder / "model.safetensors.index.json";
  const auto expect = [&](const std::string& weights, const std::string& part) {
    put(index, "{\"metadata\":{\"total_size\":1},\"weight_map\":" + weights + "}");
    EXPECT_ERROR(Safetensors::open(folder.path()), part);
  };
  expect(R"({"w":"a.safetensors","v":"a.safetensors","x":"a.safetensors"})", "\"x\"");
  expect(R"({"w":"a.safetensors"})", "no entry for tensor \"v\"");
  expect(R"({"w":"b.safetensors","v":"a.safetensors"})", "in both");
  expect(R"({"w":"../a.safetensors"})", "same folder");
  expect(R"({"w":"/etc/passwd"})", "same folder");
  expect(R"({"w":"a.safetensors\u0000"})", "same folder");
  expect(R"({"w":"missing.safetensors"})", "missing.safetensors");
  expect(R"({"w":1})", "a string");
  expect("[]", "an object");
  put(index, R"({"weight_map":{}, "other":1})");
  EXPECT_ERROR(Safetensors::open(index), "other");
}

TEST(Safetensors, SurvivesMutations) {
  const TemporaryFolder folder;
  write_safetensors(folder / "f", {{"w", torch::ones({4, 3})},
                                   {"v", torch::ones({5}, torch::kBFloat16)},
                                   {"u", torch::ones({2}, torch::kBool)}});
  const std::string whole = contents(folder / "f");
  survive_mutations(whole, 2000, [&](const std::string& text) {
    put(folder / "g", text);
    const Safetensors file = Safetensors::open(folder / "g");
    for (const auto& [name, info] : file.tensors()) {
      EXPECT_EQ(static_cast<uint64_t>(file.load(name).nbytes()), info.bytes);
      file.view(name).to(torch::kFloat64).sum();
    }
  });
}

}  // namespace
}  // namespace twell::app
