// pkv_gather, pkv_scatter: scattered runs of bytes between pinned host memory and pages on the GPU, by the SMs.
//
// A block of the pool lies in host memory in one piece, runs_per_block runs of run_bytes each: for every layer its page
// of K, then that of V. On the GPU each run is a page of its own array. One launch moves runs [first_run, first_run +
// num_runs) of each block, so one layer of many blocks, or all layers of few.
//
// Grid: as many CTAs as fill the link; block: THREADS, each with UNROLL vectors under way, both given by the host, -D
// (32 CTAs of 512 threads and 4 vectors fill PCIe 5.0 x16 with runs of 4 KiB, 16 from 32 KiB on, half as many to the
// host).
//
//   hosts        [num_blocks] addresses of blocks in pinned memory, on 16-byte boundaries
//   pages        [num_blocks] int32, the page of each block
//   bases        [runs_per_block] addresses of page 0 of each run's array
//   page_stride  bytes from a page to the next, of every array; a multiple of 16
//   run_bytes    a multiple of 16
//   num_blocks, first_run, num_runs
//
// num_blocks * num_runs * run_bytes / 16 must stay below 2^31.
//
// Its speed is bound by the link, given enough bytes under way: a CTA has UNROLL * THREADS * 16 of them. That piece of
// all runs laid end to end may be part of one run or many short ones.

namespace pkv {

struct Runs {
  const long long* hosts;
  const int* pages;
  const long long* bases;
  long long page_stride;
  unsigned vectors_per_run, num_runs, first_run;

  // Where vector `at` of all runs laid end to end is, on the host and on the GPU.
  __device__ __forceinline__ void find(unsigned at, uint4*& host, uint4*& device) const {
    const unsigned run = at / vectors_per_run, within = at - run * vectors_per_run;
    const unsigned block = run / num_runs, of_block = first_run + run - block * num_runs;
    host = reinterpret_cast<uint4*>(hosts[block]) + static_cast<size_t>(of_block) * vectors_per_run + within;
    device = reinterpret_cast<uint4*>(bases[of_block] + pages[block] * page_stride) + within;
  }
};

template <bool TO_HOST>
__device__ __forceinline__ void move(const Runs& runs, unsigned total) {
  constexpr unsigned PIECE = UNROLL * THREADS;
  for (unsigned base = blockIdx.x * PIECE; base < total; base += gridDim.x * PIECE) {
    uint4 values[UNROLL];
    uint4* to[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
      const unsigned at = base + i * THREADS + threadIdx.x;
      if (at >= total) continue;
      uint4 *host, *device;
      runs.find(at, host, device);
      to[i] = TO_HOST ? host : device;
      values[i] = __ldcs(TO_HOST ? device : host);  // nobody reads them again
    }
#pragma unroll
    for (int i = 0; i < UNROLL; ++i)
      if (base + i * THREADS + threadIdx.x < total) __stcs(to[i], values[i]);
  }
}

}  // namespace pkv

extern "C" __global__ void __launch_bounds__(THREADS)
pkv_gather(const long long* hosts, const int* pages, const long long* bases, long long page_stride, int run_bytes,
           int num_blocks, int first_run, int num_runs) {
  const unsigned vectors = run_bytes / 16;
  const pkv::Runs runs{hosts, pages, bases, page_stride, vectors, static_cast<unsigned>(num_runs),
                       static_cast<unsigned>(first_run)};
  pkv::move<false>(runs, static_cast<unsigned>(num_blocks) * num_runs * vectors);
}

extern "C" __global__ void __launch_bounds__(THREADS)
pkv_scatter(const long long* hosts, const int* pages, const long long* bases, long long page_stride, int run_bytes,
            int num_blocks, int first_run, int num_runs) {
  const unsigned vectors = run_bytes / 16;
  const pkv::Runs runs{hosts, pages, bases, page_stride, vectors, static_cast<unsigned>(num_runs),
                       static_cast<unsigned>(first_run)};
  pkv::move<true>(runs, static_cast<unsigned>(num_blocks) * num_runs * vectors);
}
