// cuda_src/block_sums.cu on a CPU: its threads need nothing of each other, so one after the other does.
#include "cuda_types_on_cpu.h"

#include <cstddef>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
static int3 threadIdx, blockIdx, gridDim;
static unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
static void atomicAdd(unsigned long long* at, unsigned long long value) { *at += value; }

#include "block_sums.cu"

extern "C" void run(int ctas, const int* pages, const long long* bases, long long page_stride, const int* n,
                    unsigned long long* sums) {
  gridDim = {ctas, 1, 1};
  for (blockIdx.x = 0; blockIdx.x < ctas; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < THREADS; ++threadIdx.x)
      pkv_block_sums(pages, bases, page_stride, n[0], n[1], n[2], sums);
}
