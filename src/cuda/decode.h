#pragma once
// The forward for few tokens, bound by reading the weights: the gate is read once, then only the
// rows of U and D that are active. Runs on sm_80 and newer.

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/layout.h"
#include "twell/status.h"

namespace twell::cuda {

struct DecodeCall {
  const void* x;     // [tokens, hidden]
  const void* gate;  // [neurons, hidden]; null for a plain block
  const void* up;
  const void* down;
  void* y;
  int tokens;
  int hidden;
  int neurons;
  int tile_tokens;  // decode_tile(tokens)
  int units;
  int unit_neurons;  // at most kMaxDecodeUnit
  bool overlap;      // a kernel can start before the previous one ends: sm_90 and newer
  bool bulk;         // there are bulk copies, sm_90 and newer, and shared memory for kBulkRing

  std::uint64_t* masks;    // [units]: a bit for each neuron in use
  std::uint16_t* h;        // [neurons, tile_tokens]: rows of the neurons in use only
  std::int32_t* activity;  // [neurons], accumulated; null: no counts wanted
  float* partial_l1;       // [units]
};

// masks, h ← the hidden values, and the counts if wanted.
Status launch_decode_hidden(const DecodeCall& call, cudaStream_t stream);

// y ← h D.
Status launch_decode_down(const DecodeCall& call, cudaStream_t stream);

}  // namespace twell::cuda
