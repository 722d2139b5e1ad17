// The instructions that the kernels are made of: asynchronous copies, tensor-core products, barriers, the 16-bit type.
// They need sm_80. Nothing but instructions is here, since the CPU tests put an empty file in its place.
#pragma once

#include "variant.cuh"

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

// Two numbers as the products take them, and back.
__device__ __forceinline__ unsigned pack_operands(float low, float high) {
#if DTYPE_BF16 && FP16_OPERANDS
  unsigned pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return pack(low, high);
#endif
}
__device__ __forceinline__ float2 unpack_operands(unsigned pair) {
#if DTYPE_BF16 && FP16_OPERANDS
  float2 value;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(value.x), "=f"(value.y) : "r"(pair));
  return value;
#else
  return unpack(pair);
#endif
}

// These three compute on pairs of FP16, whatever half_type is.
__device__ __forceinline__ unsigned add_pair(unsigned a, unsigned b) {
  unsigned sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}
__device__ __forceinline__ unsigned multiply_pair(unsigned a, unsigned b) {
  unsigned product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}
__device__ __forceinline__ unsigned multiply_add_pair(unsigned a, unsigned b, unsigned c) {
  unsigned sum;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}

// Byte i of the result is the one of {low, high} that nibble i of the selector numbers, or, with its bit 3 set, 8
// copies of that byte's sign.
__device__ __forceinline__ unsigned permute(unsigned low, unsigned high, unsigned selector) {
  unsigned result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
}

#if CONVERTS_E4M3
// Bytes 0 and 1 of x become the FP16 pair `first`, bytes 2 and 3 become `second`.
__device__ __forceinline__ void convert_e4m3(unsigned& first, unsigned& second, unsigned x) {
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.rn.f16x2.e4m3x2 %0, low; cvt.rn.f16x2.e4m3x2 %1, high; }"
      : "=r"(first), "=r"(second) : "r"(x));
}
#endif

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Starts a copy of 16 bytes to shared memory, past L1. Bytes beyond `valid_bytes` are not read but become zero.
__device__ __forceinline__ void copy_async(unsigned destination, const void* source, int valid_bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               ::"r"(destination), "l"(source), "r"(valid_bytes));
}
__device__ __forceinline__ void copy_async(unsigned destination, const void* source) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(destination), "l"(source));
}
// Starts a copy of one float, through L1, since copies of fewer than 16 bytes have no other way.
__device__ __forceinline__ void copy_float_async(unsigned destination, const float* source, int valid_bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(destination), "l"(source), "r"(valid_bytes));
}
__device__ __forceinline__ float2 load_shared(unsigned address) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(address) : "memory");
  return value;
}
// Returns the same address and hides where it came from, so that the compiler reaches what lies near it by one addition
// instead of a computation from the start.
template <class T>
__device__ __forceinline__ const T* keep_address(const T* at) {
  asm("" : "+l"(at));
  return at;
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Whole warps meet here, so many of those that name the same id (0 is __syncthreads'). What each did in memory before
// is seen by all of them afterwards.
template <int WARPS_MEETING>
__device__ __forceinline__ void sync_warps(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(WARPS_MEETING * 32) : "memory");
}

// A barrier in shared memory at which warps arrive without stopping. Phase n (from 0) ends with the last warp's
// arrival.
struct __align__(8) ArrivalBarrier {
  unsigned long long word;

  __device__ __forceinline__ void init(int warps) {
#if PKV_RACECHECK
    const int arrivals = warps * 32;
#else
    const int arrivals = warps;
#endif
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals) : "memory");
  }
  // Is called by whole warps, each of which counts once. compute-sanitizer's racecheck does not see that __syncwarp
  // orders the lanes' writes before the arrival of one of them, so with PKV_RACECHECK every lane arrives.
  __device__ __forceinline__ void arrive(int lane) {
    __syncwarp();
    if (PKV_RACECHECK || lane == 0)
      asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }"
                   ::"r"(shared_address(this)) : "memory");
  }
  __device__ __forceinline__ void wait(int phase) {
    int done;
    do {
      asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
                   : "=r"(done) : "r"(shared_address(this)), "r"(phase & 1) : "memory");
    } while (!done);
  }
};

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

// Adds a[16x16] * b[16x8] to d[16x8]; sums are FP32.
__device__ __forceinline__ void multiply_add(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if !FP16_OPERANDS
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#endif
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same of BF16 operands whatever the 16-bit type is, and pairs of them.
__device__ __forceinline__ void multiply_add_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// The same value, which the compiler takes for another each time: what is computed of it stays in its loop.
__device__ __forceinline__ uint4 here_and_now(uint4 v) {
  asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w));
  return v;
}

// Reads 16 bytes that nobody reads again, and what other CTAs have written meanwhile, which is not in L1.
__device__ __forceinline__ uint4 load_constant(const half_type* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}
template <class T>
__device__ __forceinline__ T load_past_l1(const T* from) { return __ldcg(from); }

#if __CUDA_ARCH__ >= 900
constexpr bool KERNELS_OVERLAP = true;
#else
constexpr bool KERNELS_OVERLAP = false;
#endif

// Programmatic dependent launch (sm_90). The next kernel may be set up while this one runs; this one's reads count
// only after the wait, when the previous one's writes are visible. Both do nothing in an ordinary launch.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// These carry words between CTAs. No order is promised, so every word has to say for itself that it is there.
__device__ __forceinline__ void send(float4* to, const float4& v) {
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1,%2,%3,%4};"
               ::"l"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
__device__ __forceinline__ void send(float2* to, const float2& v) {
  asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1,%2};" ::"l"(to), "f"(v.x), "f"(v.y) : "memory");
}
__device__ __forceinline__ float2 receive(const float2* from) {
  float2 v;
  asm volatile("ld.relaxed.gpu.global.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(from) : "memory");
  return v;
}

// Where kernels overlap (sm_90) L2 holds this much beside what streams through it: a third of what it is.
constexpr long long MOST_KEPT_BYTES = KERNELS_OVERLAP ? 18ll << 20 : 0;

// Writes what is read before long, and L2 keeps it meanwhile: written to memory at once, it would make DRAM turn from
// reading to writing and back.
__device__ __forceinline__ void store_kept(float* to, float x) {
  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("st.global.L2::cache_hint.f32 [%0], %1, %2;" ::"l"(to), "f"(x), "l"(policy) : "memory");
}

// One more of what other CTAs count, too: how many were before. What a CTA wrote before it counted (its threads having
// met) is seen by those that count later.
__device__ __forceinline__ int take_ticket(int* from) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(from) : "memory");
  return before;
}

// The same between GPUs: system scope.
__device__ __forceinline__ void send_to_rank(float4* to, const float4& v) {
  asm volatile("st.relaxed.sys.global.v4.f32 [%0], {%1,%2,%3,%4};"
               ::"l"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
__device__ __forceinline__ void send_to_rank(float2* to, const float2& v) {
  asm volatile("st.relaxed.sys.global.v2.f32 [%0], {%1,%2};" ::"l"(to), "f"(v.x), "f"(v.y) : "memory");
}
__device__ __forceinline__ void send_to_rank(unsigned* to, unsigned v) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}
__device__ __forceinline__ float4 receive_from_rank(const float4* from) {
  float4 v;
  asm volatile("ld.relaxed.sys.global.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from) : "memory");
  return v;
}
__device__ __forceinline__ float2 receive_from_rank(const float2* from) {
  float2 v;
  asm volatile("ld.relaxed.sys.global.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(from) : "memory");
  return v;
}
__device__ __forceinline__ unsigned receive_from_rank(const unsigned* from) {
  unsigned v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
  return v;
}
__device__ __forceinline__ void add_at_rank(unsigned* to, unsigned more) {
  asm volatile("red.relaxed.sys.global.add.u32 [%0], %1;" ::"l"(to), "r"(more) : "memory");
}
// Nanoseconds of a clock that all SMs share.
__device__ __forceinline__ long long nanoseconds() {
  long long now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

__device__ __forceinline__ void prefetch_l2(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// tanh, right to about 1e-7: the instruction tanh.approx errs by 5e-4.
__device__ __forceinline__ float hyperbolic_tangent(float x) {
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * 2.8853900817779268f));  // exp(2 x)
  return 1.0f - __fdividef(2.0f, e + 1.0f);
}

__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The larger of the two, or NaN where one of them is.
__device__ __forceinline__ float max_or_nan(float x, float y) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(x), "f"(y));
  return larger;
}

__device__ __forceinline__ float sqrt_fast(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace pkv
