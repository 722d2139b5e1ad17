// The one instruction that early planning rests on (early_plan.cuh tells the whole of it).
#pragma once

#ifdef __CUDACC__
#define PKV_HD __host__ __device__ __forceinline__
#else
#define PKV_HD inline
#endif

namespace pkv {

// Reads what the kernel that writes it may not have written yet: past L1, which would keep the old value for the second
// read. Lanes that read one word in one instruction see one value.
template <class T>
PKV_HD T read_early(const T* from) {
#ifdef __CUDA_ARCH__
  T value;
  if constexpr (sizeof(T) == 8) asm volatile("ld.relaxed.gpu.global.s64 %0, [%1];" : "=l"(value) : "l"(from));
  else asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(from));
  return value;
#else
  return *from;
#endif
}

}  // namespace pkv
