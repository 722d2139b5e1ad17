// pkv_wide_product: a weight matrix times the columns of a decode step of some dozens of rows, which still costs as long
// as the weights take to stream, if every SM streams as many bytes as any other and none waits for a kernel's begin.
//
//   out[c][r] = sum over k of weight[r][k] * x[c][k] + bias[r]                     PRODUCT_END 0
//   out[c][r] += that                                                             PRODUCT_END 1
//   out[c][r] = silu(that of row r) * that of row r + rows / 2, r < rows / 2      PRODUCT_END 2
// Sums are FP32 and rounded once, as what is written.
//
// Products are by warps (PRODUCT_GROUPS 0), or by warpgroups, which read x from shared memory, and weights from there
// (1) or from registers (2). What was copied for them must be published by the thread that copied it, and the fence for
// that may hold up the thread until all its copies have come. So with 2 a warp of its own copies x, and publishes it.
//
// Grid: at most as many CTAs as are on the GPU at once; block: [256], of PRODUCT_GROUPS 2 [288]. A unit of work is a
// tile of PRODUCT_ROWS rows by CHUNK elements of their depth. Units are laid end to end, tile by tile, and cut into
// ranges of equal length, one a CTA ("Stream-K", Osama, Merrill, Cecka, Garland, Owens, PPoPP 2023). The CTA that has
// a tile's first unit adds the other CTAs' parts in their order and writes the tile. Only the first tile of a range can
// have begun elsewhere, and only its last can end elsewhere, so that a part has long been sent when a range's last tile
// asks for it, but where tiles are fewer than ranges. Ranges are dealt from the last: CTAs wait for such as were started
// before them.
//
// A ring of stages (weights and the same elements of x) is filled by asynchronous copies, over the ends of tiles; of the
// first stages the weights are under way before the previous kernel has ended, as they do not depend on it, and those of
// PRODUCT_AHEAD more units on their way to L2. Where shared memory has room for two CTAs an SM, the next product's ring
// is full when this one ends. It may start when PRODUCT_LET units are left: sooner, what it brings to L2 would be gone
// again before it is used, as this one's weights pass through there.
//
//   x       [columns, x_stride], contiguous elements, rows on 16-byte boundaries; columns at most COLUMNS
//   weight  [rows, DEPTH] contiguous; rows a multiple of 2 with PRODUCT_END 2, DEPTH of 64
//   bias    [rows] or null
//   out     [columns, out_stride]
//   parts   [gridDim.x, PRODUCT_ROWS * COLUMNS] float, all EMPTY_WORD before and after
//
// Rows in shared memory are 128 bytes, vectors XORed with the row: neither ldmatrix nor wgmma meets a bank conflict.
#include "mma.cuh"
#include "ahead.cuh"
#if PRODUCT_GROUPS
#include "wgmma.cuh"
#endif

namespace pkv {

constexpr int PRODUCT_WARPS = 8, THREADS = PRODUCT_WARPS * 32;  // that multiply
constexpr bool WARP_OF_X = PRODUCT_GROUPS == 2;
constexpr int CTA_SIZE = THREADS + (WARP_OF_X ? 32 : 0), X_THREADS = WARP_OF_X ? 32 : THREADS;
constexpr unsigned UNITS_A_FENCE = PRODUCT_STAGES > 2 ? 2 : 1;  // of the warp of x, which waits for all copies with each
constexpr int CHUNK = 64;                          // elements of a row in a stage
constexpr int CHUNKS = DEPTH / CHUNK;
constexpr int ROW_TILES = PRODUCT_ROWS / 128;      // of 16 rows, of each warp
constexpr int COLUMN_TILES = COLUMNS / 8;
constexpr int VECTORS = ROW_TILES * COLUMN_TILES;  // of four sums, of a thread
constexpr int PART_VECTORS = VECTORS * THREADS;
constexpr int ROW_STEP = PRODUCT_END == 2 ? 16 : 32;  // rows of the matrix between a thread's copies
constexpr unsigned EMPTY_WORD = 0xffffffffu;       // as in state.cuh: no arithmetic makes it
static_assert(DEPTH % CHUNK == 0 && PRODUCT_ROWS % 128 == 0 && COLUMNS % 8 == 0, "whole chunks and tiles");
static_assert(!PRODUCT_GROUPS || COLUMNS >= 32, "columns of a warpgroup's products");

struct WideArguments {
  const half_type *x, *weight, *bias;
  half_type* out;
  float4* parts;
  int columns, rows, x_stride, out_stride;
};

struct WideStage {
  unsigned char weights[PRODUCT_ROWS][128], x[COLUMNS][128];
};
struct WideMemory {
  WideStage ring[PRODUCT_STAGES];
};
static_assert(sizeof(WideMemory) == PRODUCT_SHARED_BYTES, "as much as the host reserves");
constexpr int PARTS_AT_ONCE = static_cast<int>(sizeof(WideMemory)) / (PART_VECTORS * 16);
static_assert(PARTS_AT_ONCE > 0, "a part fits into the ring");

__device__ __forceinline__ float half_to_float(half_type value) { return static_cast<float>(value); }

__device__ __forceinline__ bool arrived(const float4& v) {
  return __float_as_uint(v.x) != EMPTY_WORD && __float_as_uint(v.y) != EMPTY_WORD
         && __float_as_uint(v.z) != EMPTY_WORD && __float_as_uint(v.w) != EMPTY_WORD;
}

__device__ __forceinline__ unsigned num_units(int rows) { return (rows + PRODUCT_ROWS - 1) / PRODUCT_ROWS * CHUNKS; }
__device__ __forceinline__ unsigned range_begin(unsigned range, unsigned units) { return units * range / gridDim.x; }

// The row of the matrix that a tile's row is. Where two rows make one output, they are 8 rows of a tile apart, which the
// same thread has of a product.
__device__ __forceinline__ int matrix_row(int tile, int row, int rows) {
  if (PRODUCT_END != 2) return tile * PRODUCT_ROWS + row;
  return tile * (PRODUCT_ROWS / 2) + row / 16 * 8 + row % 8 + row / 8 % 2 * (rows / 2);
}

// Starts copies of unit (tile, chunk); rows and columns that are not there become zero.
__device__ __forceinline__ void load_weights(const WideArguments& given, WideStage& stage, int tile, int chunk) {
  const int first = threadIdx.x / 8, piece = threadIdx.x % 8;
  const int begin = matrix_row(tile, first, given.rows);
  const int end = PRODUCT_END == 2 && first / 8 % 2 == 0 ? given.rows / 2 : given.rows;
  const half_type* from = given.weight + static_cast<long long>(begin) * DEPTH + chunk * CHUNK + piece * 8;
  const unsigned to = shared_address(stage.weights[first] + (piece ^ first % 8) * 16);
  #pragma unroll
  for (int i = 0; i < PRODUCT_ROWS / 32; ++i) {
    const bool there = begin + i * ROW_STEP < end;
    copy_async(to + i * 32 * 128, there ? from + i * ROW_STEP * DEPTH : given.weight, there ? 16 : 0);
  }
}
__device__ __forceinline__ void load_x(const WideArguments& given, WideStage& stage, int chunk) {
  constexpr int AT_ONCE = X_THREADS / 8;
  const int first = threadIdx.x % X_THREADS / 8, piece = threadIdx.x % 8;
  #pragma unroll
  for (int i = 0; i < (COLUMNS + AT_ONCE - 1) / AT_ONCE; ++i) {
    const int column = first + i * AT_ONCE;
    if (COLUMNS % AT_ONCE && column >= COLUMNS) break;
    const bool there = column < given.columns;
    const half_type* from = given.x + static_cast<long long>(column) * given.x_stride + chunk * CHUNK + piece * 8;
    copy_async(shared_address(stage.x[column] + (piece ^ column % 8) * 16), there ? from : given.x, there ? 16 : 0);
  }
}

// Brings the weights of up to PRODUCT_AHEAD units to L2. Each thread sees to rows of a tile, whose units lie end to end.
__device__ __forceinline__ void look_ahead(const WideArguments& given, unsigned units, int tile, int chunk) {
  for (unsigned left = min(units, static_cast<unsigned>(PRODUCT_AHEAD)); left > 0;) {
    const unsigned count = min(left, static_cast<unsigned>(CHUNKS - chunk));
    for (int row = threadIdx.x; row < PRODUCT_ROWS; row += THREADS) {
      const int at = matrix_row(tile, row, given.rows);
      if (at < (PRODUCT_END == 2 && row / 8 % 2 == 0 ? given.rows / 2 : given.rows))
        bring_to_l2(given.weight + static_cast<long long>(at) * DEPTH + chunk * CHUNK, count * (CHUNK * 2));
    }
    left -= count, chunk = 0, ++tile;
  }
}

// Between the two that follow, a unit's products are added; its stage and the sums are left alone. sums[m][4 j + i]
// is element i of the 16 x 8 that warp w has of rows 128 m + 16 w, columns 8 j.
#if PRODUCT_GROUPS
__device__ __forceinline__ void begin_unit(float (&sums)[ROW_TILES][COLUMN_TILES * 4], const WideStage& stage) {
  const unsigned long long x = shared_operand(shared_address(stage.x[0]), 16);
#if PRODUCT_GROUPS == 2
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned weights = shared_address(stage.weights[warp * 16 + lane % 16]);
  unsigned a[ROW_TILES][4][4];
  #pragma unroll
  for (int m = 0; m < ROW_TILES; ++m) {
    #pragma unroll
    for (int step = 0; step < 4; ++step)
      load_matrix(a[m][step], weights + m * 128 * 128 + ((step * 2 + lane / 16) ^ lane % 8) * 16);
  }
#else
  const unsigned long long weights = shared_operand(shared_address(stage.weights[threadIdx.x / 128 * 64]), 16);
#endif
  #pragma unroll
  for (int m = 0; m < ROW_TILES; ++m) hold(sums[m]);
  begin_products();
  #pragma unroll
  for (int step = 0; step < 4; ++step) {
    #pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#if PRODUCT_GROUPS == 2
      multiply_group<false>(sums[m], a[m][step], further(x, step * 32), true);
#else
      multiply_shared(sums[m], further(weights, m * 128 * 128 + step * 32), further(x, step * 32), true);
#endif
    }
  }
  commit_products();
}
__device__ __forceinline__ void end_unit(float (&sums)[ROW_TILES][COLUMN_TILES * 4], const WideStage&) {
  await_products(sums[0]);
  #pragma unroll
  for (int m = 1; m < ROW_TILES; ++m) hold(sums[m]);
}
#else
__device__ __forceinline__ void begin_unit(float (&)[ROW_TILES][COLUMN_TILES * 4], const WideStage&) {}
__device__ __forceinline__ void end_unit(float (&sums)[ROW_TILES][COLUMN_TILES * 4], const WideStage& stage) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, in_eight = lane % 8;
  const unsigned weights = shared_address(stage.weights[warp * 16 + lane % 16]), x = shared_address(stage.x[in_eight]);
  unsigned a[ROW_TILES][2][4];
  const auto load = [&](int m, int step) {
    load_matrix(a[m][step % 2], weights + m * 128 * 128 + ((step * 2 + lane / 16) ^ in_eight) * 16);
  };
  #pragma unroll
  for (int half = 0; half < 2; ++half) {
    #pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) load(m, half * 2), load(m, half * 2 + 1);
    #pragma unroll
    for (int j = 0; j < COLUMN_TILES; ++j) {
      unsigned b[4];  // of both steps
      load_matrix(b, x + j * 8 * 128 + ((half * 4 + lane / 8) ^ in_eight) * 16);
      #pragma unroll
      for (int m = 0; m < ROW_TILES; ++m) {
        float(&to)[4] = reinterpret_cast<float(&)[4]>(sums[m][j * 4]);
        multiply_add(to, a[m][0], b[0], b[1]);
        multiply_add(to, a[m][1], b[2], b[3]);
      }
    }
  }
}
#endif

__device__ __forceinline__ void send_part(float4* to, const float (&sums)[ROW_TILES][COLUMN_TILES * 4]) {
  #pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const float* from = &sums[i / COLUMN_TILES][i % COLUMN_TILES * 4];
    send(to + i * THREADS + threadIdx.x, make_float4(from[0], from[1], from[2], from[3]));
  }
}

// Adds the parts that the ranges after this one have of its last tile, in their order, and empties their places. The
// ring has nothing more to come.
__device__ __forceinline__ void add_parts(const WideArguments& given, WideMemory& memory,
                                          float (&sums)[ROW_TILES][COLUMN_TILES * 4], unsigned first, unsigned end) {
  float4* room = reinterpret_cast<float4*>(memory.ring) + threadIdx.x;  // a thread reads what it has copied itself
  const float empty = __uint_as_float(EMPTY_WORD);
  sync_warps<PRODUCT_WARPS>(1);  // all have multiplied what lay there
  for (; first < end; first += PARTS_AT_ONCE) {
    const int count = min(static_cast<int>(end - first), PARTS_AT_ONCE);
    float4* parts = given.parts + static_cast<long long>(first) * PART_VECTORS + threadIdx.x;
    bool whole;
    do {
      #pragma unroll 1
      for (int p = 0; p < count; ++p) {
        #pragma unroll
        for (int i = 0; i < VECTORS; ++i)
          copy_async(shared_address(room + p * PART_VECTORS + i * THREADS), parts + p * PART_VECTORS + i * THREADS);
      }
      copy_commit();
      copy_wait<0>();
      whole = true;
      #pragma unroll 1
      for (int p = 0; p < count; ++p) {
        #pragma unroll
        for (int i = 0; i < VECTORS; ++i) whole &= arrived(room[p * PART_VECTORS + i * THREADS]);
      }
    } while (!whole);
    #pragma unroll 1
    for (int p = 0; p < count; ++p) {
      #pragma unroll
      for (int i = 0; i < VECTORS; ++i) {
        const float4 part = room[p * PART_VECTORS + i * THREADS];
        float* to = &sums[i / COLUMN_TILES][i % COLUMN_TILES * 4];
        to[0] += part.x, to[1] += part.y, to[2] += part.z, to[3] += part.w;
        send(parts + p * PART_VECTORS + i * THREADS, make_float4(empty, empty, empty, empty));
      }
    }
  }
}

// Writes a tile. A thread has rows lane / 4 and 8 further of each 16, columns 2 (lane % 4) and the next of each 8.
__device__ __forceinline__ void finish_tile(const WideArguments& given, float (&sums)[ROW_TILES][COLUMN_TILES * 4],
                                            int tile) {
  constexpr int TOGETHER = COLUMN_TILES < 4 ? COLUMN_TILES : 4;  // column tiles whose reads are under way at once
  constexpr int ROWS = PRODUCT_END == 2 ? 1 : 2;                 // that are written of the two
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  #pragma unroll
  for (int m = 0; m < ROW_TILES; ++m) {
    half_type* out[2];
    bool there[2];
    float bias[2];
    #pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = matrix_row(tile, m * 128 + warp * 16 + half * 8 + lane / 4, given.rows);
      out[half] = given.out + static_cast<long long>(lane % 4 * 2) * given.out_stride + row;
      there[half] = row < (PRODUCT_END == 2 && half == 0 ? given.rows / 2 : given.rows);
      bias[half] = given.bias && there[half] ? half_to_float(given.bias[row]) : 0.0f;
    }
    #pragma unroll
    for (int first = 0; first < COLUMN_TILES; first += TOGETHER) {
      const auto wanted = [&](int j, int i) {
        return there[i / 2] && (first + j) * 8 + lane % 4 * 2 + i % 2 < given.columns;
      };
      const auto place = [&](int j, int i) { return out[i / 2] + (j * 8 + i % 2) * given.out_stride; };
      half_type before[TOGETHER][4];
      if constexpr (PRODUCT_END == 1) {
        #pragma unroll
        for (int j = 0; j < TOGETHER; ++j) {
          #pragma unroll
          for (int i = 0; i < 4; ++i)
            if (wanted(j, i)) before[j][i] = *place(j, i);
        }
      }
      #pragma unroll
      for (int j = 0; j < TOGETHER; ++j) {
        #pragma unroll
        for (int i = 0; i < 2 * ROWS; ++i) {
          if (!wanted(j, i)) continue;
          const float* found = &sums[m][(first + j) * 4];
          float value = found[i] + bias[i / 2];
          if constexpr (PRODUCT_END == 1) value += half_to_float(before[j][i]);
          if constexpr (PRODUCT_END == 2)
            value = __fdividef(value, 1.0f + exp2_fast(-1.4426950408889634f * value)) * (found[i + 2] + bias[1]);
          *place(j, i) = static_cast<half_type>(value);
        }
      }
      // The compiler is not to compute all addresses at once, which takes registers that the next product needs.
      #pragma unroll
      for (int half = 0; half < ROWS; ++half)
        out[half] = const_cast<half_type*>(keep_address(out[half] + TOGETHER * 8 * given.out_stride));
    }
  }
}

// Copies of a CTA's range of units, of weights or of x or both: the first are begun one by one, then one for each unit
// that has been waited for.
template <bool WEIGHTS, bool X>
struct Copies {
  unsigned next, end;  // units to load
  int tile, chunk, stage;

  __device__ __forceinline__ void begin(const WideArguments& given, WideStage (&ring)[PRODUCT_STAGES]) {
    const int first = chunk;
    const unsigned begun = next;
    #pragma unroll
    for (int i = 0; i < PRODUCT_STAGES - 1; ++i) {
      if (next >= end) break;
      if (WEIGHTS) load_weights(given, ring[i], tile, chunk);
      advance();
    }
    copy_commit();
    stage = PRODUCT_STAGES - 1;
    if (WEIGHTS && KERNELS_OVERLAP && next < end) look_ahead(given, end - next, tile, chunk);
    wait_for_previous_kernel();
    #pragma unroll
    for (int i = 0; i < PRODUCT_STAGES - 1; ++i) {
      if (X && begun + i < end) load_x(given, ring[i], (first + i) % CHUNKS);
      copy_commit();  // an empty group too, so that counting them tells what has arrived
    }
  }
  // Waits for the oldest units, whose stages all may read after the barrier that follows.
  template <unsigned UNITS>
  __device__ __forceinline__ void wait() const {
    copy_wait<PRODUCT_STAGES - 1 - static_cast<int>(UNITS)>();
#if PRODUCT_GROUPS
    if (X) publish_copies();
#endif
  }
  // Begins the next unit's. All have read its stage.
  __device__ __forceinline__ void begin_next(const WideArguments& given, WideStage (&ring)[PRODUCT_STAGES]) {
    if (next < end) {
      if (WEIGHTS) load_weights(given, ring[stage], tile, chunk);
      if (X) load_x(given, ring[stage], chunk);
      advance();
    }
    copy_commit();
    stage = stage + 1 == PRODUCT_STAGES ? 0 : stage + 1;
  }

 private:
  __device__ __forceinline__ void advance() { ++next, chunk = chunk + 1 == CHUNKS ? (++tile, 0) : chunk + 1; }
};

__device__ __forceinline__ void let_next_near_end(unsigned unit, unsigned begin, unsigned end) {
  if (end - unit == min(end - begin, static_cast<unsigned>(PRODUCT_LET))) let_next_kernel_start();
}

}  // namespace pkv

extern "C" __global__ void __launch_bounds__(pkv::CTA_SIZE, COLUMNS <= 64 ? 2 : 1)
pkv_wide_product(const pkv::WideArguments given) {
  using namespace pkv;
  extern __shared__ __align__(1024) unsigned char memory[];
  WideMemory& shared = *reinterpret_cast<WideMemory*>(memory);
  const unsigned units = num_units(given.rows), range = gridDim.x - 1 - blockIdx.x;
  const unsigned begin = range_begin(range, units), end = range_begin(range + 1, units);
  int tile = begin / CHUNKS, chunk = begin % CHUNKS;

#if PRODUCT_GROUPS == 2
  if (threadIdx.x >= THREADS) {
    Copies<false, true> copies{begin, end, tile, chunk};
    copies.begin(given, shared.ring);
    for (unsigned unit = begin; unit < end; ++unit) {
      let_next_near_end(unit, begin, end);
      if ((unit - begin) % UNITS_A_FENCE == 0) copies.wait<UNITS_A_FENCE>();
      __syncthreads();
      copies.begin_next(given, shared.ring);
    }
    return;
  }
#endif
  Copies<true, !WARP_OF_X> copies{begin, end, tile, chunk};
  copies.begin(given, shared.ring);
  float sums[ROW_TILES][COLUMN_TILES * 4] = {};
  bool first_part = chunk == 0;
  int stage = 0;
  for (unsigned unit = begin; unit < end; ++unit) {
    let_next_near_end(unit, begin, end);
    copies.wait<1>();
    __syncthreads();  // what all copied is there, and all have read the stage that is filled next
    begin_unit(sums, shared.ring[stage]);
    copies.begin_next(given, shared.ring);
    end_unit(sums, shared.ring[stage]);
    stage = stage + 1 == PRODUCT_STAGES ? 0 : stage + 1;
    if (++chunk < CHUNKS && unit + 1 < end) continue;

    if (!first_part) {
      send_part(given.parts + static_cast<long long>(range) * PART_VECTORS, sums);
    } else {
      if (chunk < CHUNKS) {
        unsigned others = range + 1;
        while (range_begin(others, units) < static_cast<unsigned>(tile + 1) * CHUNKS) ++others;
        add_parts(given, shared, sums, range + 1, others);
      }
      finish_tile(given, sums, tile);
    }
    #pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
      #pragma unroll
      for (int i = 0; i < COLUMN_TILES * 4; ++i) sums[m][i] = 0.0f;
    }
    first_part = true, chunk = 0, ++tile;
  }
}
