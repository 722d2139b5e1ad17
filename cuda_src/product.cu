// pkv_product: a weight matrix times the few columns of a small decode step, which costs as long as the weights take to
// stream; what stands beside it in a layer is done on the way in and out, so that the stream is never interrupted.
//
//   out[c][r] = sum over k of weight[r][k] * x[c][k] + bias[r]                     PRODUCT_END 0
//   out[c][r] += that                                                             PRODUCT_END 1
//   out[c][r] = silu(that of row r) * that of row r + rows / 2, r < rows / 2      PRODUCT_END 2
// With NORMED, x[c] is first divided by its root mean square (over k, eps added to the mean square) and multiplied by
// norm[k]. Sums are FP32; x after the norm, and what is written, are rounded to the 16-bit type.
//
// Grid: as many CTAs as fit beside each other, at most rows / 32; block: [256]. A CTA takes every gridDim.x-th tile of
// 32 rows. Its 8 warps share the depth: each streams its part of the tile's rows through a ring of its own, by
// asynchronous copies of 128 bytes a row, and multiplies it on tensor cores; the parts meet in shared memory. The ring
// runs ahead over the end of a tile, and before the previous kernel has ended, as weights do not depend on it.
//
//   x       [columns, x_stride], contiguous elements, rows on 16-byte boundaries
//   weight  [rows, DEPTH] contiguous; rows a multiple of 32, DEPTH of 64
//   norm    [DEPTH] (NORMED); bias [rows] or null
//   out     [columns, out_stride]
//
// The tensor cores' operands are read from shared memory 16 bytes a lane: which of the 16 values of k a lane's register
// stands for does not matter as long as weight and x agree, so no element is moved to where the instruction's layout
// says it is.
#include "mma.cuh"

namespace pkv {

constexpr int PRODUCT_WARPS = 8;
constexpr int ROWS = 32;         // of a tile
constexpr int CHUNK = 64;        // elements of a row that a stage of a warp's ring holds
constexpr int CHUNKS = DEPTH / CHUNK;
constexpr int STAGE_BYTES = ROWS * CHUNK * 2;
constexpr int X_BYTES = DEPTH * 2 + 64;  // of a column: lanes of two columns then read from different banks
constexpr int PIECES = (DEPTH / 8 + PRODUCT_WARPS * 32 - 1) / (PRODUCT_WARPS * 32);  // vectors of a column a thread
static_assert(DEPTH % CHUNK == 0 && COLUMNS <= 8, "whole chunks, and columns of one product");

struct ProductArguments {
  const half_type *x, *weight, *norm, *bias;
  half_type* out;
  int columns, rows, x_stride, out_stride;
  float eps;
};

struct ProductMemory {
  unsigned char ring[PRODUCT_WARPS][PRODUCT_STAGES][STAGE_BYTES];
  unsigned char x[COLUMNS][X_BYTES];
  float parts[2][PRODUCT_WARPS][ROWS][8];  // of this tile and the next
  float squares[PRODUCT_WARPS][8];
};
static_assert(sizeof(ProductMemory) == PRODUCT_SHARED_BYTES, "as much as the host reserves");

__device__ __forceinline__ float half_to_float(half_type value) { return static_cast<float>(value); }

// A row of the matrix for a row of a tile; where two rows make one output, both are in the same tile.
__device__ __forceinline__ int matrix_row(int tile, int row, int rows) {
  if (PRODUCT_END != 2) return tile * ROWS + row;
  return tile * (ROWS / 2) + row % (ROWS / 2) + row / (ROWS / 2) * (rows / 2);
}

// A warp's walk over its part of the CTA's tiles, STAGES - 1 chunks ahead of the products.
struct WeightStream {
  const half_type* weight;
  int rows, tile, chunk, first, count, stage;

  __device__ __forceinline__ void load_next(ProductMemory& memory, int warp, int lane) {
    if (count > 0 && tile * ROWS < rows) {
      const int piece = lane % 8;
      unsigned char* to = memory.ring[warp][stage];
      #pragma unroll
      for (int i = 0; i < ROWS / 4; ++i) {
        const int row = lane / 8 + 4 * i;
        const half_type* from =
            weight + static_cast<long long>(matrix_row(tile, row, rows)) * DEPTH + (first + chunk) * CHUNK + piece * 8;
        copy_async(shared_address(to + row * 128 + (piece ^ (row & 1) << 2) * 16), from);
      }
      if (++chunk == count) chunk = 0, tile += gridDim.x;
      stage = stage + 1 == PRODUCT_STAGES ? 0 : stage + 1;
    }
    copy_commit();  // an empty group too, so that counting them tells what has arrived
  }
};

__device__ __forceinline__ uint4 read_shared(const unsigned char* at) { return *reinterpret_cast<const uint4*>(at); }

// The CTA's copy of x, after its norm.
__device__ __forceinline__ void stage_x(const ProductArguments& given, ProductMemory& memory,
                                        const uint4 (&norm)[PIECES]) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  uint4 held[COLUMNS][PIECES];
  #pragma unroll
  for (int c = 0; c < COLUMNS; ++c) {
    #pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      const int piece = thread + i * PRODUCT_WARPS * 32;
      held[c][i] = make_uint4(0, 0, 0, 0);
      if (c < given.columns && piece < DEPTH / 8)
        held[c][i] = load_constant(given.x + static_cast<long long>(c) * given.x_stride + piece * 8);
    }
  }
#if NORMED
  #pragma unroll
  for (int c = 0; c < COLUMNS; ++c) {
    float sum = 0.0f;
    #pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      const unsigned words[4] = {held[c][i].x, held[c][i].y, held[c][i].z, held[c][i].w};
      #pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 pair = unpack(words[j]);
        sum += pair.x * pair.x + pair.y * pair.y;
      }
    }
    #pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    if (lane == 0) memory.squares[warp][c] = sum;
  }
  __syncthreads();
  #pragma unroll
  for (int c = 0; c < COLUMNS; ++c) {
    float sum = 0.0f;
    #pragma unroll
    for (int w = 0; w < PRODUCT_WARPS; ++w) sum += memory.squares[w][c];
    const float inverse = rsqrtf(sum / DEPTH + given.eps);
    #pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      unsigned words[4] = {held[c][i].x, held[c][i].y, held[c][i].z, held[c][i].w};
      const unsigned weights[4] = {norm[i].x, norm[i].y, norm[i].z, norm[i].w};
      #pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 pair = unpack(words[j]), weight = unpack(weights[j]);
        words[j] = pack(pair.x * inverse * weight.x, pair.y * inverse * weight.y);
      }
      held[c][i] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
#endif
  #pragma unroll
  for (int c = 0; c < COLUMNS; ++c) {
    #pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      const int piece = thread + i * PRODUCT_WARPS * 32;
      if (piece < DEPTH / 8) *reinterpret_cast<uint4*>(memory.x[c] + piece * 16) = held[c][i];
    }
  }
  __syncthreads();
}

// Adds a chunk's products: sums[m] of rows 16 m to 16 m + 15. x: the warp's column of x from the chunk on.
__device__ __forceinline__ void multiply_chunk(float (&sums)[2][4], const unsigned char* weights,
                                               const unsigned char* x, int lane) {
  const int row = lane / 4, part = lane % 4, swizzle = (row & 1) << 2;
  #pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int piece = half * 4 + part;
    const uint4 b = row < COLUMNS ? read_shared(x + piece * 16) : make_uint4(0, 0, 0, 0);
    #pragma unroll
    for (int m = 0; m < 2; ++m) {
      const unsigned char* at = weights + (m * 16 + row) * 128 + (piece ^ swizzle) * 16;
      const uint4 low = read_shared(at), high = read_shared(at + 8 * 128);
      const unsigned first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
      multiply_add(sums[m], first, b.x, b.y);
      multiply_add(sums[m], second, b.z, b.w);
    }
  }
}

// Writes the sums of a tile, one (row, column) a thread.
__device__ __forceinline__ void finish_tile(const ProductArguments& given, const float (&parts)[PRODUCT_WARPS][ROWS][8],
                                            int tile) {
  const int row = threadIdx.x / 8, column = threadIdx.x % 8;
  if (column >= given.columns || (PRODUCT_END == 2 && row >= ROWS / 2)) return;
  const auto sum = [&](int at) {
    float total = 0.0f;
    #pragma unroll
    for (int w = 0; w < PRODUCT_WARPS; ++w) total += parts[w][at][column];
    return given.bias ? total + half_to_float(given.bias[matrix_row(tile, at, given.rows)]) : total;
  };
  float value = sum(row);
  half_type* to = given.out + static_cast<long long>(column) * given.out_stride + matrix_row(tile, row, given.rows);
  if (PRODUCT_END == 1) value += half_to_float(*to);
  if (PRODUCT_END == 2) value = __fdividef(value, 1.0f + exp2_fast(-1.4426950408889634f * value)) * sum(row + ROWS / 2);
  *to = static_cast<half_type>(value);
}

}  // namespace pkv

extern "C" __global__ void __launch_bounds__(pkv::PRODUCT_WARPS * 32, 1)
pkv_product(const pkv::ProductArguments given) {
  using namespace pkv;
  extern __shared__ __align__(128) unsigned char memory[];
  ProductMemory& shared = *reinterpret_cast<ProductMemory*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = CHUNKS * warp / PRODUCT_WARPS, count = CHUNKS * (warp + 1) / PRODUCT_WARPS - first;

  WeightStream stream{given.weight, given.rows, static_cast<int>(blockIdx.x), 0, first, count, 0};
  #pragma unroll
  for (int i = 0; i < PRODUCT_STAGES - 1; ++i) stream.load_next(shared, warp, lane);
  uint4 norm[PIECES];
#if NORMED
  #pragma unroll
  for (int i = 0; i < PIECES; ++i) {
    const int piece = threadIdx.x + i * PRODUCT_WARPS * 32;
    norm[i] = piece < DEPTH / 8 ? load_constant(given.norm + piece * 8) : make_uint4(0, 0, 0, 0);
  }
#endif
  let_next_kernel_start();
  wait_for_previous_kernel();
  stage_x(given, shared, norm);

  const unsigned char* x = shared.x[lane / 4 % COLUMNS] + first * (CHUNK * 2);
  int stage = 0, buffer = 0;
  for (int tile = blockIdx.x; tile * ROWS < given.rows; tile += gridDim.x) {
    float sums[2][4] = {};
    for (int chunk = 0; chunk < count; ++chunk) {
      copy_wait<PRODUCT_STAGES - 2>();
      __syncwarp();  // what all lanes copied is there, and all have read the stage that is filled next
      stream.load_next(shared, warp, lane);
      multiply_chunk(sums, shared.ring[warp][stage], x + chunk * (CHUNK * 2), lane);
      stage = stage + 1 == PRODUCT_STAGES ? 0 : stage + 1;
    }
    #pragma unroll
    for (int m = 0; m < 2; ++m) {
      float* to = &shared.parts[buffer][warp][m * 16 + lane / 4][lane % 4 * 2];
      *reinterpret_cast<float2*>(to) = make_float2(sums[m][0], sums[m][1]);
      *reinterpret_cast<float2*>(to + 8 * 8) = make_float2(sums[m][2], sums[m][3]);
    }
    __syncthreads();  // the other buffer is written no sooner than all have passed here again, and so have read it
    finish_tile(given, shared.parts[buffer], tile);
    buffer ^= 1;
  }
}
