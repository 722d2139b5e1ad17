// pkv_block_sums: the two sums by which a block of the pool is known again, of blocks that lie in pages on the GPU.
//
// Adds pkvsim.memory.blocks.block_sums' sums of each block to what `sums` holds. A block is runs_per_block runs of run_bytes
// each, for every layer its page of K, then that of V, end to end; a pair of its words is a vector of 16 bytes.
//
// Grid: a few CTAs; block: THREADS, each with UNROLL vectors under way, both given by the host, -D. A CTA takes every
// so many-th part of all blocks' PARTS parts. Its threads add vectors of a part in registers, and then to the block's
// sums, by atomics whose order does not matter.
//
//   pages        [num_blocks] int32, the page of each block
//   bases        [runs_per_block] addresses of page 0 of each run's array, on 16-byte boundaries
//   page_stride  bytes from a page to the next, of every array; a multiple of 16
//   run_bytes    a multiple of 16
//   num_blocks, runs_per_block; runs_per_block * run_bytes / 16 must stay below 2^31
//   sums         [num_blocks, 2] uint64, zeros before
//
// Its speed is bound by the bytes that few CTAs have under way, about 0.5 TB/s of 32, and need not be more: blocks come
// from disks, whose rate is a hundredth of that, and decode runs beside it.

namespace pkv {

using Word = unsigned long long;
constexpr int PARTS = 4;  // of a block; more of them keep more CTAs busy where blocks are few
constexpr Word ODD = 0x9E3779B97F4A7C15ull;

struct Sums {
  Word first = 0, second = 0;

  // Pair `at` of a block, whose words have the numbers 2 * at + 1 and 2 * at + 2.
  __device__ __forceinline__ void add(uint4 pair, unsigned at) {
    const Word number = (2ull * at + 1) * ODD;
    const Word a = static_cast<Word>(pair.y) << 32 | pair.x, b = static_cast<Word>(pair.w) << 32 | pair.z;
    first += halves(a ^ number) + b;
    second += halves(b ^ (number + ODD)) + a;
  }

  static __device__ __forceinline__ Word halves(Word x) {
    return static_cast<Word>(static_cast<unsigned>(x)) * static_cast<unsigned>(x >> 32);
  }
};

}  // namespace pkv

extern "C" __global__ void __launch_bounds__(THREADS)
pkv_block_sums(const int* pages, const long long* bases, long long page_stride, int run_bytes, int num_blocks,
               int runs_per_block, unsigned long long* sums) {
  const unsigned vectors_per_run = run_bytes / 16, vectors = vectors_per_run * runs_per_block;
  const unsigned part_vectors = (vectors + pkv::PARTS - 1) / pkv::PARTS;
  for (int item = blockIdx.x; item < num_blocks * pkv::PARTS; item += gridDim.x) {
    const int block = item / pkv::PARTS;
    const unsigned begin = item % pkv::PARTS * part_vectors, end = min(begin + part_vectors, vectors);
    const long long page = pages[block] * page_stride;
    pkv::Sums found;
    for (unsigned base = begin + threadIdx.x; base < end; base += UNROLL * THREADS) {
      uint4 values[UNROLL];
#pragma unroll
      for (int i = 0; i < UNROLL; ++i) {
        const unsigned at = base + i * THREADS, run = at / vectors_per_run;
        if (at < end)
          values[i] = __ldcg(reinterpret_cast<const uint4*>(bases[run] + page) + (at - run * vectors_per_run));
      }
#pragma unroll
      for (int i = 0; i < UNROLL; ++i)
        if (base + i * THREADS < end) found.add(values[i], base + i * THREADS);
    }
    atomicAdd(sums + 2 * block, found.first);
    atomicAdd(sums + 2 * block + 1, found.second);
  }
}
