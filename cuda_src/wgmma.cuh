// The products of a warpgroup: four warps multiply 64 rows from their registers by what lies in shared memory. They need
// sm_90a. Nothing but instructions is here, since the CPU tests put an empty file in its place.
#pragma once
#include "mma.cuh"

namespace pkv {

// Where the 16 x N operand of a product lies, rows of 128 bytes in groups of eight (1 KiB, whose vectors of 16 bytes are
// XORed with the row: the 128-byte swizzle): PTX manual, "Asynchronous Warpgroup Level Matrix Shared Memory Layout".
//   rows are the N dimension    eight of them to the next: 1 KiB
//   rows are the K dimension    the same, and so many bytes from 64 columns to the next 64
__device__ __forceinline__ unsigned long long shared_operand(unsigned address, unsigned bytes_between_blocks) {
  constexpr unsigned long long SWIZZLE_128 = 1ull << 62, EIGHT_ROWS = 1024 >> 4;
  return SWIZZLE_128 | EIGHT_ROWS << 32 | static_cast<unsigned long long>(bytes_between_blocks >> 4) << 16
         | (address & 0x3ffff) >> 4;
}

// The operand that lies so many bytes further on, a multiple of 16.
__device__ __forceinline__ unsigned long long further(unsigned long long operand, int bytes) {
  return operand + (bytes >> 4);
}

// What the threads' copies wrote becomes visible to the products. Before the barrier after which others read it.
__device__ __forceinline__ void publish_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Registers of products are not touched from begin_products to end_products.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
template <int COUNT>
__device__ __forceinline__ void hold(float (&d)[COUNT]) {
  #pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int COUNT>
__device__ __forceinline__ void end_products(float (&d)[COUNT]) {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  hold(d);
}

#define PKV_D8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define PKV_D16(d, i) PKV_D8(d, i), PKV_D8(d, i + 8)
#define PKV_D32(d, i) PKV_D16(d, i), PKV_D16(d, i + 16)
#define PKV_D64(d, i) PKV_D32(d, i), PKV_D32(d, i + 32)
#define PKV_R16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define PKV_R32 PKV_R16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define PKV_R64 \
  PKV_R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
          ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#if FP16_OPERANDS
#define PKV_OPERANDS ".f32.f16.f16 "
#else
#define PKV_OPERANDS ".f32.bf16.bf16 "
#endif
#define PKV_WGMMA(n, d, results, registers, a0, a1, a2, a3, at, added) \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" added ", 0;\n" \
               "wgmma.mma_async.sync.aligned.m64n" n "k16" PKV_OPERANDS "{" registers "}, {%" a0 ",%" a1 ",%" a2 ",%" a3 \
               "}, %" at ", p, 1, 1, %" PKV_LAST_OF_##results "; }" \
               : results(d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(ROWS_ARE_K)))
#define PKV_LAST_OF_PKV_D16 "22"
#define PKV_LAST_OF_PKV_D32 "38"
#define PKV_LAST_OF_PKV_D64 "70"

// d[64 x N] = a[64 x 16] * b[16 x N], or is added to where `add`. A thread's part of a and of d is that of m16n8k16:
// warp w of the four has rows 16 w on. ROWS_ARE_K: see shared_operand.
template <bool ROWS_ARE_K>
__device__ __forceinline__ void multiply_group(float (&d)[16], const unsigned (&a)[4], unsigned long long b, bool add) {
  PKV_WGMMA("32", d, PKV_D16, PKV_R16, "16", "17", "18", "19", "20", "21");
}
template <bool ROWS_ARE_K>
__device__ __forceinline__ void multiply_group(float (&d)[32], const unsigned (&a)[4], unsigned long long b, bool add) {
  PKV_WGMMA("64", d, PKV_D32, PKV_R32, "32", "33", "34", "35", "36", "37");
}
template <bool ROWS_ARE_K>
__device__ __forceinline__ void multiply_group(float (&d)[64], const unsigned (&a)[4], unsigned long long b, bool add) {
  PKV_WGMMA("128", d, PKV_D64, PKV_R64, "64", "65", "66", "67", "68", "69");
}

}  // namespace pkv
