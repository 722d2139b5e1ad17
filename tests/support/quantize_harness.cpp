// The FP8 rounding of cuda_src/quantize.cuh that GPUs without the instruction use, on a CPU.
#include <cstring>

#define __device__
#define __forceinline__ inline

static inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
static inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

#include "quantize.cuh"

extern "C" void encode_e4m3(const float* values, int count, unsigned char* codes) {
  for (int i = 0; i < count; ++i) codes[i] = static_cast<unsigned char>(pkv::encode_fp8<3>(values[i]));
}
extern "C" void encode_e5m2(const float* values, int count, unsigned char* codes) {
  for (int i = 0; i < count; ++i) codes[i] = static_cast<unsigned char>(pkv::encode_fp8<2>(values[i]));
}
