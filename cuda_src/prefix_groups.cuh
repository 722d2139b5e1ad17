// How rows' links become groups: the grouping CTA of pkv_find_prefixes (prefixes.cu). The rule is that of
// pkvsim.schedule.prefixes.
//
// Its code runs once or twice a launch and is fetched from L2 as it goes, so its loops are not unrolled.
#pragma once
#include "plan.cuh"
#include "warp_plan.cuh"

namespace pkv {

constexpr int WORKERS = WARPS * 32;
constexpr int SHARE = 4;  // threads that count for one row together
constexpr int NOBODY = 0x7fffffff;
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
