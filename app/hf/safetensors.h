#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace twell::app {

// Where a tensor lies in a safetensors file.
struct TensorInfo {
  torch::ScalarType dtype;
  std::vector<int64_t> shape;
  uint64_t offset;  // bytes from the start of the file
  uint64_t bytes;
};

// Strict reader of the safetensors format: one file, or the shards of a
// `model.safetensors.index.json`. Layout: u64 little-endian header length, JSON header, data.
// Refused with an Error naming file and tensor: a header over 100 MB or past the file's end, JSON
// that is not an object of well-formed entries, duplicate names, dtypes other than F64, F32, F16,
// BF16, I64, I32, I16, I8, U8 and BOOL, shapes that are negative or overflow, offsets that leave
// the data, overlap, have holes, do not cover it or disagree with the shape.
class Safetensors {
 public:
  // `path` is a .safetensors file, a .safetensors.index.json file, or a folder with
  // model.safetensors or model.safetensors.index.json.
  static Safetensors open(const std::filesystem::path& path);

  // All tensors by name, in ascending order.
  const std::map<std::string, TensorInfo>& tensors() const;
  // The strings of `__metadata__` (of an index's shards: merged, the first one wins).
  const std::map<std::string, std::string>& metadata() const;
  bool contains(const std::string& name) const { return tensors().contains(name); }

  // A CPU tensor of its own memory, read with pread: a file that shrank meanwhile gives an Error.
  torch::Tensor load(const std::string& name) const;
  // A CPU tensor over a private memory map, which it keeps alive (copied if it is BOOL, or if its
  // place in the file is not aligned). Writing to it never changes the file. But
  // if the file is truncated after this call, touching the lost pages is fatal: use load() for
  // files that others may change.
  torch::Tensor view(const std::string& name) const;

 private:
  struct Contents;
  explicit Safetensors(std::shared_ptr<const Contents> contents) : contents_(std::move(contents)) {}
  std::shared_ptr<const Contents> contents_;
};

// Writes `tensors` (any device, any strides) to `path` by an AtomicFile: names ordered by falling
// item size, then by name, so that every tensor is aligned to its item; the data starts at a
// multiple of 64 bytes. The bytes depend on nothing but the arguments. transformers wants the
// metadata {"format": "pt"}, which is the default.
void write_safetensors(const std::filesystem::path& path,
                       const std::map<std::string, torch::Tensor>& tensors,
                       const std::map<std::string, std::string>& metadata = {{"format", "pt"}});

}  // namespace twell::app
