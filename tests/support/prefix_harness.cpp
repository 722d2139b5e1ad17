// cuda_src/prefixes.cu on a CPU: every thread of a CTA a fiber, one CTA after the other.
#include "cuda_on_cpu.h"

[[maybe_unused]] static void __threadfence() {}
template <class T>
static T atomicMax(T* at, T value) {
  const T before = *at;
  *at = max(before, value), ++progress;
  return before;
}
template <class T>
static T atomicMin(T* at, T value) {
  const T before = *at;
  *at = min(before, value), ++progress;
  return before;
}
template <class T>
static T atomicAdd(T* at, T value) {
  ++progress;
  return (*at += value) - value;
}
#include "prefixes.cu"

struct Given {
  const void *block_table, *row_begins, *seq_lens;
  int *group_of_row, *prefix_pages;
  unsigned long long* workspace;
  int numbers[7];  // table_stride, num_pages, batch_size, max_tokens, query_tokens, tokens_per_member, least_tokens
};
static Given given;

extern "C" const char* find_prefixes(void* const* pointers, const int* numbers) {
  typedef const int* ints;
  given = {pointers[0], pointers[1], pointers[2], (int*)pointers[3], (int*)pointers[4],
           (unsigned long long*)pointers[5], {}};
  std::copy_n(numbers, 7, given.numbers);
  body = [] {
    const int* n = given.numbers;
    pkv_find_prefixes(static_cast<const pkv::page_id*>(given.block_table), ints(given.row_begins), ints(given.seq_lens),
                      n[0], n[1], n[2], n[3], n[4], n[5], n[6], given.group_of_row, given.prefix_pages,
                      given.workspace);
  };
  const int batch_size = numbers[2];
  if (pkv::PrefixMemory::bytes(batch_size) > static_cast<int>(sizeof memory)) return "too many rows";
  gridDim = {batch_size, 1, 1};
  // In any order, but for the last CTA, which waits for all others.
  const int first = static_cast<int>(turn_order >> 8) % batch_size, last = batch_size - 1;
  for (int i = 0; i < batch_size; ++i)
    if (const int cta = (first + i) % batch_size; cta < last) blockIdx = {cta, 0, 0}, run_cta();
  blockIdx = {last, 0, 0}, run_cta();
  for (const unsigned char* at = memory + std::max(28, pkv::PrefixMemory::bytes(batch_size)); at < memory + sizeof memory; ++at)
    if (*at != 0xff) complain("shared memory is written past its end");
  return complained();
}
