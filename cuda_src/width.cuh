// How many columns a CTA serves at a time, and how its warps share them and the tiles.
//
// Most kernels have one width, that of a row: RowWidth. The kernel of shared reads (shared.cu) has a second one beside
// it, ReadWidth, for what is read for many rows at once. The decode path (attend.cuh and what it includes) is compiled
// for each width that a kernel has.
#pragma once
#include "variant.cuh"

namespace pkv {

// Zeroes what may be used only where it has been set. Left undefined inside a loop, a variable keeps the last turn's
// value as far as the compiler knows; where two widths take turns, that is a register of one throughout the other's
// main loop. Kernels of one width have nothing to gain.
template <class T>
__device__ __forceinline__ void settle(T& value) {
  if constexpr (READ_COLUMNS > 0) value = T{};
}

template <int SERVED, int SHARING, int DEPTH, int WAITING, bool OF_READS>
struct Width {
  static constexpr int COLUMNS = SERVED;         // of the product
  static constexpr int TEAM_SIZE = SHARING;      // warps that share a ring of tiles, and the columns
  static constexpr int NUM_STAGES = DEPTH;       // tiles of K and V in each ring
  static constexpr int NUM_BUFFERS = WAITING;    // segments whose states can wait in shared memory for their merge
  static constexpr bool MANY_ROWS = OF_READS;    // the columns are those of several rows
  static constexpr int STREAMS = WARPS / TEAM_SIZE;  // rings of a CTA, and states of each segment that it merges

  // A warp of a team serves so many columns, the last one perhaps fewer; products take them in blocks of 8.
  static constexpr int WARP_COLUMNS = (COLUMNS + TEAM_SIZE - 1) / TEAM_SIZE;
  static constexpr int LAST_COLUMNS = COLUMNS - (TEAM_SIZE - 1) * WARP_COLUMNS;
  static constexpr int HEAD_BLOCKS = (WARP_COLUMNS + 7) / 8;

  // Queries stay in registers while they fit beside the accumulators; else they are read again for every tile, from L1.
  static constexpr bool QUERY_IN_REGISTERS = K_STEPS * HEAD_BLOCKS <= 16;
  // Whether a segment's queries are loaded before the last one's states are merged. To scale them is to wait for them,
  // and takes the registers of the merge; those of large 8-bit heads find no room beside it.
  static constexpr bool QUERY_EARLY = !QUERY_SCALED && !(CACHE_TYPE && HEAD_DIM > 128);

  static_assert(WARPS % TEAM_SIZE == 0, "teams are whole");
  static_assert(TEAM_SIZE == 1 || STREAMS < 16, "each team has a barrier of its own");
  static_assert(LAST_COLUMNS > 0, "no warp is without columns");

  // The place of this warp in its team, the first of the columns that it serves, and how many it has.
  __device__ __forceinline__ static int team_member() { return TEAM_SIZE > 1 ? threadIdx.x / 32 % TEAM_SIZE : 0; }
  __device__ __forceinline__ static int first_column() { return team_member() * WARP_COLUMNS; }
  __device__ __forceinline__ static int own_columns() {
    return LAST_COLUMNS == WARP_COLUMNS ? WARP_COLUMNS : min(WARP_COLUMNS, COLUMNS - first_column());
  }
  // The i-th column of this warp. Those of many rows are dealt to the team by blocks, so that reads for few rows leave
  // every warp's last blocks empty (blocks_of) and no warp idle.
  __device__ __forceinline__ static int column_at(int i) {
    return MANY_ROWS ? (i / 8 * TEAM_SIZE + team_member()) * 8 + i % 8 : first_column() + i;
  }
  // The blocks of each warp in which some of a segment's columns are.
  __device__ __forceinline__ static int blocks_of(int columns) {
    return (columns + 8 * TEAM_SIZE - 1) / (8 * TEAM_SIZE);
  }
};

using RowWidth = Width<COLUMNS, TEAM, STAGES, BUFFERS, false>;
#if READ_COLUMNS
// Reads are long and their segments few, so one buffer is enough.
using ReadWidth = Width<READ_COLUMNS, READ_TEAM, READ_STAGES, 1, true>;
#endif

}  // namespace pkv
