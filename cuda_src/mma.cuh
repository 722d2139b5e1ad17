// The instructions the kernels are made of: asynchronous copies, tensor-core products, the 16-bit type. sm_80 and newer.
#pragma once

#if DTYPE_BF16
#include <cuda_bf16.h>
typedef __nv_bfloat16 half_type;
typedef __nv_bfloat162 half_pair;
#else
#include <cuda_fp16.h>
typedef __half half_type;
typedef __half2 half_pair;
#endif

namespace pkv {

__device__ __forceinline__ unsigned pack(float low, float high) {
#if DTYPE_BF16
  half_pair pair = __floats2bfloat162_rn(low, high);
#else
  half_pair pair = __floats2half2_rn(low, high);
#endif
  return *reinterpret_cast<unsigned*>(&pair);
}

__device__ __forceinline__ float2 unpack(unsigned value) {
  const half_pair pair = *reinterpret_cast<half_pair*>(&value);
#if DTYPE_BF16
  return __bfloat1622float2(pair);
#else
  return __half22float2(pair);
#endif
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// 16 bytes to shared memory past L1; bytes beyond `valid_bytes` are filled with zero and not read.
__device__ __forceinline__ void copy_async(unsigned destination, const void* source, int valid_bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(valid_bytes));
}
__device__ __forceinline__ void copy_async(unsigned destination, const void* source) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(destination), "l"(source));
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void load_matrix(unsigned (&r)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_matrix_transposed(unsigned (&r)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ unsigned transpose(unsigned value) {
  unsigned result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(value));
  return result;
}

// d[16x8] += a[16x16] * b[16x8], FP32 accumulators.
__device__ __forceinline__ void multiply_add(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if DTYPE_BF16
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Programmatic dependent launch (sm_90): the next kernel of the stream may be set up while this one runs, and this one
// reads nothing before the previous one's writes are visible. Does nothing in an ordinary launch.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace pkv
