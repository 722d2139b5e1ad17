// Where a row's page ids are: in a block table or in CSR, int32 or int64, as the caller has them.
#pragma once
#include "plan.cuh"

namespace pkv {

#if TABLE_INT64
using page_id = long long;
using unsigned_page_id = unsigned long long;
#else
using page_id = int;
using unsigned_page_id = unsigned;
#endif

struct PageTable {
  const page_id* ids;     // [num_rows, stride]; with TABLE_CSR [stride]
  int stride;
  int num_pages;          // of the pool
  PKV_CSR(const int* row_begins; int num_rows;)  // [num_rows + 1]

  // The id of page `column` of a row, as it is in memory. EARLY says that it may not be written yet (read_early.cuh); a
  // plan made of what was there before may ask for any row, which CSR must not follow out of its array.
  template <bool EARLY>
  __device__ __forceinline__ page_id stored(int row, int column) const {
#if TABLE_CSR
    const unsigned at = static_cast<unsigned>(read<EARLY>(row_begins + min(row, num_rows))) + column;
    return read<EARLY>(ids + min(at, static_cast<unsigned>(stride - 1)));
#else
    return read<EARLY>(ids + static_cast<long long>(row) * stride + column);
#endif
  }
  // An id cut to [0, num_pages), since such a plan may meet any id.
  __device__ __forceinline__ int cut(page_id id) const {
    return min(static_cast<unsigned_page_id>(id), static_cast<unsigned_page_id>(num_pages - 1));
  }

 private:
  template <bool EARLY, class T>
  __device__ __forceinline__ static T read(const T* from) {
    if constexpr (EARLY) return read_early(from);
    else return __ldg(from);
  }
};

}  // namespace pkv
