// cuda_src/select.cu and summaries.cu on a CPU: every thread of a CTA a fiber, one CTA after the other.
//
// Stands in for mma.cuh, as decode_harness.cpp does; products are worked out by the layouts of the PTX manual.
#include "cuda_on_cpu.h"

static int atomicAdd(int* at, int value) {
  ++progress;
  return (*at += value) - value;
}
[[maybe_unused]] static unsigned atomicAdd(unsigned* at, unsigned value) {
  ++progress;
  return (*at += value) - value;
}
[[maybe_unused]] static void atomicOr(unsigned* at, unsigned bits) { *at |= bits; }
[[maybe_unused]] static float __fdividef(float a, float b) { return a / b; }

struct bfloat16 {
  uint16_t word;
  bfloat16() = default;
  bfloat16(float x) {
    const unsigned whole = bits<unsigned>(x);
    word = x != x ? 0x7fff : static_cast<uint16_t>((whole + 0x7fff + (whole >> 16 & 1)) >> 16);
  }
  operator float() const { return bits<float>(static_cast<unsigned>(word) << 16); }
};
#if DTYPE_BF16
typedef bfloat16 half_type;
#else
typedef _Float16 half_type;
#endif
#include "variant.cuh"

namespace pkv {

template <class T>
static T half_of(unsigned pair, int which) { return bits<T>(static_cast<uint16_t>(pair >> 16 * which)); }
template <class T>
static unsigned pair_of(float low, float high) {
  return bits<uint16_t>(static_cast<T>(low)) | static_cast<unsigned>(bits<uint16_t>(static_cast<T>(high))) << 16;
}
static unsigned pack(float low, float high) { return pair_of<half_type>(low, high); }
static unsigned pack_bf16(float low, float high) { return pair_of<bfloat16>(low, high); }
static float2 unpack(unsigned pair) { return {half_of<half_type>(pair, 0), half_of<half_type>(pair, 1)}; }
#if SUMMARY_CODES
typedef _Float16 operand;
#else
typedef half_type operand;
#endif
[[maybe_unused]] static unsigned pack_operands(float low, float high) { return pair_of<operand>(low, high); }
[[maybe_unused]] static unsigned permute(unsigned low, unsigned high, unsigned selector) {
  const uint64_t all = static_cast<uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(all >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
template <class Combine>
static unsigned of_pairs(unsigned a, unsigned b, Combine combine) {
  const auto half = [&](int i) { return combine(half_of<_Float16>(a, i), half_of<_Float16>(b, i)); };
  return pair_of<_Float16>(half(0), half(1));
}
[[maybe_unused]] static unsigned add_pair(unsigned a, unsigned b) {
  return of_pairs(a, b, [](float x, float y) { return x + y; });
}
[[maybe_unused]] static unsigned multiply_pair(unsigned a, unsigned b) {
  return of_pairs(a, b, [](float x, float y) { return x * y; });
}
template <class T>
static void product(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  struct Operands { unsigned a[4], b[2]; } mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  struct Sums { float of[4]; };
  const Sums sums = together(mine, [](auto of) {
    Sums s;
    for (int i = 0; i < 4; ++i) {
      const int row = my_lane() / 4 + i / 2 * 8, n = my_lane() % 4 * 2 + i % 2;
      double sum = 0;
      for (int k = 0; k < 16; ++k) {
        const unsigned x = of(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2], y = of(n * 4 + k % 8 / 2).b[k / 8];
        sum += double(half_of<T>(x, k % 2)) * double(half_of<T>(y, k % 2));
      }
      s.of[i] = static_cast<float>(sum);
    }
    return s;
  });
  for (int i = 0; i < 4; ++i) d[i] += sums.of[i];
}
static void multiply_add(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  product<operand>(d, a, b0, b1);
}
[[maybe_unused]] static void multiply_add_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  product<bfloat16>(d, a, b0, b1);
}
static uint4 load_constant(const half_type* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) complain("a load is not aligned");
  return *reinterpret_cast<const uint4*>(from);
}
[[maybe_unused]] static uint4 here_and_now(uint4 v) { return v; }
template <class T>
static T load_past_l1(const T* from) { return *from; }
constexpr long long MOST_KEPT_BYTES = 1 << 20;
[[maybe_unused]] static void store_kept(float* to, float x) { *to = x; }
[[maybe_unused]] static float2 receive(const float2* from) { return *from; }
[[maybe_unused]] static int take_ticket(int* from) { return atomicAdd(from, 1); }
[[maybe_unused]] static void prefetch_l2(const void*) {}
[[maybe_unused]] static float sqrt_fast(float x) { return std::sqrt(x); }
static float exp2_fast(float x) { return std::exp2(x); }
constexpr bool KERNELS_OVERLAP = true;
static void let_next_kernel_start() {}
static void wait_for_previous_kernel() {}

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
  gridDim = {x, y, 1};
  for (int row = 0; row < y; ++row) {
    const int first = static_cast<int>(order >> 8) % x;  // any CTA may be the last
    for (int i = 0; i < x; ++i) {
      blockIdx = {(first + i) % x, row, 0};
      run_cta();
    }
  }
  return complaint;
}
