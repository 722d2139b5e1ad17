// cuda_src/wide_product.cu on a CPU: every thread of a CTA a fiber, one CTA after the other, each of which waits only for
// such as were started before it.
#include "instructions_on_cpu.h"

namespace pkv {
// What is asked for must be there: the weights' bounds are told before a run.
static const unsigned char *weight_begin, *weight_end;
static void bring_to_l2(const void* from, unsigned bytes) {
  const auto* at = static_cast<const unsigned char*>(from);
  if (at < weight_begin || at + bytes > weight_end) complain("weights that are not there are brought to L2");
  if (reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16 || bytes == 0) complain("a prefetch is not aligned");
}
}  // namespace pkv
#include "wide_product.cu"

static pkv::WideArguments given;

// x, `words` of it, is written by the previous kernel, and NaN before.
extern "C" const char* run(int num_ctas, const void* arguments, int* x, int words) {
  using namespace pkv;
  std::memcpy(&given, arguments, sizeof given);
  weight_begin = reinterpret_cast<const unsigned char*>(given.weight);
  weight_end = weight_begin + 2ll * given.rows * DEPTH;
  late = {{x, std::vector<int>(words, -1), std::vector<int>(x, x + words)}};
  previous_ended = true;
  body = [] { pkv_wide_product(given); };
  run_ctas(num_ctas, 1, false, [](bool ends) {
    if (!ends) previous_kernel(false);
  });
  return complained();
}
