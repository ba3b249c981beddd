#pragma once
// The products on every GPU since Ampere (sm_80), shipped as PTX: mma.sync and cp.async.

#include "cuda/forward.h"

namespace twell::cuda::sm80 {

Status launch_gate(const ForwardChunk& chunk, const Tokens& x, const void* gate,
                   int multiprocessors, cudaStream_t stream);
Status launch_up(const ForwardChunk& chunk, const Tokens& x, const void* up, int multiprocessors,
                 cudaStream_t stream);
Status launch_down(const ForwardChunk& chunk, const void* down, void* y, int multiprocessors,
                   cudaStream_t stream);

}  // namespace twell::cuda::sm80
