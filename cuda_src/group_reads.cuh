// Reads for many rows by warpgroups, where there are products for them (READ_TILES, wgmma.cuh): attend() for ReadWidth.
//
// Query columns are the M of these products, 64 of them, which a warpgroup's registers hold; READ_TILES tiles at once are
// the N of S = Q K^T, and V's elements that of O = P V. P goes from the registers of one product to those of the next.
// A stream is a warpgroup, or two that share its columns. What a read's tiles are is simple: they are whole, in one page
// each, and all columns see all of their tokens.
//
// A group of tiles lies in its part of the ring as the products want it: all K, then all V, each in blocks of 64 elements
// of every token, a token's 128 bytes in a row, swizzled. A segment's last group may have fewer tiles; zeros are in place
// of the others, and their tokens are masked, so that the products are the same for every group: of products under a
// condition the compiler waits for each.
#pragma once
#include "attend.cuh"
#include "spans.cuh"
#include "wgmma.cuh"

namespace pkv {

constexpr int GROUP_TOKENS = READ_TILES * PKV_TILE, GROUP_BYTES = READ_TILES * SLOT_BYTES;
constexpr int GROUPS_IN_RING = READ_STAGES / READ_TILES;
constexpr int BLOCK_ROW_BYTES = 128, BLOCK_ELEMENTS = 64, BLOCK_TILE_BYTES = PKV_TILE * BLOCK_ROW_BYTES;
constexpr int BLOCK_BYTES = READ_TILES * BLOCK_TILE_BYTES;  // of a group
constexpr int GROUP_VALUES = READ_TILES * K_TILE_BYTES;     // where V begins

static_assert(CACHE_TYPE == 0 && TILE_IN_PAGE && HEAD_SPLIT == 1 && HEAD_DIM == V_DIM, "others are read by mma.sync");
static_assert(READ_TEAM % 4 == 0 && READ_COLUMNS <= READ_TEAM * 16 && READ_STAGES % READ_TILES == 0
              && IDS_TILES % READ_TILES == 0, "warpgroups read whole groups");
static_assert(sizeof(SharedMemory<ReadWidth>::ring) % 1024 == 0, "the swizzle is one of addresses");

// Loads groups of a stream's tiles; see Loader.
struct GroupLoader : Loader<ReadWalk, ReadWidth> {
  int held = 0;  // tiles of the group whose V is to load

  __device__ __forceinline__ explicit GroupLoader(const ReadWalk& first) : Loader(first) {}

  __device__ __forceinline__ void issue_keys(const Pages& pages, unsigned slot, int stream, int lane) {
    if (live) advance_group(pages, stream, lane);
    held = 0;
    if (live) {
      pending_tile = tile, pending_count = count, pending_head = now.kv_head, pending_ids = ids;
      held = min(READ_TILES, (now.tile_end - tile + ReadWidth::STREAMS - 1) / ReadWidth::STREAMS);
      copy_group(pages.k, slot, lane);
      tile += held * ReadWidth::STREAMS, count += held;
      if (count % IDS_TILES == 0) {
        ids = ids_next;
        load_next_ids(pages, lane);
      }
    }
    copy_commit();
  }
  __device__ __forceinline__ void issue_values(const Pages& pages, unsigned slot, int lane) const {
    copy_group(pages.v, slot + GROUP_VALUES, lane);
    copy_commit();
  }

 private:
  __device__ __forceinline__ void advance_group(const Pages& pages, int stream, int lane) {
    if (tile + READ_TILES * ReadWidth::STREAMS < now.tile_end) return;
    if (!ahead_known) look_ahead<false>(pages, stream, lane);
    if (tile < now.tile_end) return;
    now = ahead, live = ahead_live, ids = ids_ahead, ahead_known = !live;
    tile = now.first, count = 0;
    if (now.tile_end - tile > IDS_TILES * ReadWidth::STREAMS) load_next_ids(pages, lane);
  }
  __device__ __forceinline__ void copy_group(const PagedTensor& tensor, unsigned to, int lane) const {
    if (held == 0) return;
    constexpr int VECTORS = K_ROW_BYTES / 16, ROWS = ReadWidth::TEAM_SIZE * 32 / VECTORS;  // that a stream copies at once
    constexpr int TILES = ROWS > PKV_TILE ? ROWS / PKV_TILE : 1;  // of which each lane copies one
    const int own = ReadWidth::team_member() * 32 + lane, vector = own % VECTORS;
    const int row = own / VECTORS % PKV_TILE, ahead = own / VECTORS / PKV_TILE;  // of the tiles copied at once
    const cache_type* from = keep_address(tensor.at + static_cast<long long>(pending_head) * tensor.head_stride
                                          + static_cast<long long>(row) * tensor.token_stride + vector * 8);
    const unsigned place = to + vector / 8 * BLOCK_BYTES + row * BLOCK_ROW_BYTES + (((vector ^ row) & 7) << 4);
    #pragma unroll
    for (int first_tile = 0; first_tile < READ_TILES; first_tile += TILES) {
      const int j = first_tile + ahead;
      const unsigned id = __shfl_sync(ALL_LANES, pending_ids, pending_count % IDS_TILES + j);
      const int token = (pending_tile + j * ReadWidth::STREAMS) * PKV_TILE % PAGE_SIZE;
      const cache_type* tile_at = from + id * tensor.page_stride + static_cast<long long>(token) * tensor.token_stride;
      #pragma unroll
      for (int first = 0; first < PKV_TILE; first += ROWS)
        copy_async(place + j * BLOCK_TILE_BYTES + first * BLOCK_ROW_BYTES,
                   tile_at + static_cast<long long>(tensor.token_stride) * first, j < held ? 16 : 0);
    }
  }
};

// The ring of a stream's groups, driven as TeamRing is.
struct GroupRing {
  GroupLoader& loader;
  const Pages& pages;
  unsigned begin;
  int stream, lane;
  unsigned slot;  // address of the group at hand
  int stage;

  static constexpr int COPIES_AHEAD = 2 * GROUPS_IN_RING - 2;

  __device__ __forceinline__ void fill() {
    #pragma unroll 1
    for (int i = 0; i < GROUPS_IN_RING; ++i) {
      loader.issue_values(pages, begin + (i - 1) * GROUP_BYTES, lane);  // of the group before; the first has none
      loader.issue_keys(pages, begin + i * GROUP_BYTES, stream, lane);
    }
  }
  __device__ __forceinline__ void await_keys() {
    meet();
    loader.issue_values(pages, begin + (stage > 0 ? stage - 1 : GROUPS_IN_RING - 1) * GROUP_BYTES, lane);
  }
  __device__ __forceinline__ void await_values() {
    meet();
    loader.issue_keys(pages, slot, stream, lane);
  }
  __device__ __forceinline__ void leave() {
    if (++stage == GROUPS_IN_RING) stage = 0;
    slot = begin + stage * GROUP_BYTES;
  }

 private:
  __device__ __forceinline__ void meet() {
    copy_wait<COPIES_AHEAD>();
    publish_copies();
    sync_warps<ReadWidth::TEAM_SIZE>(1 + stream);
  }
};

// The queries of a read as A operands. A lane's rows of the product are columns own_column() and 8 further.
struct GroupQuery {
  unsigned fragment[K_STEPS][4];

  __device__ __forceinline__ static int own_column(int lane) { return ReadWidth::team_member() * 16 + lane / 4; }

  // q: [batch_size, QUERY_TOKENS, num_kv_heads * GROUP_SIZE, HEAD_DIM]. Columns past the last one repeat a member's.
  __device__ __forceinline__ void load(const half_type* q, const ReadPiece& s, int num_kv_heads, int lane) {
    const int token_stride = num_kv_heads * GROUP_SIZE * HEAD_DIM;
    #pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = own_column(lane) + half * 8;
      const ColumnPlace place = place_of(column % COLUMNS);
      const half_type* row = q + s.kv_head * GROUP_SIZE * HEAD_DIM + place.token * token_stride + place.head * HEAD_DIM
          + static_cast<long long>(s.rows[min(column / COLUMNS, s.members - 1)]) * QUERY_TOKENS * token_stride;
      const unsigned* pairs = reinterpret_cast<const unsigned*>(row) + lane % 4;
      #pragma unroll
      for (int step = 0; step < K_STEPS; ++step)
        fragment[step][half] = __ldg(pairs + step * 8), fragment[step][half + 2] = __ldg(pairs + step * 8 + 4);
    }
  }
};

// The online softmax of a warp's 16 columns; see WarpState. acc[8 i ..] as m64nNk16 deals it out.
struct GroupState {
  float m[2], l[2];
  float acc[V_DIM / 2];

  __device__ __forceinline__ void reset() {
    m[0] = m[1] = LOWEST, l[0] = l[1] = 0.0f;
    #pragma unroll
    for (int i = 0; i < V_DIM / 2; ++i) acc[i] = 0.0f;
  }
  __device__ __forceinline__ void raise(float (&top)[2]) {
    #pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = fmaxf(top[half], __shfl_xor_sync(ALL_LANES, top[half], 1));
      top[half] = fmaxf(top[half], __shfl_xor_sync(ALL_LANES, top[half], 2));
      top[half] = fmaxf(top[half], m[half]);
      const float scale = exp2_fast(m[half] - top[half]);
      m[half] = top[half], l[half] *= scale;
      #pragma unroll
      for (int i = 0; i < V_DIM / 2; i += 4) acc[i + 2 * half] *= scale, acc[i + 2 * half + 1] *= scale;
    }
  }
  // s: the logits of a group of which `held` tiles are there; they become the weights p of each tile.
  __device__ __forceinline__ void weigh(unsigned (&p)[READ_TILES][4], float (&s)[GROUP_TOKENS / 2], int held,
                                        float scale, float cap) {
    #pragma unroll
    for (int i = 0; i < GROUP_TOKENS / 2; ++i) s[i] = SOFT_CAP ? cap * hyperbolic_tangent(s[i] * scale) : s[i] * scale;
    if (held < READ_TILES) {
      #pragma unroll
      for (int i = 8; i < GROUP_TOKENS / 2; ++i)
        if (i / 8 >= held) s[i] = __int_as_float(0xff800000);
    }
    float top[2] = {s[0], s[2]};
    #pragma unroll
    for (int i = 0; i < GROUP_TOKENS / 2; i += 4)
      top[0] = fmaxf(top[0], fmaxf(s[i], s[i + 1])), top[1] = fmaxf(top[1], fmaxf(s[i + 2], s[i + 3]));
    if (__any_sync(ALL_LANES, top[0] > m[0] + RESCALE_ABOVE || top[1] > m[1] + RESCALE_ABOVE)) raise(top);
    #pragma unroll
    for (int i = 0; i < GROUP_TOKENS / 2; i += 2) {
      const int half = i / 2 % 2;
      const unsigned pair = pack_operands(exp2_fast(s[i] - m[half]), exp2_fast(s[i + 1] - m[half]));
      p[i / 8][i / 2 % 4] = pair;
      const float2 rounded = unpack_operands(pair);  // l sums the weights that V is multiplied with
      l[half] += rounded.x + rounded.y;
    }
  }
  // Leaves it in shared memory: of its stream's rows, those of its columns.
  __device__ __forceinline__ void publish(float (&to)[ReadWidth::COLUMNS][STATE_ROW], int lane) const {
    #pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = GroupQuery::own_column(lane) + half * 8;
      float sum = l[half];
      sum += __shfl_xor_sync(ALL_LANES, sum, 1);
      sum += __shfl_xor_sync(ALL_LANES, sum, 2);
      if (column >= ReadWidth::COLUMNS) continue;
      float* row = to[column];
      if (lane % 4 == 0) row[V_DIM] = m[half], row[V_DIM + 1] = sum;
      #pragma unroll
      for (int i = 0; i < V_DIM / 8; ++i)
        *reinterpret_cast<float2*>(row + i * 8 + lane % 4 * 2) =
            make_float2(acc[i * 4 + half * 2], acc[i * 4 + half * 2 + 1]);
    }
  }
};

__device__ __forceinline__ void score_group(float (&s)[GROUP_TOKENS / 2], const GroupQuery& query, unsigned keys) {
  const unsigned long long first = shared_operand(keys, 16);
  hold(s);
  begin_products();
  #pragma unroll
  for (int step = 0; step < K_STEPS; ++step) {
    const int at = step * 16 / BLOCK_ELEMENTS * BLOCK_BYTES + step * 16 % BLOCK_ELEMENTS * ELEMENT_BYTES;
    multiply_group<false>(s, query.fragment[step], further(first, at), step > 0);
  }
  end_products(s);
}
__device__ __forceinline__ void accumulate_group(GroupState& state, const unsigned (&p)[READ_TILES][4],
                                                 unsigned values) {
  const unsigned long long first = shared_operand(values, BLOCK_BYTES);
  hold(state.acc);
  begin_products();
  #pragma unroll
  for (int j = 0; j < READ_TILES; ++j)
    multiply_group<true>(state.acc, p[j], further(first, j * BLOCK_TILE_BYTES), true);
  end_products(state.acc);
}

// Merges the streams' states of a warp's columns, from `first` on every WARPS-th, and sends them where `emit` says. First a
// lane for each column finds what the streams' parts of it weigh, then all lanes add them: gather() would have each column
// wait for its own.
template <class Emit>
__device__ __forceinline__ void merge_columns(const ReadPiece& s,
                                              const float (&states)[ReadWidth::STREAMS][ReadWidth::COLUMNS][STATE_ROW],
                                              int first, const Emit& emit, int lane) {
  constexpr int STREAMS = ReadWidth::STREAMS;
  const int end = columns_of<ReadWidth>(s), own = first + lane * WARPS;
  static_assert(ReadWidth::COLUMNS <= 32 * WARPS && LANE_QUADS == 1, "a lane has a column, and a quad of each");
  float scale[STREAMS], m = LOWEST, l = 0.0f;
  #pragma unroll
  for (int stream = 0; stream < STREAMS; ++stream) {
    const float2 ml = own < end ? *reinterpret_cast<const float2*>(&states[stream][own][V_DIM]) : make_float2(LOWEST, 0.0f);
    scale[stream] = ml.x, m = fmaxf(m, ml.x);
  }
  #pragma unroll
  for (int stream = 0; stream < STREAMS; ++stream) {
    scale[stream] = exp2_fast(scale[stream] - m);
    if (own < end) l += states[stream][own][V_DIM + 1] * scale[stream];
  }
  if (own < end) send(emit.ml(s, own), make_float2(m, l));
  #pragma unroll 2
  for (int i = 0; first + i * WARPS < end; ++i) {
    const int column = first + i * WARPS;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    #pragma unroll
    for (int stream = 0; stream < STREAMS; ++stream) {
      const float weight = __shfl_sync(ALL_LANES, scale[stream], i);
      const float4 part = lane < HEAD_QUADS ? reinterpret_cast<const float4*>(states[stream][column])[lane] : sum;
      sum.x += part.x * weight, sum.y += part.y * weight, sum.z += part.z * weight, sum.w += part.w * weight;
    }
    if (lane < HEAD_QUADS) send(emit.acc(s, column) + lane, sum);
  }
}

// attend() of a range's reads.
template <class Start, class Emit>
__device__ __forceinline__ bool attend_groups(const ReadWalk& source, const Pages& pages, const DecodeArguments& given,
                                              SharedMemory<ReadWidth>& shared, Start& start, Emit& emit) {
  using W = ReadWidth;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, stream = warp / W::TEAM_SIZE;
  const unsigned first_slot = shared_address(shared.ring[stream][0]);
  GroupLoader loader(source);
  GroupRing ring{.loader = loader, .pages = pages, .begin = first_slot, .stream = stream, .lane = lane,
                 .slot = first_slot, .stage = 0};
  Dealer<ReadWalk, W> walk(source);
  GroupQuery query;
  settle(query);

  loader.template look_ahead<Start::EARLY>(pages, stream, lane);
  Share<ReadWalk> share;
  settle(share);
  bool live = walk.next(share, stream);
  start.release(pages, loader);
  if (live) query.load(given.q, share, given.num_kv_heads, lane);
  ring.fill();
  if (!start.begin(pages)) {
    copy_wait<0>();
    return false;
  }

  ReadPiece before;
  settle(before);
  for (int count = 0;; ++count) {
    GroupState state;
    settle(state);
    if (live) {
      state.reset();
      for (int tile = share.first; tile < share.tile_end; tile += READ_TILES * W::STREAMS) {
        const int held = min(READ_TILES, (share.tile_end - tile + W::STREAMS - 1) / W::STREAMS);
        float s[GROUP_TOKENS / 2];
        unsigned p[READ_TILES][4];
        ring.await_keys();
        score_group(s, query, ring.slot);
        state.weigh(p, s, held, given.scale, given.cap);
        ring.await_values();
        accumulate_group(state, p, ring.slot + GROUP_VALUES);
        ring.leave();
      }
    }
    // From here on as attend() does, but for how states are merged.
    Share<ReadWalk> next;
    settle(next);
    const bool more = live && walk.next(next, stream);
    if (more) query.load(given.q, next, given.num_kv_heads, lane);
    if (count > 0) {
      shared.left[0].wait(count - 1);
      merge_columns(before, shared.states[0], (warp + (count - 1) * (WARPS - W::COLUMNS % WARPS)) % WARPS, emit, lane);
      shared.merged[0].arrive(lane);
    }
    if (!live) break;
    if (count > 0) shared.merged[0].wait(count - 1);
    state.publish(shared.states[0][stream], lane);
    shared.left[0].arrive(lane);
    before = share, share = next, live = more;
  }
  copy_wait<0>();
  return true;
}

}  // namespace pkv
