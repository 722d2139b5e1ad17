// CUDA's vector types and what reads their bits, for the stand-ins of its kernels on a CPU.
#pragma once
#include <cstring>

struct int2 { int x, y; };
struct int3 { int x, y, z; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
[[maybe_unused]] static int2 make_int2(int x, int y) { return {x, y}; }
[[maybe_unused]] static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
[[maybe_unused]] static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
[[maybe_unused]] static float2 make_float2(float x, float y) { return {x, y}; }
[[maybe_unused]] static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class To, class From>
static To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
static unsigned __float_as_uint(float x) { return bits<unsigned>(x); }
[[maybe_unused]] static int __float_as_int(float x) { return bits<int>(x); }
static float __uint_as_float(unsigned x) { return bits<float>(x); }
template <class T>
[[maybe_unused]] static T __ldcg(const T* at) { return *at; }
