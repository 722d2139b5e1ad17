// cuda_src/wide_product.cu on a CPU: every thread of a CTA a fiber, one CTA after the other, each of which waits only for
// such as were started before it.
#include "instructions_on_cpu.h"

#include "wide_product.cu"

static pkv::WideArguments given;

// x, `words` of it, is written by the previous kernel, and NaN before.
extern "C" const char* run(int num_ctas, const void* arguments, int* x, int words) {
  using namespace pkv;
  std::memcpy(&given, arguments, sizeof given);
  late = {{x, std::vector<int>(words, -1), std::vector<int>(x, x + words)}};
  previous_ended = true;
  body = [] { pkv_wide_product(given); };
  gridDim = {num_ctas, 1, 1};
  for (blockIdx.x = 0; blockIdx.x < num_ctas; ++blockIdx.x) {
    previous_kernel(false);
    run_cta();
  }
  return complaint;
}
