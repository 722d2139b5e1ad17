// How the warps of a stream drive its ring of tiles: who waits for what, and when a slot is filled again.
//
// Two kinds of team do it, and both are told the same four moments of a tile, in this order:
//   await_keys    returns when K is in the slot
//   keys_read     is called when this warp has read K
//   await_values  returns when V is in the slot
//   values_read   is called when this warp has read V, and leaves the tile
// A warp alone (LoneRing) refills what it has read at once, for no other warp reads it. A team (TeamRing) may refill
// only what all its warps have read. It meets twice a tile anyway, since what one warp has copied the others read; so K
// is refilled when the team next meets, at await_values, and V at the await_keys of the next tile. The copies of both
// kinds are started in the same order, K and V of a tile in turn, which is what the waits count.
#pragma once
#include "paged_load.cuh"

namespace pkv {

template <class Source, class W>
struct LoneRing {
  Loader<Source, W>& loader;
  const Pages& pages;
  unsigned begin;  // shared-memory address of the stream's first slot
  int stream, lane;
  unsigned slot;   // address of the tile at hand
  int stage;       // of the ring, in which that is

  // Copies that have been started since that of the half which is waited for.
  static constexpr int COPIES_AHEAD = 2 * W::NUM_STAGES - 1;

  __device__ __forceinline__ void fill() {
    #pragma unroll 1  // unrolled, its code's fetching shows in short steps
    for (int i = 0; i < W::NUM_STAGES; ++i) {
      loader.issue_k(pages, begin + i * SLOT_BYTES, stream, lane);
      loader.issue_v(pages, begin + i * SLOT_BYTES, lane);
    }
  }
  __device__ __forceinline__ void await_keys() { await(); }
  __device__ __forceinline__ void keys_read() {
    __syncwarp();
    loader.issue_k(pages, slot, stream, lane);
  }
  __device__ __forceinline__ void await_values() { await(); }
  __device__ __forceinline__ void values_read() {
    __syncwarp();
    loader.issue_v(pages, slot, lane);
    if (++stage == W::NUM_STAGES) stage = 0;
    slot = begin + stage * SLOT_BYTES;
  }

 private:
  __device__ __forceinline__ void await() {
    copy_wait<COPIES_AHEAD>();
    __syncwarp();
  }
};

template <class Source, class W>
struct TeamRing {
  Loader<Source, W>& loader;
  const Pages& pages;
  unsigned begin;
  int stream, lane;
  unsigned slot;
  int stage;

  static constexpr int COPIES_AHEAD = 2 * W::NUM_STAGES - 2;  // one fewer: a half is refilled half a tile later

  __device__ __forceinline__ void fill() {
    #pragma unroll 1
    for (int i = 0; i < W::NUM_STAGES; ++i) {
      loader.issue_v(pages, begin + (i - 1) * SLOT_BYTES, lane);  // of the tile before; the first one copies nothing
      loader.issue_k(pages, begin + i * SLOT_BYTES, stream, lane);
    }
  }
  __device__ __forceinline__ void await_keys() {
    meet();
    loader.issue_v(pages, begin + (stage > 0 ? stage - 1 : W::NUM_STAGES - 1) * SLOT_BYTES, lane);
  }
  __device__ __forceinline__ void keys_read() {}
  __device__ __forceinline__ void await_values() {
    meet();
    loader.issue_k(pages, slot, stream, lane);
  }
  __device__ __forceinline__ void values_read() {
    if (++stage == W::NUM_STAGES) stage = 0;
    slot = begin + stage * SLOT_BYTES;
  }

 private:
  // Returns when all of the team's copies of the half are there, and all have read what they waited for before.
  __device__ __forceinline__ void meet() {
    copy_wait<COPIES_AHEAD>();
    sync_warps<W::TEAM_SIZE>(1 + stream);
  }
};

template <class Source, class W, int SIZE>
struct RingOf { using type = TeamRing<Source, W>; };
template <class Source, class W>
struct RingOf<Source, W, 1> { using type = LoneRing<Source, W>; };
template <class Source, class W>
using Ring = typename RingOf<Source, W, W::TEAM_SIZE>::type;

}  // namespace pkv
