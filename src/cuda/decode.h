#pragma once
// The forward for few tokens, bound by reading the weights: the gate is read once, then only the
// rows of U and D that are active. Tokens go in groups of 16. Runs on sm_80 and newer.

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
  bool overlap;  // the device can start a kernel before the previous one ends: sm_90 and newer

  std::uint8_t* masks;     // [groups, neurons / 8]: a bit for each neuron in use
  std::uint16_t* h;        // [groups, neurons, 16]: rows of the neurons in use only
  std::int32_t* activity;  // [neurons], accumulated; null: no counts wanted
  float* partial_l1;       // [decode_parts(call)]
};

// masks, h ← the hidden values, and the counts if wanted.
Status launch_decode_hidden(const DecodeCall& call, cudaStream_t stream);

// How many partial sums launch_decode_hidden writes.
int decode_parts(const DecodeCall& call);

// y ← h D.
Status launch_decode_down(const DecodeCall& call, cudaStream_t stream);

}  // namespace twell::cuda
