// Reads ahead into L2. Nothing but instructions is here, since the CPU tests put an empty file in its place.
#pragma once

namespace pkv {

// Asks for so many bytes from a 16-byte boundary on, a multiple of 16; does nothing before sm_90.
__device__ __forceinline__ void bring_to_l2(const void* from, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

}  // namespace pkv
