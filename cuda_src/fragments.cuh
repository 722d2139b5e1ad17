// How bytes in the ring become A operands of the products: 16-bit elements go as they are, 8-bit ones are widened to
// FP16, which holds every value of every 8-bit type exactly. A NaN stays one.
//
// An ldmatrix of 8-bit rows moves pairs of bytes where the product wants pairs of 16-bit elements. What it puts into
// the wrong place is put right at the other end, where that costs nothing:
//   K    A lane gets elements 4 c to 4 c + 3 of its token (c = lane % 4), the product wants 2 c, 2 c + 1, 2 c + 8 and
//        2 c + 9. A sum of products has no order, so Query deals its elements out in the same way.
//   V    Transposed, a lane gets elements 2 r, 2 r + 1 (r = lane / 4) of two tokens; the product wants both tokens of
//        one element. Taken as rows r and r + 8 they permute the rows of the output, which publish() undoes.
#pragma once
#include "paged_load.cuh"

namespace pkv {

// Among 16 elements of the output, neighbouring rows of lanes hold elements so far apart, and a lane's two are so far
// apart.
constexpr int LANES_APART = CACHE_TYPE ? 2 : 1, ROWS_APART = CACHE_TYPE ? 1 : 8;

#if CACHE_TYPE
// Selectors of permute() that make a pair of halves of bytes a and b: each becomes its half's upper byte, or its lower
// one (the other byte comes from the second register), or its lower one below 8 copies of its sign.
__device__ constexpr unsigned as_upper(int a, int b) { return 0x0404u | static_cast<unsigned>(a << 4 | b << 12); }
__device__ constexpr unsigned as_lower(int a, int b) { return 0x4040u | static_cast<unsigned>(a | b << 8); }
__device__ constexpr unsigned as_signed(int a, int b) { return 0x8080u | static_cast<unsigned>(a * 0x11 | b * 0x1100); }

#if CACHE_TYPE == 1 && !CONVERTS_E4M3
// Widens e4m3 codes, each of which is in a half with its sign extended. Their bits at FP16's place are their value /
// 256, and NaN codes are 1.875.
__device__ __forceinline__ unsigned widen_e4m3(unsigned halves) {
  const unsigned small = halves << 7 & 0xbf80bf80u;
  // 1.75 x 37408 is finite, 1.875 x 37408 infinite, which times 0 makes a NaN.
  return multiply_add_pair(multiply_pair(small, 0x78917891u), 0u, multiply_pair(small, 0x5c005c00u));
}
#endif

// Bytes 0 and 1 of x become the pair `first`, bytes 2 and 3 become `second`; with ALTERNATE they are 0 and 2, 1 and 3.
template <bool ALTERNATE>
__device__ __forceinline__ void widen(unsigned& first, unsigned& second, unsigned x) {
  [[maybe_unused]] constexpr int B = ALTERNATE ? 2 : 1, C = ALTERNATE ? 1 : 2;
#if CACHE_TYPE == 2
  // e5m2 is the upper byte of FP16.
  first = permute(x, 0, as_upper(0, B));
  second = permute(x, 0, as_upper(C, 3));
#elif CACHE_TYPE == 3
  // 0x64uu is 1024 + u, and u the value + 128.
  x ^= 0x80808080u;
  first = add_pair(permute(x, 0x64646464u, as_lower(0, B)), 0xe480e480u);  // - 1152
  second = add_pair(permute(x, 0x64646464u, as_lower(C, 3)), 0xe480e480u);
#elif CONVERTS_E4M3
  convert_e4m3(first, second, ALTERNATE ? permute(x, 0, 0x3120) : x);
#else
  first = widen_e4m3(permute(x, 0, as_signed(0, B)));
  second = widen_e4m3(permute(x, 0, as_signed(C, 3)));
#endif
}
#endif

// The A operands of a K tile, each 16 tokens by 16 elements of d. One ldmatrix of 8-bit elements serves two steps.
struct KeyFragments {
  unsigned at;  // what this lane addresses of the first step
#if CACHE_TYPE
  unsigned x[4];
#endif

  __device__ __forceinline__ KeyFragments(unsigned tile, int lane)
      : at(tile + ring_offset<K_ROW_BYTES>(lane & 15, lane >> 4)) {}
  __device__ __forceinline__ void get(unsigned (&k)[4], int step) {
#if CACHE_TYPE
    if (step % 2 == 0) load_matrix(x, ring_further<K_ROW_BYTES>(at, 0, step));
    widen<false>(k[0], k[2], x[step % 2 * 2]);
    widen<false>(k[1], k[3], x[step % 2 * 2 + 1]);
#else
    load_matrix(k, ring_further<K_ROW_BYTES>(at, 0, 2 * step));
#endif
  }
};

// The A operands of a V tile, each 16 elements of d by 16 tokens.
struct ValueFragments {
  unsigned at;
#if CACHE_TYPE
  unsigned x[4];
  __device__ __forceinline__ ValueFragments(unsigned tile, int lane)
      : at(tile + ring_offset<V_ROW_BYTES>(lane & 15, lane >> 4)) {}
#else
  __device__ __forceinline__ ValueFragments(unsigned tile, int lane)
      : at(tile + ring_offset<V_ROW_BYTES>((lane & 7) + ((lane >> 4) << 3), lane >> 3 & 1)) {}
#endif

  __device__ __forceinline__ void get(unsigned (&v)[4], int step) {
#if CACHE_TYPE
    if (step % 2 == 0) load_matrix_transposed(x, ring_further<V_ROW_BYTES>(at, 0, step));
    widen<true>(v[0], v[1], x[step % 2 * 2]);
    widen<true>(v[2], v[3], x[step % 2 * 2 + 1]);
#else
    load_matrix_transposed(v, ring_further<V_ROW_BYTES>(at, 0, 2 * step));
#endif
  }
};

}  // namespace pkv
