// Page ids and lengths as the decode kernels read them (table.cuh, plan.cuh), built for the CPU.
#include <algorithm>
#include <cmath>

#define __device__
#define __forceinline__ inline
template <class T>
T __ldg(const T* at) { return *at; }
using std::min;

#include "plan.cuh"
#include "table.cuh"

// out: the page id of each of num_reads places.
extern "C" void load_ids(const void* ids, int stride, int num_pages, const int* row_begins, int num_rows, const int* rows,
                         const int* columns, int num_reads, int* out) {
  (void)row_begins, (void)num_rows;
  const pkv::PageTable table{static_cast<const pkv::page_id*>(ids), stride, num_pages PKV_CSR(, row_begins, num_rows)};
  for (int i = 0; i < num_reads; ++i) out[i] = table.cut(table.stored<false>(rows[i], columns[i]));
}

// out: the length of each row, and what comes after the last.
extern "C" void lengths(const int* at, const int* row_begins, int batch_size, int most, int* out) {
  (void)row_begins;
  const pkv::Lengths lens{at, batch_size, most, 0 PKV_LAST_PAGE(, row_begins)};
  for (int row = 0; row <= batch_size; ++row) out[row] = lens[row];
}
