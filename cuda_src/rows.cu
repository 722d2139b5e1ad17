// What stands between the matrix products of a step where they do not do it themselves: a row's norm, SiLU's gate, and
// the choice of the likeliest token. Each reads its input once, 16 bytes a lane, and is bound by latency at few rows.
//
//   pkv_rms_norm   out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight        grid: [rows]
//   pkv_silu_gate  out[r][i] = silu(x[r][i]) * x[r][width + i]              grid: [ceil(width / 8 / 256), rows]
//   pkv_argmax     out[r] = the first index of the largest x[r]             grid: [ceil(width / 8192), rows]
//
// Block: [256]. x [rows, x_stride] of the 16-bit type with contiguous elements. The norm and the gate need widths that
// are multiples of 8, and rows on 16-byte boundaries; the norm a width of at most 256 * 8 * NORM_VECTORS. Sums are FP32,
// and what is written is rounded once. A NaN is the largest, as in PyTorch.
//
// A row's CTAs agree on the largest by an atomic maximum of words that order as (value, index from the end) does, which
// no order of arrival changes; the last to arrive writes it, and leaves the row's state as it was found, all zero.
#include "mma.cuh"
#include "vectors.cuh"

namespace pkv {

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int THREADS = 256;
constexpr int CHOICE_VECTORS = 4;                            // of a thread
constexpr int CHOICE_WIDTH = THREADS * 8 * CHOICE_VECTORS;  // of a CTA

struct NormArguments {
  const half_type *x, *weight;
  half_type* out;
  int width, x_stride;
  float eps;
};
struct GateArguments {
  const half_type* x;
  half_type* out;
  int width, x_stride;
};
struct alignas(16) RowChoice {
  unsigned long long best;
  unsigned arrived, unused;
};
struct ChoiceArguments {
  const half_type* x;
  long long* out;
  RowChoice* states;
  int width, x_stride;
};

__device__ __forceinline__ void unpack_vector(uint4 vector, float (&x)[8]) {
  const unsigned words[4] = {vector.x, vector.y, vector.z, vector.w};
  #pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack(words[i]);
    x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
  }
}
__device__ __forceinline__ uint4 pack_vector(const float (&x)[8]) {
  return make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
}

// A word that is larger where the value is, or where it is the same and its index smaller. No value's is 0.
__device__ __forceinline__ unsigned long long choice_of(float value, int index) {
  const unsigned bits = __float_as_uint(value + 0.0f);  // -0 becomes 0
  const unsigned key = value != value ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<unsigned long long>(key) << 32 | (0xffffffffu - static_cast<unsigned>(index));
}

}  // namespace pkv

extern "C" __global__ void __launch_bounds__(pkv::THREADS) pkv_rms_norm(const pkv::NormArguments given) {
  using namespace pkv;
  __shared__ float squares[THREADS / 32];
  const int vectors = given.width / 8;
  uint4 held[NORM_VECTORS], weight[NORM_VECTORS];
  const auto read = [&](uint4 (&to)[NORM_VECTORS], const half_type* from) {
    #pragma unroll
    for (int i = 0; i < NORM_VECTORS; ++i) {
      const int at = threadIdx.x + i * THREADS;
      to[i] = at < vectors ? load_once(from + at * 8) : make_uint4(0, 0, 0, 0);
    }
  };
  read(weight, given.weight);
  let_next_kernel_start();
  wait_for_previous_kernel();
  read(held, given.x + static_cast<long long>(blockIdx.x) * given.x_stride);
  float sum = 0.0f;
  #pragma unroll
  for (int i = 0; i < NORM_VECTORS; ++i) {
    float x[8];
    unpack_vector(held[i], x);
    #pragma unroll
    for (int j = 0; j < 8; ++j) sum += x[j] * x[j];
  }
  #pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, mask);
  if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0.0f;
  #pragma unroll
  for (int warp = 0; warp < THREADS / 32; ++warp) sum += squares[warp];
  const float inverse = rsqrtf(sum / given.width + given.eps);
  half_type* out = given.out + static_cast<long long>(blockIdx.x) * given.width;
  #pragma unroll
  for (int i = 0; i < NORM_VECTORS; ++i) {
    const int at = threadIdx.x + i * THREADS;
    float x[8], scale[8];
    unpack_vector(held[i], x);
    unpack_vector(weight[i], scale);
    #pragma unroll
    for (int j = 0; j < 8; ++j) x[j] *= inverse * scale[j];
    if (at < vectors) store(out + at * 8, pack_vector(x));
  }
}

extern "C" __global__ void __launch_bounds__(pkv::THREADS) pkv_silu_gate(const pkv::GateArguments given) {
  using namespace pkv;
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int at = (blockIdx.x * THREADS + threadIdx.x) * 8;
  if (at >= given.width) return;
  const half_type* row = given.x + static_cast<long long>(blockIdx.y) * given.x_stride;
  float gate[8], up[8];
  const uint4 gates = load_once(row + at), ups = load_once(row + given.width + at);
  unpack_vector(gates, gate);
  unpack_vector(ups, up);
  #pragma unroll
  for (int j = 0; j < 8; ++j) gate[j] = __fdividef(gate[j], 1.0f + exp2_fast(-1.4426950408889634f * gate[j])) * up[j];
  store(given.out + static_cast<long long>(blockIdx.y) * given.width + at, pack_vector(gate));
}

extern "C" __global__ void __launch_bounds__(pkv::THREADS) pkv_argmax(const pkv::ChoiceArguments given) {
  using namespace pkv;
  __shared__ unsigned long long found[THREADS / 32];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const half_type* row = given.x + static_cast<long long>(blockIdx.y) * given.x_stride;
  const int begin = blockIdx.x * CHOICE_WIDTH, end = min(begin + CHOICE_WIDTH, given.width);
  const bool aligned = (reinterpret_cast<unsigned long long>(given.x) | given.x_stride * sizeof(half_type)) % 16 == 0;
  const int whole = aligned ? begin + (end - begin) / 8 * 8 : begin;  // where what is read in vectors ends
  unsigned long long best = 0;
  uint4 held[CHOICE_VECTORS];
  #pragma unroll
  for (int i = 0; i < CHOICE_VECTORS; ++i) {
    const int at = begin + (threadIdx.x + i * THREADS) * 8;
    if (at < whole) held[i] = load_once(row + at);
  }
  #pragma unroll
  for (int i = 0; i < CHOICE_VECTORS; ++i) {
    const int at = begin + (threadIdx.x + i * THREADS) * 8;
    if (at >= whole) break;
    float x[8];
    unpack_vector(held[i], x);
    #pragma unroll
    for (int j = 0; j < 8; ++j) best = max(best, choice_of(x[j], at + j));
  }
  for (int at = whole + threadIdx.x; at < end; at += THREADS) best = max(best, choice_of(static_cast<float>(row[at]), at));
  #pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) best = max(best, __shfl_xor_sync(ALL_LANES, best, mask));
  if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x != 0) return;
  #pragma unroll
  for (int warp = 1; warp < THREADS / 32; ++warp) best = max(best, found[warp]);
  RowChoice& state = given.states[blockIdx.y];
  if (gridDim.x > 1) {
    atomicMax(&state.best, best);
    __threadfence();
    if (atomicAdd(&state.arrived, 1u) != static_cast<unsigned>(gridDim.x) - 1) return;
    __threadfence();
    best = atomicExch(&state.best, 0ull);
    state.arrived = 0;
  }
  given.out[blockIdx.y] = 0xffffffffu - static_cast<unsigned>(best);
}
