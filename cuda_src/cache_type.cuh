// What the pages of a cache are made of. 8-bit types are stored as value / scale.
#pragma once

#ifndef CACHE_TYPE
#define CACHE_TYPE 0    // 0 the 16-bit type of DTYPE_BF16, 1 FP8 e4m3, 2 FP8 e5m2, 3 INT8
#endif
#ifndef CACHE_SCALES
#define CACHE_SCALES 0  // decode: 0 a scale of K and one of V, 1 one of each for every token, which a page's may share
#endif

// The operands of the products are FP16 where pages are 8-bit, whatever the queries are: it holds all 8-bit values.
#define FP16_OPERANDS (!DTYPE_BF16 || CACHE_TYPE != 0)

namespace pkv {

#if CACHE_TYPE == 0
typedef half_type cache_type;
#else
typedef unsigned char cache_type;
#endif

}  // namespace pkv
