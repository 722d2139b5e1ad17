// cuda_src/rows.cu on a CPU: every thread of a CTA a fiber, the CTAs in any order.
#include "instructions_on_cpu.h"

static void __threadfence() {}
static unsigned long long atomicMax(unsigned long long* at, unsigned long long value) {
  return std::exchange(*at, max(*at, value));
}
static unsigned long long atomicExch(unsigned long long* at, unsigned long long value) {
  return std::exchange(*at, value);
}
static unsigned atomicAdd(unsigned* at, unsigned value) { return std::exchange(*at, *at + value); }
static float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
#undef __shared__
#define __shared__ static
namespace pkv {
inline uint4 load_once(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) complain("a vector is not aligned");
  uint4 value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
inline void store(void* at, uint4 value) {
  if (reinterpret_cast<uintptr_t>(at) % 16) complain("a store is not aligned");
  std::memcpy(at, &value, sizeof value);
}
}  // namespace pkv
// vectors.cuh is empty beside this one.
#include "rows.cu"

template <class Given, void (*KERNEL)(Given)>
static const char* run_grid(const void* arguments, int x, int y) {
  static Given given;
  std::memcpy(&given, arguments, sizeof given);
  body = [] { KERNEL(given); };
  run_ctas(x, y, true);
  return complained();
}

extern "C" {
const char* run_norm(const void* given, int x, int y) { return run_grid<pkv::NormArguments, pkv_rms_norm>(given, x, y); }
const char* run_gate(const void* given, int x, int y) { return run_grid<pkv::GateArguments, pkv_silu_gate>(given, x, y); }
const char* run_argmax(const void* given, int x, int y) { return run_grid<pkv::ChoiceArguments, pkv_argmax>(given, x, y); }
}
