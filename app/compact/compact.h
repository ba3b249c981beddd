#pragma once
// Removing the neurons that never fire from a checkpoint of ReLU-gated blocks. A neuron with
// relu(x Gᵀ) = 0 for every token adds nothing to y = h D: without it, the outputs on those tokens
// stay what they are.

#include <torch/torch.h>

#include <cstdint>
#include <filesystem>
#include <vector>

namespace twell::app {

struct Compaction {
  std::vector<torch::Tensor> kept;  // per layer: ascending neurons, int64
  int64_t width = 0;                // neurons of every layer afterwards
};

// Keeps the neurons that fired. `activity` holds per layer the tokens for which each neuron was
// active, [neurons] integer. transformers wants one width for all layers: the largest number kept,
// rounded up to a multiple of `multiple`, at least one. Error, with the reason, if that is not
// narrower than the layers are.
Compaction plan_compaction(const std::vector<torch::Tensor>& activity, int64_t multiple);

// Writes the checkpoint `from` to the folder `to` with the blocks' matrices cut to `compaction`:
// kept neurons in their old order, then zeros up to the width, which never fire. Every tensor keeps
// its dtype, every value its bits. The tokenizer's files come along. Error if `to` holds anything.
void write_compacted(const std::filesystem::path& from, const std::filesystem::path& to,
                     const Compaction& compaction);

// Error if `folder` exists and is not an empty folder.
void check_output_folder(const std::filesystem::path& folder);

// Bytes of all tensors of a checkpoint.
int64_t checkpoint_bytes(const std::filesystem::path& folder);

}  // namespace twell::app
