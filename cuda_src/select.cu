// pkv_select_pages: which pages each (row, KV head) reads in a step: scores, pins, budget and the sorted list.
//
// pkvsim.selection states the rules. For each (row, KV head): every page of the row is scored for each query head of the
// group (page_scores.cuh), or has its score given; the scores are aggregated over the group (AGGREGATION); the first
// sink_pages and the last recent_pages are pinned; and of all pages the budget's many are taken (top_pages.cuh), pinned
// ones first, of equal scores the first.
//
// Grid: [chunks * num_kv_heads, batch_size]; block: [WARPS * 32]; dynamic shared memory: pkv::SelectMemory and what is
// said there. CTA (c * num_kv_heads + h, row) scores the pages [c, c + 1) * chunk_pages for KV head h; the last one to
// finish a list selects. So a few long rows use the whole GPU, and nobody waits. The heads' summaries of a page lie
// side by side, and CTAs that start side by side read them.
//
//   q           [batch_size, num_kv_heads * GROUP_SIZE, HEAD_DIM]
//   summaries   [num_pages, num_kv_heads, 2, HEAD_DIM]: mean and standard deviation, or minimum and maximum, or 8-bit
//               codes of them (SUMMARY_CODES), whose scales are summary_scales [num_pages, num_kv_heads]; or
//               [num_pages, num_kv_heads, 8, HEAD_DIM / 2]: two 4-bit codes a byte of centroids (SCORING 3), with
//               summary_scales [num_pages, num_kv_heads, 8] pairs of FP16
//   scores      [batch_size * num_kv_heads, score_stride, PAGE_VALUES] float, workspace, or in where they are GIVEN
//   sums        [batch_size * num_kv_heads, chunks, GROUP_SIZE] float2, workspace (SOFTMAX_MEAN)
//   tickets     [batch_size * num_kv_heads] int, 0 between launches
//   budgets     [batch_size, num_kv_heads] pages of each list, or null: max(least_pages, ceil(row's pages * parts / 2^16))
//   pages, counts  of PageList, out: [batch_size, num_kv_heads, max_selected], [batch_size, num_kv_heads]
//
// Its speed is bound by HBM: 4 HEAD_DIM bytes of each page and KV head. What one CTA selects, others score.
#include "mma.cuh"
#include "arguments.cuh"
#include "page_weights.cuh"
#if SCORING == 3
#include "centroid_scores.cuh"
#elif SUMMARY_CODES
#include "coded_scores.cuh"
#endif
#include "top_pages.cuh"

namespace pkv {

#if SCORING == 3
static_assert(WEIGHS, "scores of centroids become weights");
#elif SUMMARY_CODES
using PageQuery = CodedQuery;
using PageRows = CodedRows;
#else
using PageQuery = ScoreQuery;
using PageRows = ScoreRows;
#endif

// CTAs of an SM: a warp has two halves of 16 summaries on their way, so that 16 warps' are more than an SM can read.
constexpr int SELECT_CTAS = GROUP_SIZE * HEAD_DIM <= 1024 && HEAD_DIM <= 128 && WARPS <= 8 ? 2 : 1;
// Pages whose values a thread of the CTA that selects has on their way: L2 gives an SM some 64 bytes a cycle, 700
// cycles after they were asked for.
constexpr int PAGES_TOGETHER = PAGE_VALUES <= 4 ? 16 : 64 / PAGE_VALUES;

// Words of a row's keys and bits, in whole 16 bytes.
__host__ __device__ constexpr int select_words(int pages) { return (pages + (pages + 31) / 32 * 2 + 3) / 4 * 4; }

struct SelectMemory {
  TopPages top;
  ChunkSums chunk;
  int last;  // whether this CTA selects
  // Behind it, of a chunk that is scored: logits [chunk_pages, PAGE_VALUES] (WEIGHS); of a list that is selected: keys
  // [score_stride], two bits of each page, factors [blocks, PAGE_VALUES].
  __device__ __forceinline__ float* logits() { return reinterpret_cast<float*>(this + 1); }
  __device__ __forceinline__ unsigned* keys() { return reinterpret_cast<unsigned*>(this + 1); }
};

// One (row, KV head).
struct Selection {
  const SelectArguments& given;
  int list, row, head, row_pages, budget;

  __device__ __forceinline__ Selection(const SelectArguments& arguments, int row_, int head_, int row_len)
      : given(arguments), list(row_ * arguments.num_kv_heads + head_), row(row_), head(head_) {
    row_pages = divide(row_len + PAGE_SIZE - 1, PAGE_SIZE);
    const int asked = given.budgets ? read_early(given.budgets + list)
                                    : max(given.least_pages, static_cast<int>(
                                          (static_cast<long long>(row_pages) * given.parts + 65535) >> 16));
    const int pinned = given.sink_pages + given.recent_pages;
    budget = min(min(max(asked, pinned), row_pages), given.max_selected);
  }
  // What is kept of the list's pages.
  __device__ __forceinline__ float* values(int page) const {
    return given.scores + (static_cast<long long>(list) * given.score_stride + page) * PAGE_VALUES;
  }
  __device__ __forceinline__ int* pages() const {
    return given.pages + static_cast<long long>(list) * given.max_selected;
  }
  // Where the sums of the chunks' weights are, of as many chunks as the longest row has.
  __device__ __forceinline__ float2* sums() const {
    return given.sums + static_cast<long long>(list) * divide(gridDim.x, given.num_kv_heads) * GROUP_SIZE;
  }

#if SCORING != 3
  // Scores the pages [begin, end), a chunk of the list. low, high: ids of this lane's pages of its warp's first step.
  __device__ __forceinline__ void score(const PageTable& table, int chunk, int begin, int end, int low, int high,
                                        SelectMemory& memory) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    constexpr int STEP = BLOCK_PAGES;
    PageQuery query;
    query.load(given.q + static_cast<long long>(list) * GROUP_SIZE * HEAD_DIM, lane);
    float largest[SCORE_BLOCKS][2];  // of heads 2 (lane % 4) and the next
    #pragma unroll
    for (int b = 0; b < SCORE_BLOCKS; ++b) largest[b][0] = largest[b][1] = LEAST_SCORE;
    const auto id_of = [&](int page) { return table.cut(table.template stored<false>(row, min(page, end - 1))); };
    int first = begin + warp * SCORED_PAGES;
    if (first < end) {
      PageRows rows;
      rows.template load<0>(given, head, low, high, lane);
      rows.template load<1>(given, head, low, high, lane);
      // Ids are looked up two steps ahead, summaries one: each half is read anew as soon as it has been used.
      low = id_of(first + STEP + lane / 4), high = id_of(first + STEP + lane / 4 + 8);
      #pragma unroll 1
      for (; first < end; first += STEP) {
        const bool more = first + STEP < end;
        const int next_low = low, next_high = high;
        if (more) {
          PageRows::ask(given, head, next_low, next_high, lane);
          low = id_of(first + 2 * STEP + lane / 4), high = id_of(first + 2 * STEP + lane / 4 + 8);
        }
        float sums[SCORE_BLOCKS][4], others[SCORE_BLOCKS][4];
        rows.template multiply<0>(sums, query);
        if (more) rows.template load<0>(given, head, next_low, next_high, lane);
        rows.template multiply<1>(others, query);
        if (more) rows.template load<1>(given, head, next_low, next_high, lane);
        #pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int page = first + lane / 4 + j * 8;
          float of_page = LEAST_SCORE;
          #pragma unroll
          for (int b = 0; b < SCORE_BLOCKS; ++b) {
            float logits[2];
            const int column = b * 8 + lane % 4 * 2;
            #pragma unroll
            for (int i = 0; i < 2; ++i) {
              logits[i] = logit_of(sums[b][j * 2 + i], others[b][j * 2 + i], query.unit(b, i, given.scale));
              if (column + i < GROUP_SIZE) of_page = fmaxf(of_page, logits[i]);
              if (page < end) largest[b][i] = fmaxf(largest[b][i], logits[i]);
            }
            if constexpr (WEIGHS) keep(memory.logits() + (page - begin) * PAGE_VALUES, column, logits, page < end);
          }
          if constexpr (!WEIGHS) {
            of_page = fmaxf(of_page, __shfl_xor_sync(0xffffffffu, of_page, 1));
            of_page = fmaxf(of_page, __shfl_xor_sync(0xffffffffu, of_page, 2));
            if (lane % 4 == 0 && page < end) *values(page) = of_page;
          }
        }
      }
    }
    if constexpr (WEIGHS) {
      #pragma unroll
      for (int b = 0; b < SCORE_BLOCKS; ++b)
        #pragma unroll
        for (int i = 0; i < 2; ++i) {
          #pragma unroll
          for (int hop = 4; hop < 32; hop <<= 1)
            largest[b][i] = fmaxf(largest[b][i], __shfl_xor_sync(0xffffffffu, largest[b][i], hop));
          const int column = b * 8 + lane % 4 * 2 + i;
          if (lane < 4 && column < PAGE_VALUES) memory.chunk.largest[warp][column] = largest[b][i];
        }
      const long long most = MOST_KEPT_BYTES / (4 * PAGE_VALUES);
      const bool kept = static_cast<long long>(given.batch_size * given.num_kv_heads) * given.score_stride <= most;
      leave_weights(memory.logits(), end - begin, memory.chunk, values(begin), sums() + chunk * GROUP_SIZE, kept);
    }
  }
#else
  // Scores the pages [begin, end), a chunk of the list. id: of page lane % CENTROID_PAGES of this warp's first step.
  __device__ __forceinline__ void score(const PageTable& table, int chunk, int begin, int end, int id, int,
                                        SelectMemory& memory) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    constexpr int STEP = WARPS * CENTROID_PAGES;
    CentroidQuery query;
    query.load(given.q + static_cast<long long>(list) * GROUP_SIZE * HEAD_DIM, lane);
    float largest[SCORE_BLOCKS];
    #pragma unroll
    for (int b = 0; b < SCORE_BLOCKS; ++b) largest[b] = LEAST_SCORE;
    const auto id_of = [&](int page) {
      return table.cut(table.template stored<false>(row, min(page + lane % CENTROID_PAGES, end - 1)));
    };
    const auto load = [&](CentroidRows& rows, int ids, int pair) {
      const int low = __shfl_sync(0xffffffffu, ids, 2 * pair), high = __shfl_sync(0xffffffffu, ids, 2 * pair + 1);
      rows.load(given, head, low, high, lane);
    };
    int first = begin + warp * CENTROID_PAGES;
    if (first < end) {
      CentroidRows rows[CENTROID_PAIRS];
      #pragma unroll
      for (int pair = 0; pair < CENTROID_PAIRS; ++pair) load(rows[pair], id, pair);
      id = id_of(first + STEP);  // ids are looked up two steps ahead, centroids one
      #pragma unroll 1
      for (; first < end; first += STEP) {
        const bool more = first + STEP < end;
        const int next = id;
        if (more) id = id_of(first + 2 * STEP);
        #pragma unroll
        for (int pair = 0; pair < CENTROID_PAIRS; ++pair) {
          float logits[SCORE_BLOCKS][4];
          rows[pair].multiply(logits, query, given.scale);
          if (more) load(rows[pair], next, pair);
          const int page = first + 2 * pair + CentroidRows::place_page(lane);
          #pragma unroll
          for (int b = 0; b < SCORE_BLOCKS; ++b) {
            const int column = b * 8 + lane % 4 * 2 + CentroidRows::place_column(lane);
            const float logit = CentroidRows::over_centroids(logits[b], lane);
            if (page < end) largest[b] = fmaxf(largest[b], logit);
            if (page < end && lane < 16 && column < PAGE_VALUES)
              memory.logits()[(page - begin) * PAGE_VALUES + column] = logit;
          }
        }
      }
    }
    #pragma unroll
    for (int b = 0; b < SCORE_BLOCKS; ++b) {
      largest[b] = fmaxf(largest[b], __shfl_xor_sync(0xffffffffu, largest[b], 4));  // over both pages
      const int column = b * 8 + lane % 4 * 2 + CentroidRows::place_column(lane);
      if (lane < 16 && CentroidRows::place_page(lane) == 0 && column < PAGE_VALUES)
        memory.chunk.largest[warp][column] = largest[b];
    }
    const long long most = MOST_KEPT_BYTES / (4 * PAGE_VALUES);
    const bool kept = static_cast<long long>(given.batch_size * given.num_kv_heads) * given.score_stride <= most;
    leave_weights(memory.logits(), end - begin, memory.chunk, values(begin), sums() + chunk * GROUP_SIZE, kept);
  }
#endif

  // Selects by all pages' values, which `chunks` CTAs have left.
  __device__ __forceinline__ void select(SelectMemory& memory, int chunks) const {
    unsigned* keys = memory.keys();
    unsigned* bits = keys + given.score_stride;
    float* factors = reinterpret_cast<float*>(keys + select_words(given.score_stride));
    float2 first_sums;
    if constexpr (WEIGHS) {
      first_sums = read_sums(sums(), chunks, threadIdx.x % 32, threadIdx.x / 32);
      __syncwarp();  // so that the compiler leaves them before the pages' values, behind which they would wait
    }
    float x[PAGES_TOGETHER][PAGE_VALUES] = {};
    const float* from = values(threadIdx.x);
    #pragma unroll
    for (int j = 0; j < PAGES_TOGETHER; ++j)
      if (static_cast<int>(threadIdx.x) + j * SELECT_THREADS < row_pages)
        read_values(x[j], from + j * SELECT_THREADS * PAGE_VALUES);
    memory.top.clear();
    if constexpr (WEIGHS) {
      find_factors(sums(), chunks, divide(given.chunk_pages, BLOCK_PAGES),
                   divide(row_pages + BLOCK_PAGES - 1, BLOCK_PAGES), first_sums, factors);
      __syncthreads();
    }
    constexpr int BLOCKS_APART = SELECT_THREADS / BLOCK_PAGES;  // of a thread's pages
    static_assert(SELECT_THREADS % BLOCK_PAGES == 0, "they are at one place of their blocks");
    const float* of_block = factors + threadIdx.x / BLOCK_PAGES * PAGE_VALUES;
    unsigned largest = 0;  // of the keys that are not pinned
    const int lane = threadIdx.x % 32;
    #pragma unroll 1
    for (int i = threadIdx.x; i - lane < row_pages; i += PAGES_TOGETHER * SELECT_THREADS) {
      from += PAGES_TOGETHER * SELECT_THREADS * PAGE_VALUES;
      #pragma unroll
      for (int j = 0; j < PAGES_TOGETHER; ++j) {  // without branches, so that a page need not wait for the one before
        const int page = i + j * SELECT_THREADS;
        float score = x[j][0];
        if constexpr (WEIGHS)
          score = weight_of(x[j], page < row_pages ? of_block + j * BLOCKS_APART * PAGE_VALUES : factors);
        if (page + PAGES_TOGETHER * SELECT_THREADS < row_pages)
          read_values(x[j], from + j * SELECT_THREADS * PAGE_VALUES);
        const bool pinned = page < given.sink_pages || page >= row_pages - given.recent_pages;
        const unsigned key = key_of(score);
        if (page < row_pages) keys[page] = pinned ? PINNED : key;
        largest = max(largest, pinned || page >= row_pages ? 0 : key);
        if (j == PAGES_TOGETHER / 2) __syncwarp();  // so that the compiler asks for half of the next ones here
      }
      of_block += PAGES_TOGETHER * BLOCKS_APART * PAGE_VALUES;
    }
    const int pinned = min(row_pages, given.sink_pages + given.recent_pages);
    memory.top.list(keys, bits, row_pages, pinned, largest, budget, pages());
  }

 private:
  // Keeps the logits of two heads of a page, as far as there is room for such heads.
  __device__ __forceinline__ static void keep(float* of_page, int column, const float (&logits)[2], bool there) {
    if (!there || column >= PAGE_VALUES) return;
    if constexpr (PAGE_VALUES == 1) of_page[0] = logits[0];
    else *reinterpret_cast<float2*>(of_page + column) = make_float2(logits[0], logits[1]);
  }
};

}  // namespace pkv

extern "C" __global__ void __launch_bounds__(pkv::SELECT_THREADS, pkv::SELECT_CTAS)
pkv_select_pages(const pkv::SelectArguments given) {
  using namespace pkv;
  extern __shared__ __align__(16) unsigned char memory[];
  SelectMemory& shared = *reinterpret_cast<SelectMemory*>(memory);
  let_next_kernel_start();
  const Lengths lens{given.lengths, given.batch_size, given.max_tokens, 0 PKV_LAST_PAGE(, given.row_begins)};
  const PageTable table{given.page_ids, given.table_stride, given.num_pages
                        PKV_CSR(, given.row_begins, given.batch_size)};
  const int chunk = divide(blockIdx.x, given.num_kv_heads), head = blockIdx.x - chunk * given.num_kv_heads;
  const int begin = chunk * given.chunk_pages;
  wait_for_previous_kernel();
  // The first ids are looked up beside the row's length, which may be short of them: then they are ids of any pages.
  int low = 0, high = 0;
  if (SCORING != GIVEN && given.max_tokens > 0) {
#if SCORING == 3
    const int first = begin + threadIdx.x / 32 * CENTROID_PAGES + threadIdx.x % CENTROID_PAGES;
    low = table.cut(table.stored<false>(blockIdx.y, min(first, given.score_stride - 1)));
#else
    const int first = begin + threadIdx.x / 32 * SCORED_PAGES + threadIdx.x % 32 / 4;
    low = table.cut(table.stored<false>(blockIdx.y, min(first, given.score_stride - 1)));
    high = table.cut(table.stored<false>(blockIdx.y, min(first + 8, given.score_stride - 1)));
#endif
  }
  const Selection selection(given, blockIdx.y, head, lens[blockIdx.y]);
  if (chunk == 0 && threadIdx.x == 0) given.counts[selection.list] = selection.budget;
  if (selection.budget >= selection.row_pages || selection.budget <= 0) {  // nothing is left out
    const int end = min(begin + given.chunk_pages, selection.budget);
    for (int i = begin + threadIdx.x; i < end; i += SELECT_THREADS) selection.pages()[i] = i;
    return;
  }
  if (begin >= selection.row_pages) return;
  int chunks = 1;
  if constexpr (SCORING != GIVEN) {
    const int end = min(begin + given.chunk_pages, selection.row_pages);
    selection.score(table, chunk, begin, end, low, high, shared);
    chunks = divide(selection.row_pages + given.chunk_pages - 1, given.chunk_pages);
    // What the CTA has written is seen by whoever takes the last ticket.
    __syncthreads();
    if (chunks > 1) {
      if (threadIdx.x == 0) {
        shared.last = take_ticket(given.tickets + selection.list) == chunks - 1;
        if (shared.last) given.tickets[selection.list] = 0;
      }
      __syncthreads();
      if (!shared.last) return;
    }
  }
  selection.select(shared, chunks);
}
