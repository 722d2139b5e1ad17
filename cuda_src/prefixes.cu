// pkv_find_prefixes: which rows of a step have their leading pages in common, by comparing every page id.
//
// pkvsim.schedule.prefixes states the rule; what this kernel writes equals it. In short: of each tree of rows with one
// first id, the depth that saves the most pages; the rows that agree down to it are groups where that pays.
//
// Grid: [batch_size], block: [WARPS * 32]; dynamic shared memory: pkv::PrefixMemory::bytes(batch_size). CTA i finds,
// for row i, the longest prefix that it has in common with any row before it, and the last CTA to finish makes groups
// of that. These links make a forest: two rows have in common what the least link between them has.
//
//   page_ids, row_begins, lengths  as the decode kernels take them (table.cuh, plan.cuh)
//   query_tokens           of each row; pages count that all of them see whole
//   tokens_per_member, least_tokens  SharingRule
//   group_of_row  [batch_size] int32, out: -1 for rows in no group
//   prefix_pages  [max(1, batch_size / 2)] int32, out: 0 past the last group
//   workspace     [1 + 3 * batch_size] int32; its first word is 0 between launches
//
// Bound by latency: lengths, first ids, two reads of the rows' ids, a ticket, and the grouping by one CTA, which takes
// batch_size^2 steps of comparing counts over its threads.
#include "table.cuh"

namespace pkv {

constexpr int WORKERS = WARPS * 32;
constexpr int SHARE = 4;  // threads that count for one row together
constexpr int NOBODY = 0x7fffffff;
constexpr int NUM_PROBES = 4;
constexpr int MOST_PASSES = 32;  // rows of a thread: whether they are still candidates is a bit each
constexpr int MOST_ROWS = 1 << 16;  // a row and its score share a word

// Columns at which rows are looked at before they are compared: the first, then 1, 16, 128, 1024. What those say is
// only with which row the comparison begins.
__device__ __forceinline__ int probe(int i) { return i < 2 ? i : 1 << (3 * i - 2); }

// Orders candidates: by how many probes agree, then the first row. Links to first rows make short chains.
__device__ __forceinline__ int rank_of(int row, int score) { return score * MOST_ROWS + MOST_ROWS - 1 - row; }
__device__ __forceinline__ int ranked_row(int rank) { return MOST_ROWS - 1 - rank % MOST_ROWS; }

// A row's link to an earlier one, and the first row of its tree; written by the row's CTA.
struct Links {
  int *to, *pages, *tree;  // [batch_size]

  __device__ __forceinline__ Links(int* memory, int batch_size)
      : to(memory), pages(to + batch_size), tree(pages + batch_size) {}
};

// What the grouping CTA works with; the last arrays are of trees or components and lie at their first rows.
struct PrefixMemory {
  unsigned long long* saved;  // by the best depth of a tree, in pages
  int *to, *pages, *tree;     // Links
  int* component;             // first row of the row's
  int *depth, *least, *left, *first_left;  // of a tree: depth taken, least link, rows in no group, the first of them
  int *size, *common;                      // of a component: rows, and pages that they have in common
  int *leader, *number;                    // first row of the row's group or NOBODY; groups before a leader's
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
  __device__ __forceinline__ page_id id(int row, int column) const { return table.stored<false>(row, column); }
  // The id in the i-th column that is probed, or whatever lies there.
  __device__ __forceinline__ page_id probed(int row, int i) const {
    return (TABLE_CSR ? table.stride > 0 : probe(i) < table.stride) ? id(row, probe(i)) : page_id(0);
  }
};

// Finds row `own`'s link. word: three words of shared memory.
__device__ __forceinline__ void find_link(const PrefixRows& rows, const Links& links, int own, int* word) {
  int &best = word[0], &first = word[1], &differs = word[2];
  const int thread = threadIdx.x, own_pages = rows.pages(own);
  if (thread == 0) best = -1, first = own;
  __syncthreads();
  // The rows that begin with the same id, and of these the first that agrees at the most probes. All that may be looked
  // at is asked for at once, whatever the lengths: one wait instead of three.
  unsigned candidates = 0;  // bit j: row thread + j * WORKERS
  page_id own_id[1 + NUM_PROBES];
  #pragma unroll
  for (int i = 0; i <= NUM_PROBES; ++i) own_id[i] = rows.probed(own, i);
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
    atomicMin(&first, row);
    atomicMax(&best, rank_of(row, score));
  }
  __syncthreads();
  const int tree = first;
  int link = -1, linked = 0;  // the best row so far, and what it has in common with this one
  for (;;) {
    const int found = best;
    if (found < 0) break;
    const int row = ranked_row(found), common = min(rows.pages(row), own_pages);
    __syncthreads();
    if (thread == 0) best = -1, differs = common;
    __syncthreads();
    int at = common;
    #pragma unroll 4
    for (int column = thread; column < common; column += WORKERS)
      if (rows.id(row, column) != rows.id(own, column)) at = min(at, column);
    if (at < common) atomicMin(&differs, at);
    __syncthreads();
    if (differs > linked) linked = differs, link = row;
    // Only a row that agrees where the best one first differs can go on further; whether it does is for the comparison.
    if (row % WORKERS == thread) candidates &= ~(1u << row / WORKERS);
    for (int j = 0; j < MOST_PASSES && candidates >> j; ++j) {
      if (!(candidates >> j & 1)) continue;
      const int other = thread + j * WORKERS;
      if (linked < own_pages && linked < rows.pages(other) && rows.id(other, linked) == rows.id(own, linked))
        atomicMax(&best, rank_of(other, 0));
      else candidates &= ~(1u << j);
    }
    __syncthreads();
  }
  if (thread == 0) links.to[own] = link, links.pages[own] = linked, links.tree[own] = tree;
}

// Makes groups of all rows' links.
__device__ __forceinline__ void group_rows(const Links& links, const PrefixMemory& m, const SharingRule& rule,
                                           int batch_size, int* group_of_row, int* prefix_pages) {
  const int thread = threadIdx.x;
  for (int row = thread; row < batch_size; row += WORKERS) {
    m.to[row] = __ldcg(links.to + row), m.pages[row] = __ldcg(links.pages + row);
    m.tree[row] = __ldcg(links.tree + row);
    m.saved[row] = 0, m.depth[row] = 0, m.left[row] = 0, m.size[row] = 0;
    m.least[row] = m.first_left[row] = m.common[row] = NOBODY;
  }
  __syncthreads();
  // Pages that the depth of each row's link saves its tree: those of the links that are as long.
  for (int base = 0; base < batch_size; base += WORKERS / SHARE) {
    const int row = base + thread / SHARE, pages = row < batch_size ? m.pages[row] : 0;
    const int tree = pages > 0 ? m.tree[row] : NOBODY;
    int count = 0;
    #pragma unroll 8
    for (int other = thread % SHARE; other < batch_size; other += SHARE)
      count += (m.tree[other] == tree) & (m.pages[other] >= pages);
    for (int hop = 1; hop < SHARE; hop <<= 1) count += __shfl_xor_sync(0xffffffffu, count, hop);
    if (pages > 0 && thread % SHARE == 0) {
      m.number[row] = count;
      atomicMax(&m.saved[tree], static_cast<unsigned long long>(count) * static_cast<unsigned>(pages));
      atomicMin(&m.least[tree], pages);
    }
  }
  __syncthreads();
  for (int row = thread; row < batch_size; row += WORKERS) {
    const int pages = m.pages[row], tree = m.tree[row];
    if (pages > 0 && static_cast<unsigned long long>(m.number[row]) * static_cast<unsigned>(pages) == m.saved[tree])
      atomicMax(&m.depth[tree], pages);
  }
  __syncthreads();
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
  for (int row = thread; row < batch_size; row += WORKERS) {
    const int component = m.component[row];
    atomicAdd(&m.size[component], 1);
    if (component != row) atomicMin(&m.common[component], m.pages[row]);
  }
  __syncthreads();
  for (int row = thread; row < batch_size; row += WORKERS) {
    const int component = m.component[row], size = m.size[component];
    m.leader[row] = size >= 2 && rule.pays(size, m.common[component]) ? component : NOBODY;
    if (m.leader[row] == NOBODY) atomicAdd(&m.left[m.tree[row]], 1), atomicMin(&m.first_left[m.tree[row]], row);
  }
  __syncthreads();
  for (int row = thread; row < batch_size; row += WORKERS) {
    const int tree = m.tree[row];
    if (m.leader[row] == NOBODY && m.left[tree] >= 2 && rule.pays(m.left[tree], m.least[tree])) {
      m.leader[row] = m.first_left[tree];
      if (m.leader[row] == row) m.common[row] = m.least[tree];
    }
  }
  __syncthreads();
  if (thread < 32) {
    int groups = 0;
    for (int base = 0; base < batch_size; base += 32) {
      const int row = base + thread;
      const bool leads = row < batch_size && m.leader[row] == row;
      const unsigned leaders = __ballot_sync(0xffffffffu, leads);
      if (leads) {
        m.number[row] = groups + __popc(leaders & ((1u << thread) - 1));
        prefix_pages[m.number[row]] = m.common[row];
      }
      groups += __popc(leaders);
    }
    for (int group = groups + thread; group < max(1, batch_size / 2); group += 32) prefix_pages[group] = 0;
  }
  __syncthreads();
  for (int row = thread; row < batch_size; row += WORKERS)
    group_of_row[row] = m.leader[row] == NOBODY ? -1 : m.number[m.leader[row]];
}

}  // namespace pkv

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
pkv_find_prefixes(const pkv::page_id* page_ids, const int* row_begins, const int* lengths, int table_stride,
                  int num_pages, int batch_size, int max_tokens, int query_tokens, int tokens_per_member,
                  int least_tokens, int* group_of_row, int* prefix_pages, int* workspace) {
  extern __shared__ __align__(128) unsigned char memory[];
  const pkv::PrefixRows rows{{page_ids, table_stride, num_pages PKV_CSR(, row_begins, batch_size)},
                             {lengths, batch_size, max_tokens, 0 PKV_LAST_PAGE(, row_begins)}, query_tokens};
  const pkv::Links links(workspace + 1, batch_size);
  int* word = reinterpret_cast<int*>(memory);
  pkv::find_link(rows, links, blockIdx.x, word);
  // The link is seen by whoever sees the ticket.
  if (threadIdx.x == 0) {
    __threadfence();
    word[3] = atomicAdd(workspace, 1) == batch_size - 1;
  }
  __syncthreads();
  const bool last = word[3];
  __syncthreads();
  if (!last) return;
  __threadfence();
  if (threadIdx.x == 0) workspace[0] = 0;
  pkv::group_rows(links, pkv::PrefixMemory(memory, batch_size), {tokens_per_member, least_tokens}, batch_size,
                  group_of_row, prefix_pages);
}
