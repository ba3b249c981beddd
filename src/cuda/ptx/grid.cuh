#pragma once
// Overlap of dependent kernels (programmatic dependent launch), sm_90 and newer; before that a
// kernel starts after the previous one anyway.

namespace twell::cuda::ptx {

// Before this returns nothing of the previous kernel may be read or overwritten.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's CTAs start, up to their wait, once every CTA of this one has called this.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace twell::cuda::ptx
