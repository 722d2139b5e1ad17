// cuda_src/select.cu and summaries.cu on a CPU: every thread of a CTA a fiber, one CTA after the other.
//
// Stands in for mma.cuh, as decode_harness.cpp does, and for what these kernels alone take of it.
#include "instructions_on_cpu.h"

#if SUMMARIES
#undef __shared__
#define __shared__ static  // one CTA runs at a time
#endif

static int atomicAdd(int* at, int value) {
  ++progress;
  return (*at += value) - value;
}
[[maybe_unused]] static unsigned atomicAdd(unsigned* at, unsigned value) {
  ++progress;
  return (*at += value) - value;
}
[[maybe_unused]] static void atomicOr(unsigned* at, unsigned bits) { *at |= bits; }

namespace pkv {

[[maybe_unused]] static unsigned pack_bf16(float low, float high) { return pair_of<bfloat16>(low, high); }
[[maybe_unused]] static void multiply_add_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  multiply_add_of<bfloat16>(d, a, b0, b1);
}
static uint4 load_constant(const half_type* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) complain("a load is not aligned");
  return *reinterpret_cast<const uint4*>(from);
}
[[maybe_unused]] static uint4 here_and_now(uint4 v) { return v; }
template <class T>
static T load_past_l1(const T* from) { return *from; }
[[maybe_unused]] static int take_ticket(int* from) { return atomicAdd(from, 1); }
[[maybe_unused]] static float sqrt_fast(float x) { return std::sqrt(x); }

}  // namespace pkv

#if SUMMARIES
#include "summaries.cu"
typedef pkv::SummaryArguments Given;
static void kernel(const Given& given) { pkv_summarize_pages(given); }
#else
#include "select.cu"
// Bytes of shared memory of a step whose rows are of so many pages, in such chunks.
extern "C" int needed_bytes(int score_stride, int chunk_pages) {
  using namespace pkv;
  const int blocks = (score_stride + BLOCK_PAGES - 1) / BLOCK_PAGES;
  const int selecting = (select_words(score_stride) + (WEIGHS ? blocks * PAGE_VALUES : 0)) * 4;
  return sizeof(SelectMemory) + max(selecting, WEIGHS ? chunk_pages * PAGE_VALUES * 4 : 0);
}
typedef pkv::SelectArguments Given;
static void kernel(const Given& given) { pkv_select_pages(given); }
#endif

static Given given;

extern "C" int arguments_bytes() { return sizeof given; }

extern "C" const char* run(const void* arguments, int x, int y) {
  std::memcpy(&given, arguments, sizeof given);
  body = [] { kernel(given); };
  run_ctas(x, y, true);
  return complained();
}
