#include "app/hf/safetensors.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <mutex>

#include "app/error.h"
#include "app/hf/json.h"
#include "app/util/atomic_file.h"
#include "app/util/file.h"

namespace twell::app {
namespace {

static_assert(std::endian::native == std::endian::little, "the format is little-endian");

constexpr uint64_t kMaxHeader = 100'000'000;  // the limit of the reference implementation
constexpr uint64_t kMaxIndex = 100'000'000;
constexpr size_t kMaxDims = 64;
constexpr uint64_t kDataAlignment = 64;
constexpr const char* kSingle = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";

struct Dtype {
  const char* name;
  torch::ScalarType type;
};

// By falling item size: the order in which tensors are written.
constexpr std::array<Dtype, 10> kDtypes = {{{"F64", torch::kFloat64},
                                            {"I64", torch::kInt64},
                                            {"F32", torch::kFloat32},
                                            {"I32", torch::kInt32},
                                            {"F16", torch::kFloat16},
                                            {"BF16", torch::kBFloat16},
                                            {"I16", torch::kInt16},
                                            {"I8", torch::kInt8},
                                            {"U8", torch::kUInt8},
                                            {"BOOL", torch::kBool}}};

std::string dtype_names() {
  std::string names;
  for (const Dtype& dtype : kDtypes) names += (names.empty() ? "" : ", ") + std::string(dtype.name);
  return names;
}

torch::ScalarType parse_dtype(const JsonView& field) {
  for (const Dtype& dtype : kDtypes) {
    if (field.string() == dtype.name) return dtype.type;
  }
  field.refuse("one of " + dtype_names());
}

TensorInfo parse_tensor(const JsonView& entry, uint64_t data_begin, uint64_t data_bytes) {
  entry.only({"dtype", "shape", "data_offsets"});
  TensorInfo info{.dtype = parse_dtype(entry["dtype"]), .shape = {}, .offset = 0, .bytes = 0};

  const JsonView shape = entry["shape"];
  if (shape.size() > kMaxDims) shape.refuse("at most " + std::to_string(kMaxDims) + " sizes");
  // Zeros count as ones here, so that no stride of an empty tensor overflows either.
  int64_t product = static_cast<int64_t>(c10::elementSize(info.dtype));
  bool empty = false;
  for (size_t i = 0; i < shape.size(); ++i) {
    const int64_t size = shape[i].integer(0, INT64_MAX);
    empty |= size == 0;
    if (__builtin_mul_overflow(product, std::max<int64_t>(size, 1), &product)) {
      shape.fail("has a product that overflows 64 bits");
    }
    info.shape.push_back(size);
  }
  const uint64_t bytes = empty ? 0 : static_cast<uint64_t>(product);

  const JsonView offsets = entry["data_offsets"];
  if (offsets.size() != 2) offsets.refuse("[begin, end]");
  const auto limit = static_cast<int64_t>(data_bytes);
  const auto begin = static_cast<uint64_t>(offsets[0].integer(0, limit));
  const auto end = static_cast<uint64_t>(offsets[1].integer(static_cast<int64_t>(begin), limit));
  if (end - begin != bytes) {
    offsets.fail("span " + std::to_string(end - begin) + " bytes, but dtype and shape need " +
                 std::to_string(bytes));
  }
  info.offset = data_begin + begin;
  info.bytes = bytes;
  return info;
}

// Refuses overlaps, holes, and data before the first or after the last tensor.
void check_coverage(const std::map<std::string, TensorInfo>& tensors, uint64_t data_begin,
                    uint64_t data_bytes, const std::string& file) {
  std::vector<std::pair<const TensorInfo*, const std::string*>> order;
  for (const auto& [name, info] : tensors) order.emplace_back(&info, &name);
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return std::pair(a.first->offset, a.first->bytes) < std::pair(b.first->offset, b.first->bytes);
  });
  uint64_t covered = data_begin;
  for (const auto& [info, name] : order) {
    if (info->offset != covered) {
      throw Error(file + ": tensor " + quote(*name) + " begins at byte " +
                  std::to_string(info->offset - data_begin) + " of the data, " +
                  (info->offset < covered ? "inside another tensor that ends" : "after a hole") +
                  " at byte " + std::to_string(covered - data_begin));
    }
    covered += info->bytes;
  }
  if (covered != data_begin + data_bytes) {
    throw Error(file + ": its tensors end at byte " + std::to_string(covered - data_begin) +
                " of the data, but the file holds " + std::to_string(data_bytes) +
                " bytes of data; it is truncated or damaged");
  }
}

// One file: checked contents, open for reading, mapped at the first view().
class Shard {
 public:
  explicit Shard(const std::filesystem::path& path) : file_(path), size_(file_.size()) {
    const std::string name = path.string();
    uint64_t header_bytes = 0;
    if (size_ < sizeof header_bytes) {
      throw Error(name + " has " + std::to_string(size_) +
                  " bytes, too few for a safetensors file; it is truncated");
    }
    file_.read(0, &header_bytes, sizeof header_bytes);
    if (header_bytes > kMaxHeader) {
      throw Error(name + " is not a safetensors file: header length " +
                  std::to_string(header_bytes) + ", at most " + std::to_string(kMaxHeader));
    }
    const uint64_t data_begin = sizeof header_bytes + header_bytes;
    if (data_begin > size_) {
      throw Error(name + " has " + std::to_string(size_) + " bytes, but its header ends at byte " +
                  std::to_string(data_begin) + "; it is truncated");
    }
    std::string text(header_bytes, '\0');
    file_.read(sizeof header_bytes, text.data(), header_bytes);
    if (!text.starts_with('{')) throw Error(name + ": its header does not start with {");
    const nlohmann::json header = parse_json(text, name, 3);
    const JsonView view(header, name);
    for (const auto& item : header.items()) {
      const JsonView entry = view[item.key()];
      if (item.key() == "__metadata__") {
        if (!entry.value().is_object()) entry.refuse("an object");
        for (const auto& pair : entry.value().items()) {
          metadata[pair.key()] = entry[pair.key()].string();
        }
      } else {
        tensors.emplace(item.key(), parse_tensor(entry, data_begin, size_ - data_begin));
      }
    }
    check_coverage(tensors, data_begin, size_ - data_begin, name);
  }

  ~Shard() {
    if (map_ != nullptr) ::munmap(map_, size_);
  }

  const InputFile& file() const { return file_; }

  // The whole file, mapped privately: writes to it stay in this process.
  std::byte* map() {
    const std::lock_guard lock(mutex_);
    if (const uint64_t now = file_.size(); now < size_) {
      throw Error(file_.path().string() + " has shrunk from " + std::to_string(size_) + " to " +
                  std::to_string(now) + " bytes since it was opened");
    }
    if (map_ == nullptr) {
      void* map =
          ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE, file_.descriptor(), 0);
      if (map == MAP_FAILED) {
        throw Error("cannot map " + file_.path().string() + ": " + std::strerror(errno));
      }
      map_ = static_cast<std::byte*>(map);
    }
    return map_;
  }

  std::map<std::string, TensorInfo> tensors;
  std::map<std::string, std::string> metadata;

 private:
  InputFile file_;
  uint64_t size_;
  std::mutex mutex_;
  std::byte* map_ = nullptr;
};

}  // namespace

struct Safetensors::Contents {
  std::string name;
  std::vector<std::shared_ptr<Shard>> shards;
  std::map<std::string, TensorInfo> tensors;
  std::map<std::string, size_t> shard_of;
  std::map<std::string, std::string> metadata;

  size_t add_shard(const std::filesystem::path& path) {
    shards.push_back(std::make_shared<Shard>(path));
    const Shard& shard = *shards.back();
    for (const auto& [tensor, info] : shard.tensors) {
      const auto [place, added] = shard_of.emplace(tensor, shards.size() - 1);
      if (!added) {
        throw Error("tensor " + quote(tensor) + " is in both " + path.string() + " and " +
                    shards[place->second]->file().path().string());
      }
      tensors.emplace(tensor, info);
    }
    metadata.insert(shard.metadata.begin(), shard.metadata.end());
    return shards.size() - 1;
  }

  void add_index(const std::filesystem::path& path) {
    const std::string file = path.string();
    const nlohmann::json json = parse_json(read_file(path, kMaxIndex), file, 4);
    const JsonView index(json, file);
    index.only({"metadata", "weight_map"});
    const JsonView weights = index["weight_map"];
    if (!weights.value().is_object()) weights.refuse("an object");
    std::map<std::string, size_t> opened;
    for (const auto& item : weights.value().items()) {
      const JsonView entry = weights[item.key()];
      const std::string& shard = entry.string();
      const bool plain = shard.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos;
      if (!plain || !shard.ends_with(".safetensors") || shard.starts_with('.')) {
        entry.refuse("the name of a .safetensors file in the same folder");
      }
      if (!opened.contains(shard)) opened[shard] = add_shard(path.parent_path() / shard);
      const auto place = shard_of.find(item.key());
      if (place == shard_of.end() || place->second != opened[shard]) {
        throw Error(file + ": tensor " + quote(item.key()) + " is not in " + quote(shard));
      }
    }
    for (const auto& [tensor, place] : shard_of) {
      if (!weights.value().contains(tensor)) {
        throw Error(file + ": has no entry for tensor " + quote(tensor) + " of " +
                    shards[place]->file().path().string());
      }
    }
  }

  std::pair<const TensorInfo&, Shard&> find(const std::string& tensor) const {
    const auto place = shard_of.find(tensor);
    if (place == shard_of.end()) throw Error(name + " has no tensor " + quote(tensor));
    return {tensors.at(tensor), *shards[place->second]};
  }
};

Safetensors Safetensors::open(const std::filesystem::path& path) {
  auto contents = std::make_shared<Contents>();
  std::filesystem::path file = path;
  if (std::error_code ignored; std::filesystem::is_directory(path, ignored)) {
    const bool single = std::filesystem::exists(path / kSingle, ignored);
    file = path / (single ? kSingle : kIndex);
    if (!single && !std::filesystem::exists(file, ignored)) {
      throw Error("folder " + path.string() + " has neither " + kSingle + " nor " + kIndex);
    }
  }
  contents->name = file.string();
  if (file.extension() == ".json") {
    contents->add_index(file);
  } else {
    contents->add_shard(file);
  }
  return Safetensors(std::move(contents));
}

const std::map<std::string, TensorInfo>& Safetensors::tensors() const { return contents_->tensors; }

const std::map<std::string, std::string>& Safetensors::metadata() const {
  return contents_->metadata;
}

torch::Tensor Safetensors::load(const std::string& name) const {
  const auto [info, shard] = contents_->find(name);
  torch::Tensor tensor = torch::empty(info.shape, info.dtype);
  auto* data = static_cast<uint8_t*>(tensor.data_ptr());
  shard.file().read(info.offset, data, info.bytes);
  if (info.dtype == torch::kBool) {
    const uint8_t* bad = std::find_if(data, data + info.bytes, [](uint8_t b) { return b > 1; });
    if (bad != data + info.bytes) {
      throw Error(shard.file().path().string() + ": tensor " + quote(name) +
                  " of dtype BOOL has a byte " + std::to_string(*bad) + ", but must have 0 and 1");
    }
  }
  return tensor;
}

torch::Tensor Safetensors::view(const std::string& name) const {
  const auto [info, shard] = contents_->find(name);
  const bool aligned = info.offset % c10::elementSize(info.dtype) == 0;
  if (info.bytes == 0 || !aligned || info.dtype == torch::kBool) return load(name);
  std::byte* data = shard.map() + info.offset;
  // The deleter holds the contents, hence the map, until the last tensor over it is gone.
  return torch::from_blob(
      data, info.shape, [contents = contents_](void*) {}, info.dtype);
}

void write_safetensors(const std::filesystem::path& path,
                       const std::map<std::string, torch::Tensor>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  const auto rank = [](const torch::Tensor& tensor) {
    return std::find_if(kDtypes.begin(), kDtypes.end(),
                        [&](const Dtype& d) { return d.type == tensor.scalar_type(); }) -
           kDtypes.begin();
  };
  std::vector<std::pair<ptrdiff_t, const std::pair<const std::string, torch::Tensor>*>> order;
  for (const auto& entry : tensors) {
    const auto& [name, tensor] = entry;
    const std::string what = "cannot write tensor " + quote(name) + " to " + path.string() + ": ";
    if (name == "__metadata__") throw Error(what + "the name is reserved");
    if (!tensor.defined()) throw Error(what + "it is undefined");
    if (tensor.layout() != torch::kStrided || rank(tensor) == ptrdiff_t{kDtypes.size()}) {
      throw Error(what + "it is " + c10::toString(tensor.scalar_type()) + ", " +
                  (tensor.layout() != torch::kStrided ? "not dense, " : "") +
                  "but must be a dense tensor of " + dtype_names());
    }
    order.emplace_back(rank(tensor), &entry);
  }
  std::stable_sort(order.begin(), order.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });

  nlohmann::json header = nlohmann::json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  uint64_t offset = 0;
  for (const auto& [place, entry] : order) {
    const auto& [name, tensor] = *entry;
    const uint64_t end = offset + static_cast<uint64_t>(tensor.nbytes());
    header[name] = {{"dtype", kDtypes[static_cast<size_t>(place)].name},
                    {"shape", tensor.sizes().vec()},
                    {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const nlohmann::json::exception&) {
    throw Error("cannot write " + path.string() + ": a name or its metadata is not UTF-8");
  }
  uint64_t header_bytes = text.size() + sizeof(uint64_t);
  header_bytes += (kDataAlignment - header_bytes % kDataAlignment) % kDataAlignment;
  header_bytes -= sizeof header_bytes;
  text.resize(header_bytes, ' ');

  AtomicFile file(path);
  file.write(&header_bytes, sizeof header_bytes);
  file.write(text);
  for (const auto& [place, entry] : order) {
    const torch::Tensor tensor = entry->second.detach().cpu().contiguous();
    file.write(tensor.data_ptr(), static_cast<size_t>(tensor.nbytes()));
  }
  file.commit();
}

}  // namespace twell::app
