// cuda_src/append.cu on a CPU: a warp is 32 threads that meet at its shuffles, one warp runs after the other.
//
// Stands in for mma.cuh and vectors.cuh, which are nothing but instructions; the test puts empty files in their place.
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "cuda_types_on_cpu.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __host__
using std::max;
using std::min;

[[maybe_unused]] static float __fmul_rn(float x, float y) { return x * y; }
[[maybe_unused]] static float __fadd_rn(float x, float y) { return x + y; }
[[maybe_unused]] static float __fsub_rn(float x, float y) { return x - y; }
[[maybe_unused]] static float __fdiv_rn(float x, float y) { return x / y; }
[[maybe_unused]] static float __frcp_rn(float x) { return 1.0f / x; }
[[maybe_unused]] static int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
[[maybe_unused]] static void sincospif(float x, float* s, float* c) {
  *s = static_cast<float>(std::sin(M_PI * x)), *c = static_cast<float>(std::cos(M_PI * x));
}
static int __popc(unsigned x) { return __builtin_popcount(x); }

static thread_local struct { int x; } threadIdx, blockIdx;
static std::barrier<> meeting(32);
static unsigned brought[32];

static unsigned __shfl_xor_sync(unsigned, unsigned value, int mask) {
  brought[threadIdx.x % 32] = value;
  meeting.arrive_and_wait();
  const unsigned theirs = brought[threadIdx.x % 32 ^ mask];
  meeting.arrive_and_wait();
  return theirs;
}
static unsigned __ballot_sync(unsigned, bool vote) {
  brought[threadIdx.x % 32] = vote;
  meeting.arrive_and_wait();
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= brought[lane] << lane;
  meeting.arrive_and_wait();
  return votes;
}

#if DTYPE_BF16
struct half_type {  // compilers have come by a bfloat16 with arithmetic only lately
  uint16_t word;
  half_type(float x) {
    const unsigned whole = bits<unsigned>(x);
    word = static_cast<uint16_t>((whole + 0x7fff + (whole >> 16 & 1)) >> 16);
  }
  operator float() const { return bits<float>(static_cast<unsigned>(word) << 16); }
};
#else
typedef _Float16 half_type;
#endif

namespace pkv {

static unsigned pack(float low, float high) {
  return bits<uint16_t>(static_cast<half_type>(low)) | bits<uint16_t>(static_cast<half_type>(high)) << 16;
}
static float2 unpack(unsigned pair) {
  half_type values[2] = {0.0f, 0.0f};
  std::memcpy(values, &pair, sizeof pair);
  return {static_cast<float>(values[0]), static_cast<float>(values[1])};
}
static uint4 load_once(const void* at) {
  uint4 value;
  std::memcpy(&value, at, sizeof value);
  return value;
}
template <class Vector>
static void store(void* at, Vector value) { std::memcpy(at, &value, sizeof value); }
static void let_next_kernel_start() {}
static void wait_for_previous_kernel() {}

}  // namespace pkv

#include "append.cu"

extern "C" int arguments_bytes() { return sizeof(pkv::AppendArguments); }

extern "C" void run(int num_ctas, const void* arguments) {
  pkv::AppendArguments given;
  std::memcpy(&given, arguments, sizeof given);
  for (int warp = 0; warp < num_ctas * pkv::WARPS; ++warp) {
    std::vector<std::jthread> lanes;
    for (int lane = 0; lane < 32; ++lane)
      lanes.emplace_back([=] {
        blockIdx.x = warp / pkv::WARPS, threadIdx.x = warp % pkv::WARPS * 32 + lane;
        pkv_append(given);
      });
  }
}
