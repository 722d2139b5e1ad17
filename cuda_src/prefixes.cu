// pkv_find_prefixes: which rows of a step have their leading pages in common, by comparing every page id.
// Whatever is likely looked at is asked for at once, and links say themselves that they are there.
//
// pkvsim.schedule.prefixes states the rule; what this kernel writes equals it. In short: of each tree of rows with one
// first id, the depth that saves the most pages; the rows that agree down to it are groups where that pays.
//
// Grid: [batch_size], block: [WARPS * 32]; dynamic shared memory: pkv::PrefixMemory::bytes(batch_size). CTA i finds,
// for row i, the longest prefix that it has in common with any row before it; the last CTA waits for what the others
// find and makes groups of it. These links make a forest: two rows have in common what the least link between them has.
//
//   page_ids, row_begins, lengths  as the decode kernels take them (table.cuh, plan.cuh)
//   query_tokens           of each row; pages count that all of them see whole
//   tokens_per_member, least_tokens  SharingRule
//   group_of_row  [batch_size] int32, out: -1 for rows in no group
//   prefix_pages  [max(1, batch_size / 2)] int32, out: 0 past the last group
//   workspace     [batch_size] 64-bit words, which are 0 between launches: Link
//
// Bound by latency: lengths, first ids and the rows that are the likeliest to begin alike; a look at the others where
// the best one ends; a link on its way to the last CTA; and the grouping there, which takes batch_size^2 steps of
// comparing counts over its threads where a tree's links are of different lengths.
#include "table.cuh"
#include "warp_plan.cuh"

// Programmatic dependent launch: the next kernel may be set up, and what the previous one wrote is waited for (mma.cuh).
#if __CUDA_ARCH__ >= 900
#define PKV_OVERLAP \
  asm volatile("griddepcontrol.launch_dependents;"); \
  asm volatile("griddepcontrol.wait;" ::: "memory");
#else
#define PKV_OVERLAP
#endif

namespace pkv {

constexpr int WORKERS = WARPS * 32;
constexpr int SHARE = 4;  // threads that count for one row together
constexpr int NOBODY = 0x7fffffff;
constexpr int NUM_PROBES = 4;
constexpr int GUESSED = TABLE_INT64 ? 2 : 4;  // ids of a row that a thread looks at before it knows which to compare with
constexpr int MOST_PASSES = 32;  // rows of a thread: whether they are still candidates is a bit each
constexpr int MOST_ROWS = 1 << 14;
constexpr unsigned EVERYBODY = 0xffffffffu;

// Columns at which rows are looked at before they are compared: the first, then 1, 16, 128, 1024. What those say is
// only with which row the comparison begins.
__device__ __forceinline__ int probe(int i) { return i < 2 ? i : 1 << (3 * i - 2); }

// Orders candidates: by how many probes agree, then the first row. Links to first rows make short chains.
__device__ __forceinline__ int rank_of(int row, int score) { return score * MOST_ROWS + MOST_ROWS - 1 - row; }
__device__ __forceinline__ int ranked_row(int rank) { return MOST_ROWS - 1 - rank % MOST_ROWS; }

// A row's link to an earlier one, -1 if there is none, and the first row of its tree; in one word, which is 0 until the
// row's CTA has written it.
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

  __device__ __forceinline__ PrefixMemory(unsigned char* memory, int rows)
      : saved(reinterpret_cast<unsigned long long*>(memory)), to(reinterpret_cast<int*>(saved + rows)),
        pages(to + rows), tree(pages + rows), component(tree + rows), depth(component + rows), least(depth + rows),
        left(least + rows), first_left(left + rows), size(first_left + rows), common(size + rows),
        leader(common + rows), number(leader + rows) {}
  PKV_HD static int bytes(int rows) { return rows * INTS * static_cast<int>(sizeof(int)); }
};

struct SharingRule {
  int tokens_per_member, least_tokens;

  __device__ __forceinline__ bool pays(int members, long long prefix_pages) const {
    const long long saved = (members - 1) * prefix_pages * PAGE_SIZE;
    return members >= 2 && saved > static_cast<long long>(tokens_per_member) * members && saved > least_tokens;
  }
};

// The rows of a step as strings of page ids.
struct PrefixRows {
  PageTable table;
  Lengths lens;
  int query_tokens;

  __device__ __forceinline__ int pages(int row) const {
    const int tokens = lens[row] - (query_tokens - 1);
    return tokens > 0 ? tokens / PAGE_SIZE : 0;
  }
  // Columns that every row has in memory, of which not all need be its own.
  __device__ __forceinline__ int columns() const {
    return TABLE_CSR ? table.stride : min(table.stride, lens.most / PAGE_SIZE);
  }
  __device__ __forceinline__ page_id id(int row, int column) const { return table.stored<false>(row, column); }
  // The id in the i-th column that is probed, or whatever lies there.
  __device__ __forceinline__ page_id probed(int row, int i) const {
    return probe(i) < columns() ? id(row, probe(i)) : page_id(0);
  }
};

// The first column at which a thread has seen two rows differ becomes the warp's, and that the CTA's.
__device__ __forceinline__ void tell_first(int* first, int column) {
  const int least = __reduce_min_sync(EVERYBODY, column);
  if (threadIdx.x % 32 == 0 && least < NOBODY) atomicMin(first, least);
}

// Finds row `own`'s link. word: seven words of shared memory.
__device__ __forceinline__ Link find_link(const PrefixRows& rows, int own, int* word) {
  int *best = word, *differs = word + 2;  // two each, which take turns
  int &first = word[4], *guess_differs = word + 5;
  const int thread = threadIdx.x;
  if (own == 0) return {-1, 0, 0};
  // All that may be looked at is asked for at once, whatever the lengths: one wait instead of four. The rows to compare
  // with are likely the first one or the one before.
  const int guess[2] = {0, own - 1};
  page_id ids[3][GUESSED];
  #pragma unroll
  for (int i = 0; i < GUESSED; ++i) {
    const int column = thread + i * WORKERS;
    #pragma unroll
    for (int which = 0; which < 3; ++which)
      ids[which][i] = column < rows.columns() ? rows.id(which == 2 ? own : guess[which], column) : page_id(which);
  }
  const int own_pages = rows.pages(own), first_pages = rows.pages(0), before_pages = rows.pages(own - 1);
  page_id own_id[1 + NUM_PROBES];
  #pragma unroll
  for (int i = 0; i <= NUM_PROBES; ++i) own_id[i] = rows.probed(own, i);
  if (thread == 0) best[0] = best[1] = -1, first = own, differs[1] = guess_differs[0] = guess_differs[1] = NOBODY;
  // The rows that begin with the same id, and of these the first that agrees at the most probes.
  unsigned candidates = 0;  // bit j: row thread + j * WORKERS
  int best_rank = -1, earliest = NOBODY;
  for (int j = 0, row = thread; row < own; ++j, row += WORKERS) {
    page_id id[1 + NUM_PROBES];
    #pragma unroll
    for (int i = 0; i <= NUM_PROBES; ++i) id[i] = rows.probed(row, i);
    const int common = min(rows.pages(row), own_pages);
    int score = 0;
    #pragma unroll
    for (int i = 0; i <= NUM_PROBES; ++i) score += probe(i) < common && score == i && id[i] == own_id[i];
    if (score == 0) continue;
    candidates |= 1u << j;
    earliest = min(earliest, row);
    best_rank = max(best_rank, rank_of(row, score));
  }
  __syncthreads();
  best_rank = __reduce_max_sync(EVERYBODY, best_rank), earliest = __reduce_min_sync(EVERYBODY, earliest);
  if (thread % 32 == 0 && best_rank >= 0) atomicMax(&best[0], best_rank), atomicMin(&first, earliest);
  #pragma unroll
  for (int which = 0; which < 2; ++which) {
    int at = NOBODY;
    #pragma unroll
    for (int i = GUESSED - 1; i >= 0; --i)
      if (ids[which][i] != ids[2][i]) at = thread + i * WORKERS;
    tell_first(&guess_differs[which], at);
  }
  __syncthreads();
  const int tree = first;
  int link = -1, linked = 0;  // the best row so far, and what it has in common with this one
  for (int round = 0;; ++round) {
    const int found = best[round % 2];
    if (found < 0) break;
    const int row = ranked_row(found);
    const bool guessed = round == 0 && (row == guess[0] || row == guess[1]);
    int common, at = 0;  // looked at up to there
    if (guessed) {
      at = min(WORKERS * GUESSED, rows.columns());
      common = min(min(row == 0 ? first_pages : before_pages, own_pages), guess_differs[row == 0 ? 0 : 1]);
    } else {
      common = min(rows.pages(row), own_pages);
    }
    if (at < common) {
      if (!guessed && thread == 0) best[(round + 1) % 2] = -1;
      int apart = NOBODY;
      #pragma unroll 4
      for (int column = at + thread; column < common; column += WORKERS)
        if (rows.id(row, column) != rows.id(own, column)) apart = min(apart, column);
      tell_first(&differs[(round + 1) % 2], apart);
      __syncthreads();
      common = min(common, differs[(round + 1) % 2]);
    }
    if (thread == 0) differs[round % 2] = NOBODY;
    if (common > linked) linked = common, link = row;
    // Only a row that agrees where the best one first differs can go on further; whether it does is for the comparison.
    if (row % WORKERS == thread) candidates &= ~(1u << row / WORKERS);
    int next = -1;
    if (linked < own_pages) {
      const page_id further = rows.id(own, linked);
      for (int j = 0; j < MOST_PASSES && candidates >> j; ++j) {
        if (!(candidates >> j & 1)) continue;
        const int other = thread + j * WORKERS, pages = rows.pages(other);
        // The id is asked for with the length; where the row has ended, what lies there does not count.
        if ((rows.id(other, linked) == further) & (linked < pages)) next = max(next, rank_of(other, 0));
        else candidates &= ~(1u << j);
      }
    }
    next = __reduce_max_sync(EVERYBODY, next);
    if (thread % 32 == 0 && next >= 0) atomicMax(&best[(round + 1) % 2], next);
    __syncthreads();
  }
  return {link, linked, tree};
}

// Takes the links of all rows as they come, and leaves the words empty.
__device__ __forceinline__ void take_links(unsigned long long* words, const PrefixMemory& m, int batch_size) {
  for (int row = threadIdx.x; row < batch_size; row += WORKERS) {
    unsigned long long word;
    do word = static_cast<unsigned long long>(read_early(reinterpret_cast<const long long*>(words + row)));
    while (word == 0);
    words[row] = 0;
    const Link link = Link::of(word);
    m.to[row] = link.to, m.pages[row] = link.pages, m.tree[row] = link.tree;
    m.saved[row] = 0, m.left[row] = 0, m.size[row] = 0, m.number[row] = 0;
    m.least[row] = m.first_left[row] = m.common[row] = NOBODY;
  }
}

// Finds the depth of each tree whose links are of different lengths: pages that the depth of each row's link saves its
// tree are those of the links that are as long.
__device__ __forceinline__ void find_depths(const PrefixMemory& m, int batch_size) {
  const int thread = threadIdx.x;
  for (int row = thread; row < batch_size; row += WORKERS) m.depth[row] = 0;
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
  for (int row = thread; row < batch_size; row += WORKERS) {
    const int pages = m.pages[row], tree = m.tree[row];
    if (pages > 0 && static_cast<unsigned long long>(m.number[row]) * static_cast<unsigned>(pages) == m.saved[tree])
      atomicMax(&m.depth[tree], pages);
  }
  __syncthreads();
}

// Makes groups of all rows' links. Whole warps go through the rows.
__device__ __forceinline__ void group_rows(unsigned long long* words, const PrefixMemory& m, const SharingRule& rule,
                                           int batch_size, int* group_of_row, int* prefix_pages) {
  const int thread = threadIdx.x, lane = thread % 32, end = (batch_size + 31) / 32 * 32;
  take_links(words, m, batch_size);
  __syncthreads();
  for (int row = thread; row < end; row += WORKERS) {
    const int pages = row < batch_size ? m.pages[row] : 0, tree = pages > 0 ? m.tree[row] : -1;
    lower(m.least, tree, pages), raise(m.number, tree, pages);
  }
  __syncthreads();
  bool differ = false;
  for (int row = thread; row < batch_size; row += WORKERS) {
    const int least = m.least[row] == NOBODY ? 0 : m.least[row];
    m.depth[row] = least, differ |= m.number[row] != least;
  }
  if (__syncthreads_or(differ)) find_depths(m, batch_size);
  // A component's rows hang together by links of that depth, each to an earlier row: the first has none.
  for (int row = thread; row < batch_size; row += WORKERS)
    m.component[row] = m.pages[row] > 0 && m.pages[row] >= m.depth[m.tree[row]] ? m.to[row] : row;
  for (bool more = true; __syncthreads_or(more);) {
    for (int row = thread; row < batch_size; row += WORKERS) m.leader[row] = m.component[m.component[row]];
    __syncthreads();
    more = false;
    for (int row = thread; row < batch_size; row += WORKERS) {
      more |= m.component[row] != m.leader[row];
      m.component[row] = m.leader[row];
    }
  }
  for (int row = thread; row < end; row += WORKERS) {
    const int component = row < batch_size ? m.component[row] : -1;
    add_to(m.size, component);
    lower(m.common, component == row ? -1 : component, component < 0 ? 0 : m.pages[row]);
  }
  __syncthreads();
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
  __syncthreads();
  for (int row = thread; row < batch_size; row += WORKERS) {
    const int tree = m.tree[row];
    if (m.leader[row] == NOBODY && m.left[tree] >= 2 && rule.pays(m.left[tree], m.least[tree])) {
      m.leader[row] = m.first_left[tree];
      if (m.leader[row] == row) m.common[row] = m.least[tree];
    }
  }
  // Groups are numbered by their leaders: of 32 rows each `leaders` has a bit, and `before` the groups before them.
  int *leaders = m.to, *before = m.pages, &groups = m.size[0];
  __syncthreads();
  for (int row = thread; row < end; row += WORKERS) {
    const unsigned leads = __ballot_sync(EVERYBODY, row < batch_size && m.leader[row] == row);
    if (lane == 0) leaders[row / 32] = static_cast<int>(leads);
  }
  __syncthreads();
  if (thread < 32) {
    int count = 0;
    for (int base = 0; base < end / 32; base += 32) {
      const int own = base + lane < end / 32 ? __popc(static_cast<unsigned>(leaders[base + lane])) : 0;
      const int through = scan(own, lane);
      if (base + lane < end / 32) before[base + lane] = count + through - own;
      count += __shfl_sync(EVERYBODY, through, 31);
    }
    if (lane == 0) groups = count;
  }
  __syncthreads();
  for (int row = thread; row < batch_size; row += WORKERS) {
    const int leader = m.leader[row];
    int group = -1;
    if (leader != NOBODY) {
      const unsigned earlier = static_cast<unsigned>(leaders[leader / 32]) & ((1u << leader % 32) - 1);
      group = before[leader / 32] + __popc(earlier);
      if (leader == row) prefix_pages[group] = m.common[row];
    }
    group_of_row[row] = group;
  }
  for (int group = groups + thread; group < max(1, batch_size / 2); group += WORKERS) prefix_pages[group] = 0;
}

}  // namespace pkv

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
pkv_find_prefixes(const pkv::page_id* page_ids, const int* row_begins, const int* lengths, int table_stride,
                  int num_pages, int batch_size, int max_tokens, int query_tokens, int tokens_per_member,
                  int least_tokens, int* group_of_row, int* prefix_pages, unsigned long long* workspace) {
  using namespace pkv;
  extern __shared__ __align__(128) unsigned char memory[];
  const PrefixRows rows{{page_ids, table_stride, num_pages PKV_CSR(, row_begins, batch_size)},
                        {lengths, batch_size, max_tokens, 0 PKV_LAST_PAGE(, row_begins)}, query_tokens};
  PKV_OVERLAP
  const Link link = find_link(rows, blockIdx.x, reinterpret_cast<int*>(memory));
  if (threadIdx.x == 0) *static_cast<volatile unsigned long long*>(workspace + blockIdx.x) = link.word();
  if (blockIdx.x != batch_size - 1) return;
  __syncthreads();  // the memory is find_link's
  group_rows(workspace, PrefixMemory(memory, batch_size), {tokens_per_member, least_tokens}, batch_size, group_of_row,
             prefix_pages);
}
