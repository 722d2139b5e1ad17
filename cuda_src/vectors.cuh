// Whole vectors between registers and global memory. The instructions are spelled out because the compiler has made
// four stores of a uint4.
#pragma once

namespace pkv {

// Reads past L1, which has no use for what is read once.
__device__ __forceinline__ uint4 load_once(const void* at) {
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "l"(at));
  return value;
}

__device__ __forceinline__ void store(void* at, uint4 value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w) : "memory");
}
__device__ __forceinline__ void store(void* at, uint2 value) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(at), "r"(value.x), "r"(value.y) : "memory");
}

}  // namespace pkv
