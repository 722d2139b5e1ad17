// cuda_src/product.cu on a CPU: every thread of a CTA a fiber, one CTA after the other.
#include "instructions_on_cpu.h"

#include <cmath>

namespace pkv {
inline uint4 load_constant(const half_type* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) complain("a vector is not aligned");
  uint4 value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
}  // namespace pkv
static float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

#include "product.cu"

static pkv::ProductArguments given;

extern "C" const char* run(int num_ctas, const void* arguments) {
  std::memcpy(&given, arguments, sizeof given);
  body = [] { pkv_product(given); };
  run_ctas(num_ctas);
  return complained();
}
