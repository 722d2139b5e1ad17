// What mma.cuh has of instructions, on a CPU: the tests put an empty file in its place and include this one first.
//
// Whatever a warp does together, the tensor cores' fragments above all, is worked out here from what all its lanes
// bring, by the layouts of the PTX manual. A copy arrives when it is waited for, no sooner; or, with copies_hurry, the
// moment it is started.
#pragma once
#include "cuda_on_cpu.h"

#include <sched.h>
#include <time.h>

#include <deque>

// The 16-bit types.
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
#if FP16_OPERANDS
typedef _Float16 operand_type;
#else
typedef bfloat16 operand_type;
#endif

namespace pkv {

template <class T>
static T half_of(unsigned pair, int which) { return bits<T>(static_cast<uint16_t>(pair >> 16 * which)); }
template <class T>
static unsigned pair_of(float low, float high) {
  return bits<uint16_t>(static_cast<T>(low)) | static_cast<unsigned>(bits<uint16_t>(static_cast<T>(high))) << 16;
}
static unsigned pack(float low, float high) { return pair_of<half_type>(low, high); }
inline float2 unpack(unsigned pair) { return {half_of<half_type>(pair, 0), half_of<half_type>(pair, 1)}; }
static unsigned pack_operands(float low, float high) { return pair_of<operand_type>(low, high); }
inline float2 unpack_operands(unsigned pair) {
  return {half_of<operand_type>(pair, 0), half_of<operand_type>(pair, 1)};
}
template <class F>
static unsigned by_halves(F f) {
  return pair_of<_Float16>(f(0), f(1));
}
static float fp16(unsigned pair, int which) { return half_of<_Float16>(pair, which); }
// Sums and products of two FP16 numbers, and a product with 0 added to a third, are exact in float: one rounding.
inline unsigned add_pair(unsigned a, unsigned b) {
  return by_halves([=](int i) { return fp16(a, i) + fp16(b, i); });
}
inline unsigned multiply_pair(unsigned a, unsigned b) {
  return by_halves([=](int i) { return fp16(a, i) * fp16(b, i); });
}
inline unsigned multiply_add_pair(unsigned a, unsigned b, unsigned c) {
  return by_halves([=](int i) { return fp16(a, i) * fp16(b, i) + fp16(c, i); });
}
[[maybe_unused]] static unsigned permute(unsigned low, unsigned high, unsigned selector) {
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned nibble = selector >> 4 * i & 15, from = nibble & 7;
    const unsigned byte = (from < 4 ? low >> 8 * from : high >> 8 * (from - 4)) & 0xff;
    result |= (nibble & 8 ? byte & 0x80 ? 0xffu : 0u : byte) << 8 * i;
  }
  return result;
}
#if CONVERTS_E4M3
static float of_e4m3(unsigned code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const float finite = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  const float magnitude = (code & 0x7f) == 0x7f ? NAN : finite;
  return code & 0x80 ? -magnitude : magnitude;
}
static void convert_e4m3(unsigned& first, unsigned& second, unsigned x) {
  first = by_halves([=](int i) { return of_e4m3(x >> 8 * i & 0xff); });
  second = by_halves([=](int i) { return of_e4m3(x >> 16 + 8 * i & 0xff); });
}
#endif

// Copies, in groups that a lane commits and waits for.
struct Copy {
  unsigned to;
  const void* from;
  int bytes, valid;
};
extern "C" {
int copies_hurry = 0;
}
static std::vector<Copy> open_group[CTA_THREADS];
static std::deque<std::vector<Copy>> copy_groups[CTA_THREADS];
static unsigned shared_address(const void* at) {
  return static_cast<unsigned>(static_cast<const unsigned char*>(at) - memory);
}
static void arrive(const Copy& copy) {
  std::memset(memory + copy.to, 0, copy.bytes);
  std::memcpy(memory + copy.to, copy.from, copy.valid);
}
static void start_copy(const Copy& copy) {
  if (copy.to % copy.bytes || reinterpret_cast<uintptr_t>(copy.from) % copy.bytes) complain("a copy is not aligned");
  if (copies_hurry) arrive(copy);
  else open_group[threadIdx.x].push_back(copy);
}
static void copy_async(unsigned to, const void* from, int valid = 16) { start_copy({to, from, 16, valid}); }
[[maybe_unused]] static void copy_float_async(unsigned to, const float* from, int valid) {
  start_copy({to, from, 4, valid});
}
template <class T>
inline const T* keep_address(const T* at) { return at; }
static void copy_commit() { copy_groups[threadIdx.x].push_back(std::exchange(open_group[threadIdx.x], {})); }
template <int PENDING>
static void copy_wait() {
  for (auto& mine = copy_groups[threadIdx.x]; mine.size() > PENDING; mine.pop_front())
    for (const Copy& copy : mine.front()) arrive(copy);
}
[[maybe_unused]] static float2 load_shared(unsigned at) { return *reinterpret_cast<const float2*>(memory + at); }

// Barriers of some warps, which are the same ones every time.
struct NamedBarrier {
  int threads = 0, meetings = 0;
  unsigned here = 0, before = 0;  // warps, a bit each: now, and the last time
};
static NamedBarrier named[16];
// Copies on their way lead to arrays that are gone by the next run.
[[maybe_unused]] static const bool copies_and_barriers_are_forgotten = [] {
  forget_more = [] {
    for (NamedBarrier& barrier : named) barrier = {};
    for (int i = 0; i < CTA_THREADS; ++i) open_group[i].clear(), copy_groups[i].clear();
  };
  return true;
}();
template <int WARPS_MEETING>
[[maybe_unused]] static void sync_warps(int id) {
  if (id < 1 || id > 15) return complain("a barrier has an id that is not there or __syncthreads'");
  NamedBarrier& barrier = named[id];
  const int meeting = barrier.meetings;
  barrier.here |= 1u << threadIdx.x / 32;
  if (++barrier.threads < WARPS_MEETING * 32) {
    while (barrier.meetings == meeting) yield();
    return;
  }
  if (__builtin_popcount(barrier.here) != WARPS_MEETING) complain("some lanes of a warp meet others at a barrier");
  if (barrier.before && barrier.before != barrier.here) complain("other warps than before meet at a barrier");
  barrier.before = barrier.here, barrier.here = 0, barrier.threads = 0;
  ++barrier.meetings, ++progress;
}

struct alignas(8) ArrivalBarrier {
  short warps, arrived;
  int phase;

  void init(int count) { warps = static_cast<short>(count), arrived = 0, phase = 0; }
  void arrive(int lane) {
    __syncwarp();
    if (lane != 0) return;
    if (++arrived == warps) arrived = 0, ++phase;
    ++progress;
  }
  void wait(int wanted) { while (phase <= wanted) yield(); }
};

// Lane 8 i + r brings the address of row r of matrix i; lane 4 r + c gets elements 2 c, 2 c + 1 of row r of each.
template <bool TRANSPOSED>
static void load_matrices(unsigned (&r)[4], unsigned address) {
  struct Four { unsigned of[4]; };
  const Four found = together(address, [](auto of) {
    Four four;
    for (int i = 0; i < 4; ++i) {
      uint16_t pair[2];
      for (int j = 0; j < 2; ++j) {
        const int a = my_lane() / 4, b = my_lane() % 4 * 2 + j, row = TRANSPOSED ? b : a, column = TRANSPOSED ? a : b;
        std::memcpy(&pair[j], memory + of(8 * i + row) + 2 * column, 2);
      }
      four.of[i] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
    }
    // The eight rows of a matrix in eight different groups of banks.
    for (int i = 0; i < 4; ++i) {
      unsigned groups_of_banks = 0;
      for (int row = 0; row < 8; ++row) groups_of_banks |= 1u << (of(8 * i + row) / 16 % 8);
      if (groups_of_banks != 0xff) complain("an ldmatrix meets a bank conflict");
    }
    return four;
  });
  std::copy_n(found.of, 4, r);
}
static void load_matrix(unsigned (&r)[4], unsigned address) { load_matrices<false>(r, address); }
static void load_matrix_transposed(unsigned (&r)[4], unsigned address) { load_matrices<true>(r, address); }
static unsigned transpose(unsigned value) {
  return together(value, [](auto of) {
    unsigned pair = 0;
    for (int j = 0; j < 2; ++j) {
      const int row = my_lane() % 4 * 2 + j, column = my_lane() / 4;
      pair |= (of(4 * row + column / 2) >> 16 * (column % 2) & 0xffff) << 16 * j;
    }
    return pair;
  });
}
// m16n8k16 of operands of type T: a's registers are (row, k), (row + 8, k), (row, k + 8), (row + 8, k + 8) with row = lane / 4 and
// k = 2 (lane % 4); b's (k, n), (k + 8, n) with n = lane / 4; d's (row, n), (row, n + 1), (row + 8, n), (row + 8, n + 1)
// with n = 2 (lane % 4). Each k is a pair.
template <class T>
static void multiply_add_of(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
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
  multiply_add_of<operand_type>(d, a, b0, b1);
}

#if READ_TILES
// What wgmma.cuh has. A product is done at once, of what the copies brought that have been waited for.
static void publish_copies() {}
static void begin_products() { __syncwarp(); }
template <int COUNT>
static void hold(float (&)[COUNT]) {}
template <int COUNT>
static void end_products(float (&)[COUNT]) { __syncwarp(); }
static unsigned long long shared_operand(unsigned address, unsigned bytes_between_blocks) {
  if (address % 16 || bytes_between_blocks % 16) complain("an operand of a warpgroup is not aligned");
  return address | static_cast<unsigned long long>(bytes_between_blocks) << 32;
}
static unsigned long long further(unsigned long long operand, int bytes) { return operand + bytes; }
// Rows of 128 bytes whose vectors are XORed with bits 7 to 9 of their address, eight rows to the KiB.
static float shared_element(unsigned long long operand, int row, int column) {
  const unsigned at = static_cast<unsigned>(operand) + column / 64 * static_cast<unsigned>(operand >> 32)
                      + row / 8 * 1024 + row % 8 * 128 + column % 64 * 2;
  operand_type value;
  std::memcpy(&value, memory + (at ^ (at >> 7 & 7) << 4), sizeof value);
  return value;
}
template <bool ROWS_ARE_K, int COUNT>
static void multiply_group(float (&d)[COUNT], const unsigned (&a)[4], unsigned long long b, bool add) {
  struct Operand { unsigned a[4]; } mine = {{a[0], a[1], a[2], a[3]}};
  struct Row { float of[2][16]; };  // of a, that a lane's sums need
  const int lane = my_lane();
  float row[2][16];
  for (int k = 0; k < 16; ++k) {
    const auto pair = together(mine, [=](auto of) {
      const Operand& from = of(lane / 4 * 4 + k % 8 / 2);
      return std::pair<unsigned, unsigned>(from.a[k / 8 * 2], from.a[k / 8 * 2 + 1]);
    });
    row[0][k] = half_of<operand_type>(pair.first, k % 2), row[1][k] = half_of<operand_type>(pair.second, k % 2);
  }
  for (int i = 0; i < COUNT; ++i) {
    const int n = i / 4 * 8 + lane % 4 * 2 + i % 2;
    double sum = 0;
    for (int k = 0; k < 16; ++k)
      sum += double(row[i / 2 % 2][k]) * double(ROWS_ARE_K ? shared_element(b, k, n) : shared_element(b, n, k));
    d[i] = (add ? d[i] : 0.0f) + static_cast<float>(sum);
  }
}
#endif

constexpr bool KERNELS_OVERLAP = true;
extern "C" {
int next_kernel_started = 0;  // how often a lane let it
}
static void let_next_kernel_start() { ++next_kernel_started; }

// An array that the previous kernel writes: each CTA finds `before` there until its first thread waits for that kernel.
struct Late {
  int* at;
  std::vector<int> before, after;
};
static std::vector<Late> late;
static bool previous_ended;
static void previous_kernel(bool ends) {
  if (!late.empty() && previous_ended != ends)
    for (const Late& array : late) std::copy_n((ends ? array.after : array.before).begin(), array.after.size(), array.at);
  previous_ended = ends;
}
static void wait_for_previous_kernel() {
  __syncwarp();
  previous_kernel(true);
}
[[maybe_unused]] static void prefetch_l2(const void*) {}
[[maybe_unused]] constexpr long long MOST_KEPT_BYTES = 1 << 20;
[[maybe_unused]] static void store_kept(float* to, float x) { *to = x; }
template <class T>
static void send(T* to, const T& value) { *to = value; }
[[maybe_unused]] static float2 receive(const float2* from) { return *from; }
// Between ranks, which are threads with a copy each of all that is here (several_on_cpu.py).
template <class T>
static void send_to_rank(T* to, const T& value) { *to = value; }
template <class T>
inline T receive_from_rank(const T* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  sched_yield();
  return value;
}
[[maybe_unused]] static void add_at_rank(unsigned* to, unsigned more) { __atomic_fetch_add(to, more, __ATOMIC_SEQ_CST); }
[[maybe_unused]] static long long nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1'000'000'000ll + now.tv_nsec;
}
[[maybe_unused]] static float hyperbolic_tangent(float x) { return std::tanh(x); }
static float __fdividef(float a, float b) { return a / b; }
static float exp2_fast(float x) { return std::exp2(x); }
[[maybe_unused]] static float log2_fast(float x) { return std::log2(x); }
[[maybe_unused]] static float max_or_nan(float x, float y) { return x != x || y != y ? NAN : max(x, y); }

}  // namespace pkv
