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
#include "table.cuh"
#include "warp_plan.cuh"

// Programmatic dependent launch: the next kernel may be set up, and what the previous one wrote is waited for (mma.cuh).
#if __CUDA_ARCH__ >= 900
#define PKV_LET_NEXT_START asm volatile("griddepcontrol.launch_dependents;")
#define PKV_WAIT_FOR_PREVIOUS asm volatile("griddepcontrol.wait;" ::: "memory")
#else
#define PKV_LET_NEXT_START
#define PKV_WAIT_FOR_PREVIOUS
#endif

namespace pkv {

constexpr int WORKERS = WARPS * 32;
constexpr int SHARE = 4;  // threads that count for one row together
constexpr int NOBODY = 0x7fffffff;
constexpr int GUESSED = TABLE_INT64 ? 2 : 4;  // ids of a row that a thread looks at before it knows which to compare with
constexpr int MOST_PASSES = 32;  // rows of a thread: whether they are still candidates is a bit each
constexpr unsigned EVERYBODY = 0xffffffffu;

// A row's link to an earlier one, -1 if there is none, and the first row of its tree; in one word, which is not 0. A word
// of 0 reads as no link.
struct Link {
  int to, pages, tree;

  __device__ __forceinline__ unsigned long long word() const {
    return 1ull << 63 | static_cast<unsigned long long>(tree) << 47 | static_cast<unsigned long long>(to + 1) << 32
           | static_cast<unsigned>(pages);
  }
  __device__ __forceinline__ static Link of(unsigned long long word) {
    return {static_cast<int>(word >> 32 & 0x7fff) - 1, static_cast<int>(word), static_cast<int>(word >> 47 & 0x7fff)};
  }
};

__device__ __forceinline__ unsigned long long read_word(const unsigned long long* from) {
  return static_cast<unsigned long long>(read_early(reinterpret_cast<const long long*>(from)));
}

// Whole warps call these, with at < 0 of a lane that has nothing to say. Lanes mostly speak of one place, and are one then.
__device__ __forceinline__ int one_place(int at) {
  const int most = __reduce_max_sync(EVERYBODY, at);
  return __all_sync(EVERYBODY, at < 0 || at == most) ? most : -1;
}
__device__ __forceinline__ void add_to(int* array, int at) {
  const int place = one_place(at), count = __popc(__ballot_sync(EVERYBODY, at >= 0));
  if (place < 0) at < 0 ? 0 : atomicAdd(&array[at], 1);
  else if (threadIdx.x % 32 == 0) atomicAdd(&array[place], count);
}
__device__ __forceinline__ void lower(int* array, int at, int value) {
  const int place = one_place(at), least = __reduce_min_sync(EVERYBODY, at < 0 ? NOBODY : value);
  if (place < 0) at < 0 ? 0 : atomicMin(&array[at], value);
  else if (threadIdx.x % 32 == 0) atomicMin(&array[place], least);
}
__device__ __forceinline__ void raise(int* array, int at, int value) {
  const int place = one_place(at), most = __reduce_max_sync(EVERYBODY, at < 0 ? 0 : value);
  if (place < 0) at < 0 ? 0 : atomicMax(&array[at], value);
  else if (threadIdx.x % 32 == 0) atomicMax(&array[place], most);
}

// What the grouping CTA works with; the last arrays are of trees or components and lie at their first rows.
struct PrefixMemory {
  unsigned long long* saved;  // by the best depth of a tree, in pages
  int *to, *pages, *tree;     // of the rows' links
  int* component;             // first row of the row's
  int *depth, *least, *left, *first_left;  // of a tree: depth taken, least link, rows in no group, the first of them
  int *size, *common;                      // of a component: rows, and pages that they have in common
  int *leader, *number;                    // first row of the row's group or NOBODY; links as long as the row's
  enum { INTS = 14 };
  // What group_rows finds, where it has no use any more for what lay there: of a row its group, of a group its pages.
  __device__ __forceinline__ int* group() const { return number; }
  __device__ __forceinline__ int* prefix() const { return left; }

  __device__ __forceinline__ PrefixMemory(unsigned char* memory, int rows)
      : saved(reinterpret_cast<unsigned long long*>(memory)), to(reinterpret_cast<int*>(saved + rows)),
        pages(to + rows), tree(pages + rows), component(tree + rows), depth(component + rows), least(depth + rows),
        left(least + rows), first_left(left + rows), size(first_left + rows), common(size + rows),
        leader(common + rows), number(leader + rows) {}
  __device__ __forceinline__ void take(int row, const Link& link) const {
    to[row] = link.to, pages[row] = link.pages, tree[row] = link.tree;
  }
  __device__ __forceinline__ bool has(int row, const Link& link) const {
    return to[row] == link.to && pages[row] == link.pages && tree[row] == link.tree;
  }
  PKV_HD static int bytes(int rows) { return rows * INTS * static_cast<int>(sizeof(int)); }
};

struct SharingRule {
  int tokens_per_member, least_tokens;

  __device__ __forceinline__ bool pays(int members, long long prefix_pages) const {
    return members >= 2 && saved(members, prefix_pages) > static_cast<long long>(tokens_per_member) * members;
  }
  __device__ __forceinline__ bool worth(unsigned long long saved_tokens) const {
    return static_cast<long long>(saved_tokens) > least_tokens;
  }
  __device__ __forceinline__ static long long saved(int members, long long prefix_pages) {
    return (members - 1) * prefix_pages * PAGE_SIZE;
  }
};

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

// Finds the depth of each tree whose links are of different lengths: pages that the depth of each row's link saves its
// tree are those of the links that are as long.
__device__ __forceinline__ void find_depths(const PrefixMemory& m, int batch_size) {
  const int thread = threadIdx.x;
  #pragma unroll 1
  for (int row = thread; row < batch_size; row += WORKERS) m.depth[row] = 0;
  #pragma unroll 1
  for (int base = 0; base < batch_size; base += WORKERS / SHARE) {
    const int row = base + thread / SHARE, pages = row < batch_size ? m.pages[row] : 0;
    const int tree = pages > 0 ? m.tree[row] : NOBODY;
    int count = 0;
    #pragma unroll 8
    for (int other = thread % SHARE; other < batch_size; other += SHARE)
      count += (m.tree[other] == tree) & (m.pages[other] >= pages);
    for (int hop = 1; hop < SHARE; hop <<= 1) count += __shfl_xor_sync(EVERYBODY, count, hop);
    if (pages > 0 && thread % SHARE == 0) {
      m.number[row] = count;
      atomicMax(&m.saved[tree], static_cast<unsigned long long>(count) * static_cast<unsigned>(pages));
    }
  }
  __syncthreads();
  #pragma unroll 1
  for (int row = thread; row < batch_size; row += WORKERS) {
    const int pages = m.pages[row], tree = m.tree[row];
    if (pages > 0 && static_cast<unsigned long long>(m.number[row]) * static_cast<unsigned>(pages) == m.saved[tree])
      atomicMax(&m.depth[tree], pages);
  }
  __syncthreads();
}

// Makes groups of the links that were taken. Whole warps go through the rows.
__device__ __forceinline__ void group_rows(const PrefixMemory& m, const SharingRule& rule, int batch_size) {
  const int thread = threadIdx.x, lane = thread % 32, end = (batch_size + 31) / 32 * 32;
  #pragma unroll 1
  for (int row = thread; row < batch_size; row += WORKERS) {
    m.saved[row] = 0, m.left[row] = 0, m.size[row] = 0, m.number[row] = 0;
    m.least[row] = m.first_left[row] = m.common[row] = NOBODY;
  }
  __syncthreads();
  #pragma unroll 1
  for (int row = thread; row < end; row += WORKERS) {
    const int pages = row < batch_size ? m.pages[row] : 0, tree = pages > 0 ? m.tree[row] : -1;
    lower(m.least, tree, pages), raise(m.number, tree, pages);
  }
  __syncthreads();
  bool differ = false;
  #pragma unroll 1
  for (int row = thread; row < batch_size; row += WORKERS) {
    const int least = m.least[row] == NOBODY ? 0 : m.least[row];
    m.depth[row] = least, differ |= m.number[row] != least;
  }
  if (__syncthreads_or(differ)) find_depths(m, batch_size);
  // A component's rows hang together by links of that depth, each to an earlier row: the first has none.
  #pragma unroll 1
  for (int row = thread; row < batch_size; row += WORKERS)
    m.component[row] = m.pages[row] > 0 && m.pages[row] >= m.depth[m.tree[row]] ? m.to[row] : row;
  #pragma unroll 1
  for (bool more = true; __syncthreads_or(more);) {
    #pragma unroll 1
    for (int row = thread; row < batch_size; row += WORKERS) m.leader[row] = m.component[m.component[row]];
    __syncthreads();
    more = false;
    #pragma unroll 1
    for (int row = thread; row < batch_size; row += WORKERS) {
      more |= m.component[row] != m.leader[row];
      m.component[row] = m.leader[row];
    }
  }
  #pragma unroll 1
  for (int row = thread; row < end; row += WORKERS) {
    const int component = row < batch_size ? m.component[row] : -1;
    add_to(m.size, component);
    lower(m.common, component == row ? -1 : component, component < 0 ? 0 : m.pages[row]);
  }
  __syncthreads();
  #pragma unroll 1
  for (int row = thread; row < end; row += WORKERS) {
    bool left = false;
    if (row < batch_size) {
      const int component = m.component[row], size = m.size[component];
      m.leader[row] = size >= 2 && rule.pays(size, m.common[component]) ? component : NOBODY;
      left = m.leader[row] == NOBODY;
    }
    const int tree = left ? m.tree[row] : -1;
    add_to(m.left, tree), lower(m.first_left, tree, row);
  }
  unsigned long long& all_saved = m.saved[0];
  if (thread == 0) all_saved = 0;
  __syncthreads();
  unsigned long long saved = 0;
  #pragma unroll 1
  for (int row = thread; row < batch_size; row += WORKERS) {
    const int tree = m.tree[row];
    int members = m.size[row];
    if (m.leader[row] == NOBODY && m.left[tree] >= 2 && rule.pays(m.left[tree], m.least[tree])) {
      m.leader[row] = m.first_left[tree];
      if (m.leader[row] == row) m.common[row] = m.least[tree], members = m.left[tree];
    }
    if (m.leader[row] == row) saved += rule.saved(members, m.common[row]);
  }
  if (saved > 0) atomicAdd(&all_saved, saved);
  // Groups are numbered by their leaders: of 32 rows each `leaders` has a bit, and `before` the groups before them.
  int *leaders = m.depth, *before = m.component, &groups = m.size[0];
  __syncthreads();
  #pragma unroll 1
  for (int row = thread; row < end; row += WORKERS) {
    const unsigned leads = __ballot_sync(EVERYBODY, row < batch_size && m.leader[row] == row);
    if (lane == 0) leaders[row / 32] = static_cast<int>(leads);
  }
  __syncthreads();
  if (thread < 32) {
    int count = 0;
    #pragma unroll 1
    for (int base = 0; base < end / 32; base += 32) {
      const int own = base + lane < end / 32 ? __popc(static_cast<unsigned>(leaders[base + lane])) : 0;
      const int through = scan(own, lane);
      if (base + lane < end / 32) before[base + lane] = count + through - own;
      count += __shfl_sync(EVERYBODY, through, 31);
    }
    if (lane == 0) groups = count;
  }
  __syncthreads();
  const int num_groups = rule.worth(all_saved) ? groups : 0;
  #pragma unroll 1
  for (int row = thread; row < batch_size; row += WORKERS) {
    const int leader = m.leader[row];
    int group = -1;
    if (num_groups > 0 && leader != NOBODY) {
      const unsigned earlier = static_cast<unsigned>(leaders[leader / 32]) & ((1u << leader % 32) - 1);
      group = before[leader / 32] + __popc(earlier);
      if (leader == row) m.prefix()[group] = m.common[row];
    }
    m.group()[row] = group;
  }
  #pragma unroll 1
  for (int group = num_groups + thread; group < max(1, batch_size / 2); group += WORKERS) m.prefix()[group] = 0;
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
