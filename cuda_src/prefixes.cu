// pkv_find_prefixes: which rows of a step have their leading pages in common, by comparing every page id.
//
// pkvsim.schedule.prefixes states the rule; what this kernel writes equals it. In short: of each tree of rows with one
// first id, the depth that saves the most pages; the rows that agree down to it are groups where that pays.
//
// Grid: [batch_size], block: [WARPS * 32]; dynamic shared memory: pkv::PrefixMemory::bytes(batch_size). CTA i finds,
// for row i + 1, the longest prefix that it has in common with any row before it; the last CTA makes groups of what the
// others find. These links make a forest: two rows have in common what the least link between them has.
//
// The links of the launch before are kept, and mostly they are found again. They are read before the previous kernel
// has ended, as guesses that do no harm: a row is compared first with the row that it was linked to, and looked for in
// others where that link ended; the last CTA makes groups of them while the others search. If all links turn out to be
// the same its groups are right; if not it has at least fetched the code that makes them from L2.
//
//   page_ids, row_begins, lengths  as the decode kernels take them (table.cuh, plan.cuh)
//   query_tokens           of each row; pages count that all of them see whole
//   tokens_per_member, least_tokens  SharingRule
//   group_of_row  [batch_size] int32, out: -1 for rows in no group
//   prefix_pages  [max(1, batch_size / 2)] int32, out: 0 past the last group
//   workspace     [2][batch_size] 64-bit words (Link), all 0 before the first launch: links on their way, which are 0
//                 between launches, and links that are kept
//
// Bound by latency: all that is likely looked at is asked for at once; a link on its way to the last CTA; and where
// links have changed the grouping, which takes batch_size^2 steps of comparing counts over its threads where a tree's
// links are of different lengths. It is code that runs once or twice, so its loops are not unrolled.
#include "prefix_groups.cuh"
#include "table.cuh"

// Programmatic dependent launch: the next kernel may be set up, and what the previous one wrote is waited for (mma.cuh).
#if __CUDA_ARCH__ >= 900
#define PKV_LET_NEXT_START asm volatile("griddepcontrol.launch_dependents;")
#define PKV_WAIT_FOR_PREVIOUS asm volatile("griddepcontrol.wait;" ::: "memory")
#else
#define PKV_LET_NEXT_START
#define PKV_WAIT_FOR_PREVIOUS
#endif

namespace pkv {

constexpr int GUESSED = TABLE_INT64 ? 2 : 4;  // ids of a row that a thread looks at before it knows which to compare with
constexpr int MOST_PASSES = 32;  // rows of a thread: whether they are still candidates is a bit each

// The rows of a step as strings of page ids.
struct PrefixRows {
  PageTable table;
  Lengths lens;
  int query_tokens;

  // A row's length as it is in memory, for which nothing waits before it is used (Lengths), and the pages that it makes.
  __device__ __forceinline__ int stored(int row) const { return lens.stored(row); }
  __device__ __forceinline__ int pages(int stored) const {
    const int tokens = lens.cut(stored) - (query_tokens - 1);
    return tokens > 0 ? tokens / PAGE_SIZE : 0;
  }
  // Columns that every row has in memory, of which not all need be its own.
  __device__ __forceinline__ int columns() const {
    return TABLE_CSR ? table.stride : min(table.stride, lens.most / PAGE_SIZE);
  }
  __device__ __forceinline__ page_id id(int row, int column) const { return table.stored<false>(row, column); }
  // The same, asked for where it is written: a compiler asks for an id() where it is first needed.
  __device__ __forceinline__ page_id id_here(int row, int column) const { return table.stored<true>(row, column); }
};

// The least that any thread says becomes the CTA's: columns at which two rows differ, rows.
__device__ __forceinline__ void tell_least(int* all, int own) {
  const int least = __reduce_min_sync(EVERYBODY, own);
  if (threadIdx.x % 32 == 0 && least < NOBODY) atomicMin(all, least);
}

// What a row's CTA shares: each the least that a thread has told, NOBODY before. Two that take turns are of a round each.
struct LinkSearch {
  int tree, guess_differs, onward;
  int differs[2], next[2];
};

// Finds row `own`'s link, given any other as a guess; search: begun. `own` > 0.
__device__ __forceinline__ Link find_link(const PrefixRows& rows, int own, const Link& guess, LinkSearch& search) {
  const int thread = threadIdx.x, columns = rows.columns();
  if (columns <= 0) return {-1, 0, own};
  const int partner = guess.to >= 0 && guess.to < own ? guess.to : 0;
  const int hint = guess.pages > 0 && guess.pages < columns ? guess.pages : 0;  // column where others may go on
  // All that may be looked at is asked for at once, whatever the lengths.
  page_id ids[2][GUESSED];
  #pragma unroll
  for (int i = 0; i < GUESSED; ++i) {
    const int column = thread + i * WORKERS;
    ids[0][i] = ids[1][i] = 0;
    if (column < columns) ids[0][i] = rows.id(own, column), ids[1][i] = rows.id(partner, column);
  }
  const page_id first_id = rows.id_here(own, 0), hint_id = rows.id_here(own, hint);
  const int own_length = rows.stored(own), partner_length = rows.stored(partner);
  // The rows that begin with the same id; only they have anything in common with this one.
  unsigned candidates = 0;  // bit j: row thread + j * WORKERS
  int earliest = NOBODY, onward = NOBODY;
  #pragma unroll 1
  for (int j = 0, row = thread; row < own; ++j, row += WORKERS) {
    const int length = rows.stored(row);
    const page_id id = rows.id_here(row, 0), id_there = rows.id_here(row, hint);
    const int pages = rows.pages(length);
    if (!((id == first_id) & (min(pages, rows.pages(own_length)) > 0))) continue;
    candidates |= 1u << j, earliest = min(earliest, row);
    if ((id_there == hint_id) & (hint < pages) & (row != partner)) onward = min(onward, row);
  }
  int apart = NOBODY;
  #pragma unroll
  for (int i = GUESSED - 1; i >= 0; --i)
    if (ids[0][i] != ids[1][i]) apart = thread + i * WORKERS;
  const int own_pages = rows.pages(own_length), partner_pages = rows.pages(partner_length);
  tell_least(&search.tree, earliest), tell_least(&search.onward, onward), tell_least(&search.guess_differs, apart);
  __syncthreads();
  const int tree = min(search.tree, own);
  int link = -1, linked = 0;  // the best row so far, and what it has in common with this one
  int row = partner, common = min(min(partner_pages, own_pages), search.guess_differs);
  int at = min(WORKERS * GUESSED, columns);  // looked at up to there
  #pragma unroll 1
  for (int round = 0;; ++round) {
    if (at < common) {
      int differs = NOBODY;
      #pragma unroll 4
      for (int column = at + thread; column < common; column += WORKERS)
        if (rows.id(row, column) != rows.id(own, column)) differs = min(differs, column);
      tell_least(&search.differs[round % 2], differs);
      __syncthreads();
      common = min(common, search.differs[round % 2]);
    }
    if (common > linked) linked = common, link = row;
    if (row % WORKERS == thread) candidates &= ~(1u << row / WORKERS);
    if (linked >= own_pages) break;
    // Only a row that agrees where the best one first differs can go on further; whether it does is for the comparison.
    if (round == 0 && linked == hint) {
      row = search.onward;
    } else {
      const page_id further = rows.id(own, linked);
      int next = NOBODY;
      #pragma unroll 1
      for (int j = 0; j < MOST_PASSES && candidates >> j; ++j) {
        if (!(candidates >> j & 1)) continue;
        const int other = thread + j * WORKERS, length = rows.stored(other);
        // The id is asked for with the length; where the row has ended, what lies there does not count.
        const page_id there = rows.id_here(other, linked);
        if ((there == further) & (linked < rows.pages(length))) next = min(next, other);
        else candidates &= ~(1u << j);
      }
      tell_least(&search.next[round % 2], next);
      __syncthreads();
      row = search.next[round % 2];
    }
    if (row == NOBODY) break;
    common = min(rows.pages(rows.stored(row)), own_pages), at = 0;
    // What the round after the next tells; of all that this round told, all have been told.
    if (thread == 0 && round > 0) search.differs[(round + 1) % 2] = search.next[(round + 1) % 2] = NOBODY;
    __syncthreads();
  }
  return {link, linked, tree};
}

// Takes the links that are kept, which the launch before may be writing: each is one that its row once had.
__device__ __forceinline__ void take_kept(const unsigned long long* kept, const PrefixMemory& m, int batch_size) {
  #pragma unroll 1
  for (int row = threadIdx.x; row < batch_size; row += WORKERS)
    m.take(row, Link::of(read_word(kept + row)));
}

// Takes the links of all rows as they come, and leaves their words empty. Returns whether this thread's are others than
// were taken before; these are then kept.
__device__ __forceinline__ bool take_links(unsigned long long* words, unsigned long long* kept, const PrefixMemory& m,
                                           int batch_size) {
  bool others = false;
  #pragma unroll 1
  for (int row = threadIdx.x; row < batch_size; row += WORKERS) {
    Link link{-1, 0, 0};
    if (row > 0) {
      unsigned long long word;
      do word = read_word(words + row); while (word == 0);
      words[row] = 0;
      link = Link::of(word);
    }
    if (m.has(row, link)) continue;
    others = true;
    m.take(row, link), kept[row] = link.word();
  }
  return others;
}

}  // namespace pkv

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
pkv_find_prefixes(const pkv::page_id* page_ids, const int* row_begins, const int* lengths, int table_stride,
                  int num_pages, int batch_size, int max_tokens, int query_tokens, int tokens_per_member,
                  int least_tokens, int* group_of_row, int* prefix_pages, unsigned long long* workspace) {
  using namespace pkv;
  extern __shared__ __align__(128) unsigned char memory[];
  unsigned long long* kept = workspace + batch_size;
  PKV_LET_NEXT_START;
  if (const int own = blockIdx.x + 1; own < batch_size) {
    LinkSearch& search = *reinterpret_cast<LinkSearch*>(memory);
    const PrefixRows rows{{page_ids, table_stride, num_pages PKV_CSR(, row_begins, batch_size)},
                          {lengths, batch_size, max_tokens, 0 PKV_LAST_PAGE(, row_begins)}, query_tokens};
    constexpr int WORDS = sizeof(LinkSearch) / sizeof(int);
    if (threadIdx.x < WORDS) reinterpret_cast<int*>(memory)[threadIdx.x] = NOBODY;
    const Link guess = Link::of(read_word(kept + own));
    __syncthreads();
    PKV_WAIT_FOR_PREVIOUS;
    const Link link = find_link(rows, own, guess, search);
    if (threadIdx.x == 0) *static_cast<volatile unsigned long long*>(workspace + own) = link.word();
    return;
  }
  const PrefixMemory m(memory, batch_size);
  const SharingRule rule{tokens_per_member, least_tokens};
  take_kept(kept, m, batch_size);
  #pragma unroll 1
  for (bool guessed = true;; guessed = false) {
    group_rows(m, rule, batch_size);
    if (!guessed) break;
    PKV_WAIT_FOR_PREVIOUS;
    if (!__syncthreads_or(take_links(workspace, kept, m, batch_size))) break;
  }
  __syncthreads();
  #pragma unroll 1
  for (int row = threadIdx.x; row < batch_size; row += WORKERS) group_of_row[row] = m.group()[row];
  #pragma unroll 1
  for (int group = threadIdx.x; group < max(1, batch_size / 2); group += WORKERS) prefix_pages[group] = m.prefix()[group];
}
