#pragma once
// The forward for few tokens, bound by reading the weights: the gate is read once per group of
// tokens, then only the rows of U and D that are active. Runs on sm_80 and newer.

#include <cuda_runtime_api.h>

#include <cstddef>
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
  int groups;
  int group_tokens;  // 8, 16 or 32
  int units;
  int unit_neurons;  // at most kMaxDecodeUnit
  bool overlap;      // the device can start a kernel before the previous one ends: sm_90 and newer

  // Shared memory of the hidden kernel, at least: more than half of a multiprocessor's, so that
  // the next one's CTAs do not start, and read ahead, before this one's have ended.
  std::size_t hidden_shared;

  std::uint64_t* masks;    // [groups, units]: a bit for each neuron in use
  std::uint16_t* h;        // [groups, neurons, group_tokens]: rows of the neurons in use only
  std::int32_t* activity;  // [neurons], accumulated; null: no counts wanted
  float* partial_l1;       // [groups, units]
};

// masks, h ← the hidden values, and the counts if wanted.
Status launch_decode_hidden(const DecodeCall& call, cudaStream_t stream);

// y ← h D.
Status launch_decode_down(const DecodeCall& call, cudaStream_t stream);

}  // namespace twell::cuda
