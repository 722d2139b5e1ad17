// cuda_src/plan_spans.cu on a CPU: every lane of the warp a fiber, one CTA after the other.
#define WARPS 1
#include "cuda_on_cpu.h"

#include "plan_spans.cu"

static void* const* p;
static const int* n;

// pointers: seq_lens, group_of_row, prefix_pages, tasks, counts, parts; numbers as in span_harness.cpp, then max_tasks.
extern "C" const char* list_spans(void* const* pointers, const int* numbers) {
  p = pointers, n = numbers;
  body = [] {
    typedef const int* ints;
    pkv_list_spans(ints(p[0]), ints(p[1]), ints(p[2]), n[0], n[1], n[2], n[3], n[4], n[5], {n[7], n[8], n[9], n[10]},
                   {n[11], n[12], n[13], n[14], n[15]}, 0x7fffffff, static_cast<pkv::SpanTask*>(p[3]), n[16],
                   static_cast<int*>(p[4]), static_cast<int*>(p[5]), nullptr);
  };
  run_ctas(n[6]);
  return complained();
}
