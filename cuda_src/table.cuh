// The page ids of a step's rows: a block table or CSR, of int32 or int64, as the caller has them.
#pragma once

#ifndef TABLE_INT64
#define TABLE_INT64 0  // 1: page ids are int64, not int32
#endif
#ifndef TABLE_CSR
#define TABLE_CSR 0  // 1: the rows' ids lie end to end, and row_begins says where each row's begin
#endif
#if TABLE_CSR
#define PKV_CSR(...) __VA_ARGS__  // what the other variants do not have, so that it costs them nothing
#else
#define PKV_CSR(...)
#endif

namespace pkv {

#if TABLE_INT64
using page_id = long long;
using unsigned_page_id = unsigned long long;
#else
using page_id = int;
using unsigned_page_id = unsigned;
#endif

struct PageTable {
  const page_id* ids;     // [num_rows, stride]; of CSR [stride]
  int stride;
  int num_pages;          // of the pool
  PKV_CSR(const int* row_begins; int num_rows;)  // [num_rows + 1]

  // The id of a row's page, cut to [0, num_pages): a stale plan may meet any id, and with CSR any row.
  __device__ __forceinline__ int load(int row, int column) const {
#if TABLE_CSR
    const unsigned at = static_cast<unsigned>(__ldg(row_begins + min(row, num_rows))) + column;
    const page_id id = __ldg(ids + min(at, static_cast<unsigned>(stride - 1)));
#else
    const page_id id = __ldg(ids + static_cast<long long>(row) * stride + column);
#endif
    return min(static_cast<unsigned_page_id>(id), static_cast<unsigned_page_id>(num_pages - 1));
  }
};

}  // namespace pkv
