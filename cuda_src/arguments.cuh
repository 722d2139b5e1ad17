// What the host gives the kernels, as structures. gpu/kernels/fields.py lists the same fields in the same order, and
// tests/kernels/test_fields.py compares names, offsets and types.
//
// Whoever includes this has half_type, the 16-bit type of DTYPE_BF16 (mma.cuh).
#pragma once
#include "plan.cuh"
#include "table.cuh"

namespace pkv {

#if CACHE_TYPE == 0
typedef half_type cache_type;
#else
typedef unsigned char cache_type;
#endif

#ifdef GROUP_SIZE
struct Slot;

// Both decode kernels' arguments; pkv_merge gets some of them.
struct DecodeArguments {
  const half_type* q;                         // [batch_size, QUERY_TOKENS, num_kv_heads * GROUP_SIZE, HEAD_DIM]
  const cache_type *k_pages, *v_pages;        // [num_pages, num_kv_heads / HEAD_SPLIT, PAGE_SIZE, dim] by the strides
  const page_id* page_ids;                    // [batch_size, table_stride]; with TABLE_CSR [table_stride]
  const int* lengths;                         // [batch_size]; see Lengths for LAST_PAGE_LENGTHS
  const int* query_lens;                      // [batch_size] or null; see Output
  const float* sinks;                         // [num_kv_heads * GROUP_SIZE] (SINKS); see Output
  half_type* out;                             // [batch_size, QUERY_TOKENS, num_kv_heads * GROUP_SIZE, V_DIM]
  float* lse;                                 // [batch_size, QUERY_TOKENS, num_kv_heads * GROUP_SIZE]
  Slot* partials;                             // the workspace; each kernel says how it is laid out
  long long k_page_stride, v_page_stride;     // elements
  int k_head_stride, k_token_stride, v_head_stride, v_token_stride;
  int batch_size, num_kv_heads, table_stride, num_pages;
  int window;                                 // tokens that a query token sees, itself among them (WINDOWED)
  float scale, cap;                           // see weigh() in weights.cuh
#if CACHE_TYPE
  const float *k_scales, *v_scales;           // [1] each or null; with CACHE_SCALES by the strides, see PagedScales
  long long scale_page_stride;                // elements
  int scale_head_stride, scale_token_stride;
  float v_scale;                              // V's, where v_scales is null
#endif
#if TABLE_CSR
  const int* row_begins;                      // [batch_size + 1]; see PageTable
#endif
#if SELECTED
  const int* selected_pages;                  // [batch_size, num_kv_heads / HEAD_SPLIT, max_selected]; see PageLists
  const int* selected_counts;                 // [batch_size, num_kv_heads / HEAD_SPLIT]
  int max_selected;
#endif
#if PAGE_LSE
  // [batch_size, num_kv_heads / HEAD_SPLIT, page_lse_tiles, QUERY_TOKENS, HEAD_SPLIT * GROUP_SIZE]
  float* page_lse;
  int page_lse_tiles;
#endif

  // A window reaches back from the first query token, lengths count to the last.
  __device__ __forceinline__ int reach() const { return window + QUERY_TOKENS - 1; }
};
#endif

#if RANKS
struct Inbox;

// What a rank of several is given beside them (several.cu).
struct RankArguments {
  Inbox* const* inboxes;                      // [RANKS] every rank's, where this one reaches them
  Inbox* own;                                 // this rank's
  unsigned* failure;                          // [1] where the host looks: the rank that was waited for in vain
  long long half_slots;                       // of each half of an inbox
  long long patience_ns;                      // how long a rank is waited for
  int rank, owner;                            // owner: see Owner
  int in_kernel;                              // 0: states are left in `own`, and the host exchanges and merges them
  int same_gpu;                               // all ranks share this GPU, and each has as many CTAs
  int share_begin, share_tokens, share_cycle; // see RankShare
  int share_magic, share_shift;
};
#endif

#ifdef SCORING
#if SUMMARY_CODES
typedef unsigned char summary_type;
#else
typedef half_type summary_type;
#endif

// pkv_select_pages's arguments; select.cu has the shapes of those that are not said here.
struct SelectArguments {
  const half_type* q;
  const summary_type* summaries;
  const float2* summary_scales;               // of both vectors (SUMMARY_CODES)
  const page_id* page_ids;                    // as DecodeArguments has them
  const int *lengths, *row_begins;
  float* scores;
  float2* sums;
  int* tickets;
  const int* budgets;
  int *pages, *counts;
  int batch_size, num_kv_heads, table_stride, num_pages;
  int max_tokens;                             // that a row of the table has room for
  int max_selected, score_stride;
  int chunk_pages;                            // that a CTA scores, a multiple of BLOCK_PAGES
  int sink_pages, recent_pages, least_pages;
  int parts;                                  // of 2^16, of a row's pages
  float scale;                                // of the logits
};

// pkv_summarize_pages's arguments. Strides are in elements.
struct SummaryArguments {
  const half_type* k_pages;                   // [num_pages, num_kv_heads, PAGE_SIZE, HEAD_DIM]
  summary_type* summaries;                    // [num_pages, num_kv_heads, 2, HEAD_DIM]
  float2* summary_scales;                     // [num_pages, num_kv_heads], of both vectors (SUMMARY_CODES)
  const page_id* page_ids;                    // as DecodeArguments has them
  const int *lengths, *row_begins;
  long long k_page_stride;
  int k_head_stride, k_token_stride;
  int batch_size, num_kv_heads, table_stride, num_pages;
  int max_tokens;                             // that a row of the table has room for
  int new_tokens;                             // of each row, its last ones, whose pages are summarised
};
#endif

#ifdef HEAD_DIM_V
// pkv_append's arguments. Strides are in elements.
struct AppendArguments {
  const half_type *k_new, *v_new;             // [num_tokens, num_kv_heads, HEAD_DIM or HEAD_DIM_V] by strides
  const half_type* q;                         // [num_tokens, num_q_heads, HEAD_DIM] by strides, or null
  half_type* q_out;                           // the same, may be q itself
  cache_type *k_pages, *v_pages;              // [num_pages] x heads x tokens x dim by strides
  float *k_scales, *v_scales;                 // INT8: of each token and head by strides, written; FP8: [1] or null
  const int* seq_lens;                        // [batch_size], the tokens that are appended counted in
  const int* block_table;                     // [batch_size, table_stride]
  const int* token_offsets;                   // [batch_size + 1], or null: token i is row i's
  const void* rope;                           // ROPE_TABLE: [max_positions, ROTARY_DIM] float, cosines then sines; else
                                              // [ROTARY_DIM / 2] uint64, a pair's turns per position, times 2^64
  int num_tokens, batch_size, num_kv_heads, num_q_heads, page_size, num_pages;
  int max_pages;                              // of a row of the block table
  int max_positions;                          // that the rope serves
  int chunks;                                 // warps that share a token
  long long table_stride, rope_stride;        // from row to row
  long long k_token, k_head, v_token, v_head, q_token, q_head, q_out_token, q_out_head;
  long long k_page, k_page_head, k_page_token, v_page, v_page_head, v_page_token;
  long long scale_page, scale_head, scale_token;
  float rope_factor;                          // of cosines and sines that are worked out here
  float k_scale, v_scale;                     // FP8: where k_scales or v_scales is null
};
#endif

}  // namespace pkv
