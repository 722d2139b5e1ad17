// pkv_stream_read: reads bytes once and keeps nothing. Every decode timing is divided by its own, the speed of light.
//
// Grid: any; block: any multiple of 32.
//
//   src          [num_vectors] uint4, on a 16-byte boundary
//   num_vectors  of 16 bytes
//   sink         [1] uint32, all but never written: a store that may happen keeps the loads alive
//
// Its speed is bound by HBM for large reads, by the latency of a launch and the first loads for small ones.

#include "variant.cuh"

// One thread in 2^32 meets this on random data; its store costs nothing that shows.
#define IMPOSSIBLE 0x9e3779b9u

extern "C" __global__ void __launch_bounds__(1024) pkv_stream_read(const uint4* __restrict__ src, long long num_vectors,
                                           unsigned int* __restrict__ sink) {
    const long long stride = (long long)gridDim.x * blockDim.x;
    const long long first = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    unsigned int folded = 0u;
    for (long long base = first; base < num_vectors; base += stride * UNROLL) {
        uint4 loaded[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const long long at = base + i * stride;
            loaded[i] = make_uint4(0u, 0u, 0u, 0u);
            if (at < num_vectors) {
                asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                             : "=r"(loaded[i].x), "=r"(loaded[i].y), "=r"(loaded[i].z), "=r"(loaded[i].w)
                             : "l"(src + at));
            }
        }
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            folded ^= loaded[i].x ^ loaded[i].y ^ loaded[i].z ^ loaded[i].w;
        }
    }
    if (folded == IMPOSSIBLE) {
        *sink = folded;
    }
}
