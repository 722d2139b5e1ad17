// The rate at which random slots of a file are read by `depth` threads of pread with O_DIRECT, and nothing else: what a
// pool over the same file can reach.
//
//   cc -O2 -pthread roof.c -o roof && ./roof FILE SLOT_BYTES SLOTS DEPTH READS SEED [small]
//
// prints bytes, seconds, processor seconds; small: into pages of 4 KiB.
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

static int fd;
static long slot_bytes, slots, reads;
static long* order;
static int small_pages;
static atomic_long next, moved;
static pthread_barrier_t ready;

static void* work(void* unused) {
  void* buffer;
  const long huge = 2l << 20, length = (slot_bytes + huge - 1) / huge * huge;
  if (posix_memalign(&buffer, huge, length)) exit(2);
  // Without huge pages every 4 KiB of a read is a segment of its own, and a virtual disk cuts the read into pieces.
  if (small_pages ? madvise(buffer, length, MADV_NOHUGEPAGE) : madvise(buffer, length, MADV_HUGEPAGE)) perror("madvise");
  memset(buffer, 0, length);
  pthread_barrier_wait(&ready);
  for (long i; (i = atomic_fetch_add(&next, 1)) < reads;) {
    const long got = pread(fd, buffer, slot_bytes, order[i % slots] * slot_bytes);
    if (got != slot_bytes) exit(3);
    atomic_fetch_add(&moved, got);
  }
  return unused;
}

static double seconds(struct timespec t) { return t.tv_sec + t.tv_nsec * 1e-9; }
static double used(struct rusage u) {
  return u.ru_utime.tv_sec + u.ru_stime.tv_sec + (u.ru_utime.tv_usec + u.ru_stime.tv_usec) * 1e-6;
}

int main(int count, char** words) {
  if (count < 7) return 1;
  small_pages = count > 7;
  slot_bytes = atol(words[2]), slots = atol(words[3]), reads = atol(words[5]);
  const int depth = atoi(words[4]);
  if ((fd = open(words[1], O_RDONLY | O_DIRECT)) < 0 && (fd = open(words[1], O_RDONLY)) < 0) return 1;
  srand(atoi(words[6]));
  order = malloc(slots * sizeof *order);
  for (long i = 0; i < slots; ++i) {
    const long at = rand() % (i + 1);
    order[i] = order[at];
    order[at] = i;
  }
  pthread_t threads[256];
  struct timespec begin, end;
  struct rusage before, after;
  pthread_barrier_init(&ready, NULL, depth + 1);
  for (int i = 0; i < depth && i < 256; ++i)
    if (pthread_create(&threads[i], NULL, work, NULL)) return 1;
  getrusage(RUSAGE_SELF, &before);
  clock_gettime(CLOCK_MONOTONIC, &begin);
  pthread_barrier_wait(&ready);
  for (int i = 0; i < depth && i < 256; ++i) pthread_join(threads[i], NULL);
  clock_gettime(CLOCK_MONOTONIC, &end);
  getrusage(RUSAGE_SELF, &after);
  printf("%ld %.6f %.6f\n", (long)moved, seconds(end) - seconds(begin), used(after) - used(before));
  return 0;
}
