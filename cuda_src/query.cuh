// The queries of a (row, KV head) as B operands of S^T = K Q^T, and that product.
#pragma once
#include "fragments.cuh"
#include "state.cuh"

namespace pkv {

template <class W>
struct Query {
  static constexpr int HEAD_BLOCKS = W::HEAD_BLOCKS;
  static constexpr bool QUERY_IN_REGISTERS = W::QUERY_IN_REGISTERS;
  const half_type* rows;  // the KV head's first query head of the row's first token; of MANY_ROWS, of row 0's
  int token_stride;       // elements
  const int* members;     // [num_members] rows that the columns belong to (MANY_ROWS)
  int num_members;
  int num_blocks;         // those that have a column (MANY_ROWS)
  unsigned fragment[QUERY_IN_REGISTERS ? K_STEPS : 1][HEAD_BLOCKS][2];
#if QUERY_SCALED
  float factor[HEAD_BLOCKS];      // of the column that this lane reads
  float inverse[HEAD_BLOCKS][2];  // 1 / factor of the columns whose logits it gets
#endif

  // The 4 elements that this lane holds of a step's 16, as they are stored.
  __device__ __forceinline__ uint2 stored(int b, int step, int lane) const {
    // Columns past the last one repeat it, and nobody uses what comes of them.
    const int column = W::MANY_ROWS ? W::column_at(b * 8 + lane / 4)
                                    : W::first_column() + min(b * 8 + lane / 4, W::own_columns() - 1);
    const ColumnPlace place = place_of(W::MANY_ROWS ? column % COLUMNS : column);
    const half_type* row = rows + place.token * token_stride + place.head * HEAD_DIM;
    if constexpr (W::MANY_ROWS)
      row += static_cast<long long>(members[min(column / COLUMNS, num_members - 1)]) * QUERY_TOKENS * token_stride;
#if CACHE_TYPE
    return __ldg(reinterpret_cast<const uint2*>(row) + step * 4 + lane % 4);  // as K's elements are dealt out
#else
    const unsigned* pairs = reinterpret_cast<const unsigned*>(row) + step * 8 + lane % 4;
    return make_uint2(__ldg(pairs), __ldg(pairs + 4));
#endif
  }
  // Whether block b has a column.
  __device__ __forceinline__ bool used(int b) const {
    return !W::MANY_ROWS || HEAD_BLOCKS == 1 || b == 0 || b < num_blocks;
  }
  __device__ __forceinline__ void read(unsigned (&to)[HEAD_BLOCKS][2], int step, int lane) const {
    #pragma unroll
    for (int b = 0; b < HEAD_BLOCKS; ++b) {
      const uint2 pairs = stored(b, step, lane);
      to[b][0] = pairs.x, to[b][1] = pairs.y;
    }
  }
  __device__ __forceinline__ void get(unsigned (&to)[HEAD_BLOCKS][2], int step, int lane) const {
    if constexpr (QUERY_IN_REGISTERS) {
      #pragma unroll
      for (int b = 0; b < HEAD_BLOCKS; ++b) to[b][0] = fragment[step][b][0], to[b][1] = fragment[step][b][1];
    } else {
      read(to, step, lane);
#if QUERY_SCALED
      scale(to);
#endif
    }
  }
#if QUERY_SCALED
  __device__ __forceinline__ void scale(unsigned (&to)[HEAD_BLOCKS][2]) const {
    #pragma unroll
    for (int b = 0; b < HEAD_BLOCKS; ++b)
      #pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 pair = unpack(to[b][i]);
        to[b][i] = pack_operands(pair.x * factor[b], pair.y * factor[b]);
      }
  }
  // Finds the factors of fragments that are not scaled yet.
  __device__ __forceinline__ void find_factors(int lane) {
    #pragma unroll
    for (int b = 0; b < HEAD_BLOCKS; ++b) {
      float largest = 0.0f;
      #pragma unroll
      for (int step = 0; step < K_STEPS; ++step) {
        uint2 pairs;
        if constexpr (QUERY_IN_REGISTERS) pairs = make_uint2(fragment[step][b][0], fragment[step][b][1]);
        else pairs = stored(b, step, lane);
        const float2 low = unpack(pairs.x), high = unpack(pairs.y);
        largest = fmaxf(fmaxf(fmaxf(largest, fabsf(low.x)), fmaxf(fabsf(low.y), fabsf(high.x))), fabsf(high.y));
      }
      largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
      // The exponent field of 2^x is x + 127. The factor is 2^14 over the power of two at or below the largest
      // magnitude, and at most 2^127.
      const unsigned exponent = min(268u - (__float_as_uint(largest) >> 23), 254u);
      factor[b] = __uint_as_float(exponent << 23);
      const float undone = __uint_as_float((254u - exponent) << 23);
      #pragma unroll
      for (int column = 0; column < 2; ++column)
        inverse[b][column] = __shfl_sync(ALL_LANES, undone, lane % 4 * 8 + column * 4);
    }
  }
#endif
  // Points at the queries that a segment is read for, and loads them. q: [batch_size, QUERY_TOKENS, num_kv_heads *
  // GROUP_SIZE, HEAD_DIM].
  template <class Piece>
  __device__ __forceinline__ void load(const half_type* q, const Piece& s, int num_kv_heads, int lane) {
    token_stride = num_kv_heads * GROUP_SIZE * HEAD_DIM;
    if constexpr (W::MANY_ROWS) {
      rows = q + s.kv_head * GROUP_SIZE * HEAD_DIM;
      members = s.rows, num_members = s.members, num_blocks = W::blocks_of(s.members * COLUMNS);
    } else {
      rows = q + static_cast<long long>(s.row) * QUERY_TOKENS * token_stride + s.kv_head * GROUP_SIZE * HEAD_DIM;
    }
    if constexpr (QUERY_IN_REGISTERS) {
      #pragma unroll
      for (int i = 0; i < K_STEPS; ++i) read(fragment[i], i, lane);
    }
#if QUERY_SCALED
    find_factors(lane);
    if constexpr (QUERY_IN_REGISTERS) {
      #pragma unroll
      for (int i = 0; i < K_STEPS; ++i) scale(fragment[i]);
    }
#endif
  }
};

// The logits of one K tile. s[b] holds tokens lane / 4 and lane / 4 + 8 by columns 2 * (lane % 4) and the next of block
// b. Every other product adds to sums of its own, so that none waits for the one before it.
template <class W>
__device__ __forceinline__ void score(float (&s)[W::HEAD_BLOCKS][4], const Query<W>& query, unsigned tile, int lane) {
  constexpr int HEAD_BLOCKS = W::HEAD_BLOCKS;
  float odd[HEAD_BLOCKS][4];
  #pragma unroll
  for (int b = 0; b < HEAD_BLOCKS; ++b)
    #pragma unroll
    for (int i = 0; i < 4; ++i) s[b][i] = odd[b][i] = 0.0f;
  KeyFragments keys(tile, lane);
  #pragma unroll
  for (int first = 0; first < K_STEPS; first += KEYS_AT_ONCE) {
    unsigned k[KEYS_AT_ONCE][4];
    #pragma unroll
    for (int i = 0; i < KEYS_AT_ONCE; ++i) keys.get(k[i], first + i);
    #pragma unroll
    for (int i = 0; i < KEYS_AT_ONCE; ++i) {
      unsigned q[HEAD_BLOCKS][2];
      query.get(q, first + i, lane);
      #pragma unroll
      for (int b = 0; b < HEAD_BLOCKS; ++b)
        if (query.used(b)) multiply_add(i % 2 ? odd[b] : s[b], k[i], q[b][0], q[b][1]);
    }
  }
  #pragma unroll
  for (int b = 0; b < HEAD_BLOCKS; ++b)
    #pragma unroll
    for (int i = 0; i < 4; ++i) s[b][i] += odd[b][i];
}

}  // namespace pkv
