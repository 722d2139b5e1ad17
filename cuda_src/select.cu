// pkv_select_pages: which pages each (row, KV head) reads in a step: scores, pins, budget and the sorted list.
//
// pkvsim.selection states the rules. For each (row, KV head): every page of the row is scored for each query head of the
// group (page_scores.cuh), or has its score given; the scores are aggregated over the group (AGGREGATION); the first
// sink_pages and the last recent_pages are pinned; and of all pages the budget's many are taken (top_pages.cuh), pinned
// ones first, of equal scores the first.
//
// Grid: [chunks, batch_size * num_kv_heads]; block: [WARPS * 32]; dynamic shared memory: pkv::SelectMemory and
// score_stride words. CTA (c, v) scores the pages [c, c + 1) * chunk_pages of list v; the last one to finish a list
// selects. So a few long rows use the whole GPU, and nobody waits.
//
//   q           [batch_size, num_kv_heads * GROUP_SIZE, HEAD_DIM]
//   summaries   [num_pages, num_kv_heads, 2, HEAD_DIM]: mean and standard deviation, or minimum and maximum
//   scores      [batch_size * num_kv_heads, GROUP_SIZE, score_stride] float, workspace; GIVEN: [.., 1, score_stride], in
//   sums        [batch_size * num_kv_heads, gridDim.x, GROUP_SIZE] float2, workspace (SOFTMAX_MEAN)
//   tickets     [batch_size * num_kv_heads] int, 0 between launches
//   budgets     [batch_size, num_kv_heads] pages of each list, or null: max(least_pages, ceil(row's pages * parts / 2^16))
//   pages, counts  of PageList, out: [batch_size, num_kv_heads, max_selected], [batch_size, num_kv_heads]
//
// Its speed is bound by HBM: 4 HEAD_DIM bytes of each page and KV head. What one CTA selects, others score.
#include "mma.cuh"
#include "arguments.cuh"
#include "page_scores.cuh"
#include "top_pages.cuh"

namespace pkv {

enum Aggregation { MAXIMUM = 0, SOFTMAX_MEAN = 1 };

constexpr int SELECT_THREADS = WARPS * 32;
// CTAs of an SM: a warp has two halves of 16 summaries on their way, so that two CTAs' are more than an SM can read.
constexpr int SELECT_CTAS = GROUP_SIZE * HEAD_DIM <= 1024 ? 2 : 1;
constexpr int PAGES_TOGETHER = GROUP_SIZE <= 8 ? 2 : 1;  // whose scores a thread reads at once

struct SelectMemory {
  TopPages top;
  float2 of_warp[WARPS][GROUP_SIZE];  // ScoreSum of each warp's pages,
  float2 of_list[GROUP_SIZE];         // of all pages
  int last;                           // whether this CTA selects
  // then the keys, [score_stride]
};

// One (row, KV head).
struct Selection {
  const SelectArguments& given;
  int list, row, head, row_pages, budget;

  __device__ __forceinline__ Selection(const SelectArguments& arguments, int v, int row_len)
      : given(arguments), list(v), row(divide(v, arguments.num_kv_heads)), head(v - row * arguments.num_kv_heads) {
    row_pages = divide(row_len + PAGE_SIZE - 1, PAGE_SIZE);
    const int asked = given.budgets ? read_early(given.budgets + v)
                                    : max(given.least_pages, static_cast<int>(
                                          (static_cast<long long>(row_pages) * given.parts + 65535) >> 16));
    const int pinned = given.sink_pages + given.recent_pages;
    budget = min(min(max(asked, pinned), row_pages), given.max_selected);
  }
  __device__ __forceinline__ float* scores(int column) const {
    return given.scores + (static_cast<long long>(list) * (SCORING == GIVEN ? 1 : GROUP_SIZE) + column)
                              * given.score_stride;
  }
  __device__ __forceinline__ int* pages() const {
    return given.pages + static_cast<long long>(list) * given.max_selected;
  }

  // Where the sums of a chunk's scores are.
  __device__ __forceinline__ float2* sums(int chunk) const {
    return given.sums + (static_cast<long long>(list) * gridDim.x + chunk) * GROUP_SIZE;
  }

  // Scores the pages [begin, end), chunk blockIdx.x of the list.
  __device__ __forceinline__ void score(const PageTable& table, int begin, int end, SelectMemory& memory) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    constexpr int STEP = WARPS * SCORED_PAGES;
    ScoreQuery query;
    query.load(given.q + (static_cast<long long>(row) * given.num_kv_heads + head) * GROUP_SIZE * HEAD_DIM, lane);
    ScoreSum own[SCORE_BLOCKS][2];  // of heads 2 (lane % 4) and the next
    #pragma unroll
    for (int b = 0; b < SCORE_BLOCKS; ++b) own[b][0].reset(), own[b][1].reset();
    const auto id_of = [&](int page) { return table.cut(table.template stored<false>(row, min(page, end - 1))); };
    const auto summary = [&](int id) {
      return given.summaries + (static_cast<long long>(id) * given.num_kv_heads + head) * 2 * HEAD_DIM;
    };
    int first = begin + warp * SCORED_PAGES;
    if (first < end) {
      ScoreRows rows;
      int low = id_of(first + lane / 4), high = id_of(first + lane / 4 + 8);
      rows.template load<0>(summary(low), summary(high), lane);
      rows.template load<1>(summary(low), summary(high), lane);
      // Ids are looked up two steps ahead, summaries one: each half is asked for anew as soon as it has been used.
      low = id_of(first + STEP + lane / 4), high = id_of(first + STEP + lane / 4 + 8);
      #pragma unroll 1
      for (; first < end; first += STEP) {
        const bool more = first + STEP < end;
        const half_type *low_at = summary(low), *high_at = summary(high);
        if (more) low = id_of(first + 2 * STEP + lane / 4), high = id_of(first + 2 * STEP + lane / 4 + 8);
        float sums[SCORE_BLOCKS][4], others[SCORE_BLOCKS][4];
        rows.template multiply<0>(sums, query);
        if (more) rows.template load<0>(low_at, high_at, lane);
        rows.template multiply<1>(others, query);
        if (more) rows.template load<1>(low_at, high_at, lane);
        #pragma unroll
        for (int b = 0; b < SCORE_BLOCKS; ++b)
          #pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int column = b * 8 + lane % 4 * 2 + i, page = first + lane / 4;
            float logits[2];
            #pragma unroll
            for (int j = 0; j < 2; ++j) {
              const float logit = ScoreRows::logit(sums[b][j * 2 + i], others[b][j * 2 + i], given.scale);
              if (column < GROUP_SIZE && page + j * 8 < end) scores(column)[page + j * 8] = logit;
              logits[j] = page + j * 8 < end ? logit : LEAST_SCORE;
            }
            if constexpr (AGGREGATION == SOFTMAX_MEAN) own[b][i].add(logits[0], logits[1]);
          }
      }
    }
    if constexpr (AGGREGATION == SOFTMAX_MEAN) {
      #pragma unroll
      for (int b = 0; b < SCORE_BLOCKS; ++b)
        #pragma unroll
        for (int i = 0; i < 2; ++i) {
          #pragma unroll
          for (int hop = 4; hop < 32; hop <<= 1) own[b][i].merge_lanes(hop);
          const int column = b * 8 + lane % 4 * 2 + i;
          if (lane < 4 && column < GROUP_SIZE) memory.of_warp[warp][column] = make_float2(own[b][i].top, own[b][i].sum);
        }
      __syncthreads();
      if (threadIdx.x < GROUP_SIZE) {
        ScoreSum all;
        all.reset();
        #pragma unroll
        for (int w = 0; w < WARPS; ++w)
          all.merge(memory.of_warp[w][threadIdx.x].x, memory.of_warp[w][threadIdx.x].y);
        sums(blockIdx.x)[threadIdx.x] = make_float2(all.top, all.sum);
      }
    }
  }

  // The scores of the pages i, i + SELECT_THREADS, .., all asked for at once; the lowest past the row's end.
  __device__ __forceinline__ void read(float (&s)[PAGES_TOGETHER][GROUP_SIZE], int i) const {
    #pragma unroll
    for (int j = 0; j < PAGES_TOGETHER; ++j)
      #pragma unroll
      for (int g = 0; g < (SCORING == GIVEN ? 1 : GROUP_SIZE); ++g) {
        const int page = i + j * SELECT_THREADS;
        s[j][g] = page < row_pages ? load_past_l1(scores(g) + page) : LEAST_SCORE;
      }
  }

  // The sums over all of the list's chunks, for SOFTMAX_MEAN: a warp for each head, a lane for each chunk.
  __device__ __forceinline__ void add_chunks(SelectMemory& memory, int chunks) const {
    const int lane = threadIdx.x % 32;
    for (int g = threadIdx.x / 32; g < GROUP_SIZE; g += WARPS) {
      ScoreSum all;
      all.reset();
      for (int chunk = lane; chunk < chunks; chunk += 32) {
        const float2 own = load_past_l1(sums(chunk) + g);
        all.merge(own.x, own.y);
      }
      #pragma unroll
      for (int hop = 1; hop < 32; hop <<= 1) all.merge_lanes(hop);
      if (lane == 0) memory.of_list[g] = make_float2(all.top, all.sum);
    }
    __syncthreads();
  }

  // Selects by all pages' scores, which `chunks` CTAs have left.
  __device__ __forceinline__ void select(SelectMemory& memory, int chunks) const {
    unsigned* keys = reinterpret_cast<unsigned*>(&memory + 1);
    float maximum[GROUP_SIZE], inverse[GROUP_SIZE];
    if constexpr (SCORING != GIVEN && AGGREGATION == SOFTMAX_MEAN) {
      add_chunks(memory, chunks);
      #pragma unroll
      for (int g = 0; g < GROUP_SIZE; ++g)
        maximum[g] = memory.of_list[g].x, inverse[g] = __fdividef(1.0f, memory.of_list[g].y);
    }
    unsigned largest = 0;  // of the keys that are not pinned
    #pragma unroll 1
    for (int i = threadIdx.x; i < row_pages; i += PAGES_TOGETHER * SELECT_THREADS) {
      float s[PAGES_TOGETHER][GROUP_SIZE];
      read(s, i);
      #pragma unroll
      for (int j = 0; j < PAGES_TOGETHER; ++j) {
        const int page = i + j * SELECT_THREADS;
        if (page >= row_pages) break;
        float score = s[j][0];
        if constexpr (SCORING != GIVEN && AGGREGATION == SOFTMAX_MEAN) {
          score = 0.0f;
          #pragma unroll
          for (int g = 0; g < GROUP_SIZE; ++g) score += exp2_fast(s[j][g] - maximum[g]) * inverse[g];
        } else if constexpr (SCORING != GIVEN) {
          #pragma unroll
          for (int g = 1; g < GROUP_SIZE; ++g) score = fmaxf(score, s[j][g]);
        }
        const bool pinned = page < given.sink_pages || page >= row_pages - given.recent_pages;
        keys[page] = pinned ? PINNED : key_of(score);
        if (!pinned) largest = max(largest, keys[page]);
      }
    }
    const int pinned = min(row_pages, given.sink_pages + given.recent_pages);
    memory.top.list(keys, row_pages, pinned, largest, budget, pages());
  }
};

}  // namespace pkv

extern "C" __global__ void __launch_bounds__(pkv::SELECT_THREADS, pkv::SELECT_CTAS)
pkv_select_pages(const pkv::SelectArguments given) {
  using namespace pkv;
  extern __shared__ __align__(16) unsigned char memory[];
  SelectMemory& shared = *reinterpret_cast<SelectMemory*>(memory);
  let_next_kernel_start();
  wait_for_previous_kernel();
  const Lengths lens{given.lengths, given.batch_size, given.max_tokens, 0 PKV_LAST_PAGE(, given.row_begins)};
  const PageTable table{given.page_ids, given.table_stride, given.num_pages
                        PKV_CSR(, given.row_begins, given.batch_size)};
  const int v = blockIdx.y;
  const Selection selection(given, v, lens[divide(v, given.num_kv_heads)]);
  const int begin = blockIdx.x * given.chunk_pages;
  if (blockIdx.x == 0 && threadIdx.x == 0) given.counts[v] = selection.budget;
  if (selection.budget >= selection.row_pages || selection.budget <= 0) {  // nothing is left out
    const int end = min(begin + given.chunk_pages, selection.budget);
    for (int i = begin + threadIdx.x; i < end; i += SELECT_THREADS) selection.pages()[i] = i;
    return;
  }
  if (begin >= selection.row_pages) return;
  int chunks = 1;
  if constexpr (SCORING != GIVEN) {
    selection.score(table, begin, min(begin + given.chunk_pages, selection.row_pages), shared);
    chunks = divide(selection.row_pages + given.chunk_pages - 1, given.chunk_pages);
    // What the CTA has written is seen by whoever finds its ticket taken.
    __syncthreads();
    if (chunks > 1) {
      if (threadIdx.x == 0) {
        __threadfence();
        shared.last = atomicAdd(given.tickets + v, 1) == chunks - 1;
        if (shared.last) given.tickets[v] = 0;
        __threadfence();
      }
      __syncthreads();
      if (!shared.last) return;
    }
  }
  selection.select(shared, chunks);
}
