// Rounding to the 8-bit types of a KV cache. It goes to the nearest number, ties to even, and saturates; in FP8 a NaN
// stays one.
#pragma once

namespace pkv {

// FP8 code of x by integers, for GPUs before sm_89, which have no instruction for it. MANTISSA_BITS: 3 e4m3, 2 e5m2.
template <int MANTISSA_BITS>
__device__ __forceinline__ unsigned encode_fp8(float x) {
  constexpr int BIAS = MANTISSA_BITS == 3 ? 7 : 15, DROPPED = 23 - MANTISSA_BITS;
  constexpr unsigned LARGEST = MANTISSA_BITS == 3 ? 0x7e : 0x7b, NOT_A_NUMBER = 0x7f;
  constexpr unsigned SMALLEST_NORMAL = static_cast<unsigned>(128 - BIAS) << 23;
  const unsigned bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return NOT_A_NUMBER;
  unsigned code;
  if (magnitude >= SMALLEST_NORMAL) {
    const unsigned rounded = magnitude + ((1u << (DROPPED - 1)) - 1) + (magnitude >> DROPPED & 1);
    code = (rounded >> DROPPED) - (static_cast<unsigned>(127 - BIAS) << MANTISSA_BITS);
  } else {
    // The sum's last bit is worth one step of the subnormal codes, so the addition does the rounding.
    constexpr unsigned ALIGNER = static_cast<unsigned>(151 - BIAS - MANTISSA_BITS) << 23;
    code = __float_as_uint(__uint_as_float(magnitude) + __uint_as_float(ALIGNER)) - ALIGNER;
  }
  return (bits >> 24 & 0x80u) | (code < LARGEST ? code : LARGEST);
}

#ifdef CACHE_TYPE
// Two values become 16 bits, of which the first has the low byte.
__device__ __forceinline__ unsigned quantize_pair(float low, float high) {
#if CACHE_TYPE == 3
  const int a = max(-127, min(127, __float2int_rn(low))), b = max(-127, min(127, __float2int_rn(high)));
  return (a & 0xff) | (b & 0xff) << 8;
#elif __CUDA_ARCH__ >= 890
  unsigned short codes;
#if CACHE_TYPE == 1
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
#else
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
#endif
  return codes;
#else
  constexpr int MANTISSA_BITS = CACHE_TYPE == 1 ? 3 : 2;
  return encode_fp8<MANTISSA_BITS>(low) | encode_fp8<MANTISSA_BITS>(high) << 8;
#endif
}
#endif

}  // namespace pkv
