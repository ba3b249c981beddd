#pragma once
// Removing the neurons that never fire from a checkpoint of ReLU-gated blocks. A neuron with
// relu(x Gᵀ) = 0 for every token adds nothing to y = h D: without it, the outputs on those tokens
// stay what they are.

#include <torch/torch.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <vector>

#include "app/hf/config.h"

namespace twell::app {

struct Compaction {
  std::vector<int64_t> fired;       // per layer: how many did
  std::vector<torch::Tensor> kept;  // per layer: ascending neurons, int64
  LayerWidths widths;               // afterwards; where larger than `kept`, zeros fill up
};

// Keeps the neurons that fired. `activity` holds per layer the tokens for which each neuron was
// active, [neurons] integer. The width of a layer is the number that fired, rounded up to a
// multiple of `multiple`, at least one, and at most what it was. With `one_width` all layers get
// the largest of these. The first of the silent neurons fill the width up: on other text they may
// fire. Error, with the reason, if all widths are as before.
Compaction plan_compaction(const std::vector<torch::Tensor>& activity, int64_t multiple,
                           bool one_width);

// Writes the checkpoint `from` to the folder `to` with the blocks' matrices cut to `compaction`:
// kept neurons in their old order, then zeros up to the width, which never fire. Every tensor keeps
// its dtype, every value its bits. The tokenizer's files come along. Error if `to` holds anything.
void write_compacted(const std::filesystem::path& from, const std::filesystem::path& to,
                     const Compaction& compaction);

// Error if `folder` exists and is not an empty folder.
void check_output_folder(const std::filesystem::path& folder);

struct CheckpointBytes {
  int64_t all = 0;
  std::map<int64_t, int64_t> ffn;  // by layer
};

// Of a checkpoint's tensors.
CheckpointBytes checkpoint_bytes(const std::filesystem::path& folder);

}  // namespace twell::app
