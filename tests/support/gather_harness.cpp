// cuda_src/gather.cu on a CPU: its threads need nothing of each other, so one after the other does.
#include "cuda_types_on_cpu.h"

#include <cstddef>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
static int3 threadIdx, blockIdx, gridDim;
static uint4 __ldcs(const uint4* at) { return *at; }
static void __stcs(uint4* at, uint4 value) { *at = value; }

#include "gather.cu"

extern "C" void run(bool to_host, int ctas, const long long* hosts, const int* pages, const long long* bases,
                    long long page_stride, const int* n) {
  gridDim = {ctas, 1, 1};
  for (blockIdx.x = 0; blockIdx.x < ctas; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < THREADS; ++threadIdx.x)
      (to_host ? pkv_scatter : pkv_gather)(hosts, pages, bases, page_stride, n[0], n[1], n[2], n[3]);
}
