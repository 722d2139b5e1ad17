// Every compile-time constant (-D) of every kernel, and what follows from them.
//
// A kernel is compiled anew for each set of them, so that a plain step pays nothing for what another variant does. The
// host says them in gpu/kernels/variant.py (KernelConfig), gpu/inputs/block_tables.py (TableLayout) and
// gpu/cache/append_variant.py; the other headers read them here and define none of their own. Those with a default may
// be left out, and are then what the default says.
//
// -D                 values           meaning                                                    who sets it
//
// Attention: balanced.cu, decode.cu, merge.cu
// HEAD_DIM           64 128 192 256   elements of a query and of a K head                        KernelConfig
// V_DIM              64 128 192 256   elements of a V head and of an output; default HEAD_DIM    KernelConfig
// GROUP_SIZE         1 to 128         query heads that a CTA serves at a time                    KernelConfig
// HEAD_SPLIT         divisors of the  the CTAs' heads of the schedule that share one KV head:    KernelConfig
//                    group            a group with too many columns is split into so many
// QUERY_TOKENS       1 or more        query tokens of each row, its last ones; default 1         KernelConfig
// TEAM               1 2 4            warps that share a ring of tiles, each of which serves a   KernelConfig
//                                     part of the columns; default 1
// PAGE_SIZE          1 to 256         tokens of a page                                           KernelConfig
// WARPS              1 to 8           warps of a CTA                                             KernelConfig (table)
// STAGES             1 or more        tiles of K and V in each ring                              KernelConfig (table)
// BUFFERS            1 2              segments whose states can wait in shared memory for their  KernelConfig
//                                     merge while the next segment is computed
// SHARED_BYTES       sizeof           what the host reserves; a static_assert compares it with   KernelConfig
//                    SharedMemory     SharedMemory (attend.cuh)
// SOFT_CAP           0 1              1: logits go through cap * tanh(logit / cap); default 0    KernelConfig
// SINKS              0 1              1: a logit of each query head joins the softmax without a  KernelConfig
//                                     value; default 0
// DTYPE_BF16         0 1              the 16-bit type of queries, outputs and 16-bit pages:      KernelConfig
//                                     0 FP16, 1 BF16                                             and append
// CACHE_TYPE         0 1 2 3          what pages hold: 0 the 16-bit type, 1 FP8 e4m3, 2 FP8      KernelConfig
//                                     e5m2, 3 INT8 (these as value / scale); default 0           and append
// CACHE_SCALES       0 1              8-bit pages: 0 one scale of K and one of V, 1 one of each  KernelConfig
//                                     for every token, which a page's tokens may share; default 0
// Reads for several rows: shared.cu, which takes what balanced.cu takes beside these (but WINDOWED)
// READ_COLUMNS       from 2 rows'     columns that a read serves at most; default 0, where there   KernelConfig
//                                     are no reads
// READ_TEAM          1 2 4 8          TEAM of the warps that work on a read                      KernelConfig
// READ_STAGES        1 or more        STAGES of their rings                                      KernelConfig
// READ_TILES         0 2 4            tiles that a warpgroup of sm_90a multiplies with at once, which   KernelConfig
//                                     divide READ_STAGES; plans are remembered then; default 0:
//                                     reads are multiplied by mma.sync
// READ_SHARED_BYTES  sizeof both      what the host reserves beside the rows' plans (Readers);   KernelConfig
//                                     a static_assert compares it (shared_step.cuh)
// A step of several GPUs: several.cu, which takes what balanced.cu takes beside this (but WINDOWED, LAST_PAGE_LENGTHS
// and more QUERY_TOKENS than 1)
// RANKS              2 to 8           ranks that a row's pages are spread over; default 0: none    gpu/several
// Selected pages: selected.cu, which takes what balanced.cu takes beside these (but WINDOWED)
// SELECTED           0 1              1: each (row, KV head) reads the pages of a list; default  KernelConfig
//                                     0: a row's tokens are all read                             (selected_defines)
// Selecting: select.cu, summaries.cu (beside HEAD_DIM, GROUP_SIZE, PAGE_SIZE, WARPS, 8 or, of select.cu, 16, DTYPE_BF16
// and the tables)
// SCORING            0 1 2 3          0: scores are given; 1: summaries are means and standard   selection_defines
//                                     deviations; 2: minima and maxima (page_scores.cuh); 3: a
//                                     page's keys in 8 parts that are alike, of each the mean
//                                     in 4-bit codes and the count (centroid_scores.cuh)
// AGGREGATION        0 1              over the group's query heads: 0 the largest score, 1 the   selection_defines
//                                     mean of the softmax over pages
// DEVIATIONS         >= 0             of SCORING 1: standard deviations above the mean logit     selection_defines
// SUMMARY_CODES      0 1              1: summaries are codes with scales, of 8 bits, or of 4 of  selection_defines
//                                     SCORING 3, which has no others; default 0
// By-products: balanced.cu, selected.cu
// PAGE_LSE           0 1              1: the log-sum-exp of every tile and query head is         KernelConfig
//                                     written; PAGE_SIZE is a multiple of PKV_TILE; default 0    (selected_defines)
// The plan: balanced.cu, shared.cu and plan.cu (WINDOWED also decode.cu)
// WINDOWED           0 1              1: a row reads its last `window` tokens only; default 0    KernelConfig
// LAST_PAGE_LENGTHS  0 1              1: lengths are told by the rows' pages and the tokens in   TableLayout
//                                     their last ones; default 0
// Page tables: balanced.cu, decode.cu, prefixes.cu (which takes PAGE_SIZE and WARPS, 1 to 16, beside these)
// TABLE_INT64        0 1              1: page ids are int64, not int32; default 0                TableLayout
// TABLE_CSR          0 1              1: the rows' ids lie end to end, and row_begins says       TableLayout
//                                     where each row's begin; default 0: a block table
// Appending: append.cu (beside DTYPE_BF16, CACHE_TYPE and HEAD_DIM, a multiple of 16 up to 512)
// HEAD_DIM_V         16 to 512        elements of a V head                                       append_variant
// ROPE_STYLE         0 1 2            0 none; 1 half: element i turns with i + ROTARY_DIM / 2    append_variant
//                                     (Llama in Hugging Face's order, GPT-NeoX); 2 interleaved:
//                                     element 2 i turns with 2 i + 1 (GPT-J)
// ROPE_TABLE         0 1              1: cosines and sines come from a table                     append_variant
// ROTARY_DIM         0 to HEAD_DIM    leading elements that turn, a multiple of 16               append_variant
// Reading alone: stream.cu
// UNROLL             1 or more        independent 16-byte loads of a thread; default 4           gpu/calibrate
// Every kernel
// PKV_RACECHECK      0 1              1: barriers count every lane, which compute-sanitizer      tests/gpu/sanitize.py
//                                     understands; default 0
// PKV_SOURCE_HASH    hexadecimal      read by nothing: it makes CuPy's cache see edits here      gpu/kernels/compile.py
#pragma once

#ifndef V_DIM
#define V_DIM HEAD_DIM
#endif
#ifndef QUERY_TOKENS
#define QUERY_TOKENS 1
#endif
#ifndef TEAM
#define TEAM 1
#endif
#ifndef SOFT_CAP
#define SOFT_CAP 0
#endif
#ifndef SINKS
#define SINKS 0
#endif
#ifndef CACHE_TYPE
#define CACHE_TYPE 0
#endif
#ifndef CACHE_SCALES
#define CACHE_SCALES 0
#endif
#ifndef WINDOWED
#define WINDOWED 0
#endif
#ifndef LAST_PAGE_LENGTHS
#define LAST_PAGE_LENGTHS 0
#endif
#ifndef READ_COLUMNS
#define READ_COLUMNS 0
#endif
#ifndef RANKS
#define RANKS 0
#endif
#ifndef SELECTED
#define SELECTED 0
#endif
#ifndef PAGE_LSE
#define PAGE_LSE 0
#endif
#ifndef SUMMARY_CODES
#define SUMMARY_CODES 0
#endif
#ifndef READ_TILES
#define READ_TILES 0
#endif
#ifndef TABLE_INT64
#define TABLE_INT64 0
#endif
#ifndef TABLE_CSR
#define TABLE_CSR 0
#endif
#ifndef UNROLL
#define UNROLL 4
#endif
#ifndef PKV_RACECHECK
#define PKV_RACECHECK 0
#endif

// Tokens of a tile, the M of the tensor-core product. It is no -D: gpu/kernels/variant.py has it as TILE_TOKENS.
#define PKV_TILE 16

// Members and arguments that only these variants have, so that the others do not pay for them.
#if TABLE_CSR
#define PKV_CSR(...) __VA_ARGS__
#else
#define PKV_CSR(...)
#endif
#if RANKS
#define PKV_RANKS(...) __VA_ARGS__
#else
#define PKV_RANKS(...)
#endif
#if SELECTED
#define PKV_SELECTED(...) __VA_ARGS__
#else
#define PKV_SELECTED(...)
#endif
#if PAGE_LSE
#define PKV_PAGE_LSE(...) __VA_ARGS__
#else
#define PKV_PAGE_LSE(...)
#endif
#if LAST_PAGE_LENGTHS
#define PKV_LAST_PAGE(...) __VA_ARGS__
#else
#define PKV_LAST_PAGE(...)
#endif

// The operands of the products are FP16 where pages or summaries are 8-bit, whatever the queries are: FP16 holds all
// 8-bit values.
#define FP16_OPERANDS (!DTYPE_BF16 || CACHE_TYPE != 0 || SUMMARY_CODES)
// BF16 queries of FP16 products are scaled: a power of two brings each column's largest magnitude to 2^14, below FP16's
// largest number. What FP16 then cannot hold is 2^-39 of that magnitude.
#define QUERY_SCALED (DTYPE_BF16 && FP16_OPERANDS)
// Whether the GPU has an instruction from e4m3 to FP16; a test says it for the CPU.
#ifndef CONVERTS_E4M3
#define CONVERTS_E4M3 (__CUDA_ARCH__ >= 890)
#endif

#ifdef GROUP_SIZE
namespace pkv {

// What follows for the attention kernels. A column of the product is a query head of the group at one of the row's
// query tokens (place_of in state.cuh).
constexpr int COLUMNS = GROUP_SIZE * QUERY_TOKENS;
constexpr int HEAD_QUADS = V_DIM / 4;                // float4s of a column's accumulator,
constexpr int LANE_QUADS = (HEAD_QUADS + 31) / 32;   // and how many of them a lane of a merging warp holds
#ifdef WARPS
constexpr int THREADS = WARPS * 32;
constexpr int K_STEPS = HEAD_DIM / 16, V_STEPS = V_DIM / 16;  // products of a tile
constexpr int KEYS_AT_ONCE = 4;  // steps of the product whose K is read before the first of them

static_assert(K_STEPS % KEYS_AT_ONCE == 0, "steps are whole");
#endif
#ifdef STAGES
constexpr int ELEMENT_BYTES = CACHE_TYPE ? 1 : 2;
constexpr int K_ROW_BYTES = HEAD_DIM * ELEMENT_BYTES, V_ROW_BYTES = V_DIM * ELEMENT_BYTES;  // of one token
constexpr int K_TILE_BYTES = PKV_TILE * K_ROW_BYTES, V_TILE_BYTES = PKV_TILE * V_ROW_BYTES;
constexpr int SCALE_BYTES = CACHE_SCALES ? PKV_TILE * 2 * 4 : 0;       // of a tile's tokens, K's and V's in turn
constexpr int SLOT_BYTES = K_TILE_BYTES + V_TILE_BYTES + SCALE_BYTES;  // of the ring: a tile's K, V and scales
constexpr bool TILE_IN_PAGE = PAGE_SIZE % PKV_TILE == 0;
constexpr int IDS_TILES = TILE_IN_PAGE ? 32 : 2;  // tiles whose page ids one register of each lane holds
static_assert(CACHE_TYPE != 0 || !CACHE_SCALES, "only 8-bit pages have scales");
#endif

}  // namespace pkv
#endif
