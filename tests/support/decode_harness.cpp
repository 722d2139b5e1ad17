// cuda_src/decode.cu, balanced.cu, selected.cu or shared.cu on a CPU: every thread of a CTA a fiber, one CTA after the other.
//
// Stands in for mma.cuh, which is nothing but instructions; the test puts an empty file in its place. Whatever a warp
// does together, the tensor cores' fragments above all, is worked out here from what all its lanes bring, by the
// layouts of the PTX manual. A copy arrives when it is waited for, no sooner; or, with copies_hurry, the moment it is started.
#include "instructions_on_cpu.h"

#if READ_COLUMNS
#include "shared.cu"
#elif RANKS
#include "several.cu"
#elif SELECTED
#include "selected.cu"
#elif BALANCED
#include "balanced.cu"
#else
#include "decode.cu"
#include "merge.cu"
#endif

// The parameters of the kernel that runs; a run returns what there is to complain of, or null.
static pkv::DecodeArguments given;
static const pkv::Task* tasks;
static const int *split_offsets, *rows;
static int numbers[11];

static void run_grid(int x, int y) {
  run_ctas(x, y, false, [](bool ends) {
    pkv::previous_kernel(ends);
    for (const auto& barrier : pkv::named)
      if (barrier.threads) complain("a warp waits at a barrier for others that do not come"), forget();
  });
}

#if CACHE_TYPE
// Bytes 0, 1 and 2, 3 of each word as FP16 pairs; alternate: 0, 2 and 1, 3.
extern "C" void widen(const unsigned* words, int count, int alternate, unsigned* pairs) {
  for (; count > 0; --count, ++words, pairs += 2)
    alternate ? pkv::widen<true>(pairs[0], pairs[1], *words) : pkv::widen<false>(pairs[0], pairs[1], *words);
}
#endif

// In the next run the array at `at` holds these values until the previous kernel ends, those it holds now from then on.
extern "C" void write_late(int* at, const int* before, int count) {
  pkv::late.push_back({at, {before, before + count}, {at, at + count}});
  pkv::previous_ended = true;
}

extern "C" int arguments_bytes() { return sizeof given; }

#if READ_COLUMNS
// integers: costs, those of shared reads, num_groups, max_tokens. groups: group_of_row, prefix_pages.
static const int *group_of_row, *prefix_pages;
extern "C" const char* run(int num_ctas, const void* arguments, const int* integers, const int* of_row,
                           const int* pages) {
  std::memcpy(&given, arguments, sizeof given);
  std::copy_n(integers, 11, numbers);
  group_of_row = of_row, prefix_pages = pages;
  if (READ_SHARED_BYTES + 4 * pkv::Readers::words(given.batch_size, numbers[9]) > static_cast<int>(sizeof memory))
    return "too many rows";
  body = [] {
    const int* n = numbers;
    pkv_decode_shared(given, {n[0], n[1], n[2], n[3]}, {n[4], n[5], n[6], n[7], n[8]}, group_of_row, prefix_pages, n[9],
                      n[10]);
  };
  run_grid(num_ctas, 1);
  pkv::late.clear();
  return complained();
}
#elif RANKS
// One CTA. integers: its number, that of all CTAs, a seed; costs, max_tokens.
static pkv::RankArguments rank_arguments;
extern "C" const char* run(const void* arguments, const void* of_rank, const int* integers) {
  std::memcpy(&given, arguments, sizeof given);
  std::memcpy(&rank_arguments, of_rank, sizeof rank_arguments);
  std::copy_n(integers, 8, numbers);
  body = [] {
    const int* n = numbers + 3;
    pkv_decode_several(given, {n[0], n[1], n[2], n[3]}, rank_arguments, n[4]);
  };
  gridDim = {numbers[1], 1, 1}, blockIdx = {numbers[0], 0, 0}, turn_order = static_cast<unsigned>(numbers[2]);
  pkv::previous_kernel(true);
  run_cta();
  return complained();
}
// pkv_merge_ranks. integers: stride, rank, owner.
extern "C" const char* merge(const void* arguments, const void* states, const int* integers) {
  std::memcpy(&given, arguments, sizeof given);
  tasks = static_cast<const pkv::Task*>(states);
  std::copy_n(integers, 3, numbers);
  body = [] {
    pkv_merge_ranks(reinterpret_cast<const pkv::Slot*>(tasks), numbers[0], given.out, given.lse, given.sinks, numbers[1],
                    numbers[2], given.batch_size, given.num_kv_heads);
  };
  run_grid(2, 1);
  return complained();
}
extern "C" int rank_arguments_bytes() { return sizeof rank_arguments; }
extern "C" int inbox_bytes() { return sizeof(pkv::Inbox); }
extern "C" int opened_bytes() { return pkv::OPENED_BYTES; }
#elif BALANCED
#if SELECTED
#define pkv_decode_balanced pkv_decode_selected

// What the CTAs plan: lines of (list, tile_begin, tile_end), and how many each CTA has. integers as of run().
static int* listed;
static int num_listed;
static void list_pieces() {
  const pkv::Costs costs{numbers[0], numbers[1], numbers[2], numbers[3]};
  const pkv::PageLists lists{given.selected_pages, given.selected_counts, given.max_selected,
                             (numbers[4] - 1) / PAGE_SIZE};
  const pkv::Lists all{{given.lengths, given.batch_size, numbers[4], given.reach()}, lists, given.num_kv_heads};
  const pkv::ListPlan plan(all, costs, *reinterpret_cast<pkv::ListNotes*>(memory));
  if (threadIdx.x != 0) return;
  pkv::ListWalk walk = plan.walk;
  for (pkv::ListPiece s; walk.next(s); ++num_listed) {
    const int line[3] = {s.row * given.num_kv_heads + s.kv_head, s.tile_begin, s.tile_end};
    std::copy_n(line, 3, listed + 3 * num_listed);
  }
}
extern "C" const char* list_tasks(int num_ctas, const void* arguments, const int* integers, int* lines, int* counts) {
  std::memcpy(&given, arguments, sizeof given);
  std::copy_n(integers, 5, numbers);
  listed = lines, num_listed = 0, body = list_pieces, gridDim = {num_ctas, 1, 1};
  for (blockIdx = {0, 0, 0}; blockIdx.x < num_ctas; ++blockIdx.x) {
    const int before = num_listed;
    run_cta();
    counts[blockIdx.x] = num_listed - before;
  }
  return complained();
}
#endif
extern "C" const char* run(int num_ctas, const void* arguments, const int* integers) {
  std::memcpy(&given, arguments, sizeof given);
  std::copy_n(integers, 5, numbers);
  body = [] { pkv_decode_balanced(given, {numbers[0], numbers[1], numbers[2], numbers[3]}, numbers[4]); };
  run_grid(num_ctas, 1);
  pkv::late.clear();
  return complained();
}
#else
// And the merge of all rows.
extern "C" const char* run(int num_ctas, const void* arguments, const void* task_list, const int* offsets, const int* integers,
                    const int* all_rows) {
  std::memcpy(&given, arguments, sizeof given);
  tasks = static_cast<const pkv::Task*>(task_list), split_offsets = offsets, rows = all_rows;
  std::copy_n(integers, 2, numbers);
  body = [] { pkv_decode_tasks(given, tasks, split_offsets, numbers[0], numbers[1]); };
  run_grid(num_ctas, 1);
  body = [] { pkv_merge(given.partials, split_offsets, rows, given.out, given.lse, given.query_lens, given.sinks); };
  run_grid(given.num_kv_heads, given.batch_size);
  return complained();
}
#endif
