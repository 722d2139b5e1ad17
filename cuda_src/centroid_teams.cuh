// Centroids of the keys of pages of no more than 16 tokens, by all warps of a CTA together; centroid_summaries.cuh has
// what they are, and makes those of larger pages.
//
// An append touches one or two pages of a row, so that a step is over when the steps of one page are that wait for one
// another, and few of the CTA's warps would have a page of their own. Three phases, with the CTA's threads meeting in
// between, in which each page is cut in as many parts as there are warps:
//   measure   all distances between the page's tokens: warp w has those of tokens 2 w and 2 w + 1
//   split     the traversal, which needs nothing but distances: a warp for each page, a lane for each token
//   write     warp w has centroid w
// Distances are sums of squared differences. A product of the keys with themselves would give them by tensor cores, as
// |x|^2 + |y|^2 - 2 x.y: a small difference of large numbers wherever keys are far from the origin, as biases of K's
// projection bring them. Keys less one of them, or less their mean, are far from it again where one token stands alone.
#pragma once
#include "centroid_summaries.cuh"

namespace pkv {

constexpr int CIRCLE = 16;                   // places of tokens, after the last of which the first one follows
constexpr int NEAR = CIRCLE / 2;             // a token's distances to so many after it are measured where it is
constexpr int OWN_ELEMENTS = HEAD_DIM / 32;  // of a key, that a lane reads
constexpr int TOKENS_AT_ONCE = 4;            // of a part, that are on their way

static_assert(PAGE_SIZE <= CIRCLE && WARPS == NEAR && WARPS == PAGE_CENTROIDS, "a warp has two tokens and a centroid");

struct PageNotes {
  float distances[CIRCLE][CIRCLE];  // squared; a token's to itself is left out
  int parts[CIRCLE];
};

struct __align__(2 * OWN_ELEMENTS) KeyWords {
  unsigned of[OWN_ELEMENTS / 2];
};

// A page's keys, of which the row has `tokens`, as a lane sees them.
struct PageKeys {
  const unsigned char* own;  // this lane's elements of the first token
  unsigned token_bytes;      // from a token to the next
  int tokens;

  __device__ __forceinline__ PageKeys(const half_type* page, int token_stride, int tokens, int lane)
      : own(reinterpret_cast<const unsigned char*>(page + lane * OWN_ELEMENTS)),
        token_bytes(2 * static_cast<unsigned>(token_stride)), tokens(tokens) {}

  // An address is one instruction, a product of 32 bits by 32.
  __device__ __forceinline__ KeyWords load(unsigned token) const {
    return *reinterpret_cast<const KeyWords*>(own + static_cast<unsigned long long>(token) * token_bytes);
  }
  __device__ __forceinline__ static void widen(float (&to)[OWN_ELEMENTS], const KeyWords& from) {
    #pragma unroll
    for (int i = 0; i < OWN_ELEMENTS / 2; ++i) {
      const float2 pair = unpack(from.of[i]);
      to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
    }
  }

  // Each of all pairs of tokens is at most NEAR apart in one direction of the circle.
  __device__ __forceinline__ void measure(PageNotes& notes, int warp, int lane) const {
    const int first = 2 * warp;
    if (first >= tokens) return;
    KeyWords words[NEAR + 2];
    #pragma unroll
    for (int i = 0; i < NEAR + 2; ++i) words[i] = load(min((first + i) % CIRCLE, tokens - 1));
    float sums[2 * NEAR], x[2][OWN_ELEMENTS], y[OWN_ELEMENTS];
    widen(x[0], words[0]), widen(x[1], words[1]);
    #pragma unroll
    for (int i = 1; i < NEAR + 2; ++i) {
      widen(y, words[i]);
      #pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (i - j < 1 || i - j > NEAR) continue;
        float sum = 0.0f;
        #pragma unroll
        for (int k = 0; k < OWN_ELEMENTS; ++k) sum += (x[j][k] - y[k]) * (x[j][k] - y[k]);
        sums[NEAR * j + i - j - 1] = sum;
      }
    }
    keep_half<NEAR>(sums, lane);
    sums[0] += __shfl_xor_sync(0xffffffffu, sums[0], 1);
    const int token = first + lane / 2 / NEAR, apart = 1 + lane / 2 % NEAR, other = (token + apart) % CIRCLE;
    // Tokens half a circle apart are measured from both.
    if (lane % 2 == 0) notes.distances[token][other] = sums[0];
    else if (apart < NEAR) notes.distances[other][token] = sums[0];
  }

  // The part of every token.
  __device__ __forceinline__ void split(PageNotes& notes, int lane) const {
    float nearest = 3e38f;
    int own = 0, seed = 0;
    #pragma unroll 1
    for (int part = 0;; ++part) {
      const float measured = notes.distances[seed][lane % CIRCLE], distance = lane == seed ? 0.0f : measured;
      if (distance < nearest) nearest = distance, own = part;
      if (part == PAGE_CENTROIDS - 1) break;
      // Numbers that are not negative are in the order of their bits; of equally far tokens the first is the seed.
      const int far = lane < tokens ? __float_as_int(nearest) : -1;
      seed = __ffs(__ballot_sync(0xffffffffu, far == __reduce_max_sync(0xffffffffu, far))) - 1;
    }
    if (lane < tokens) notes.parts[lane] = own;
  }

  // to: [PAGE_CENTROIDS, CENTROID_BYTES]; scales: [PAGE_CENTROIDS] pairs of FP16.
  __device__ __forceinline__ void write(const PageNotes& notes, int centroid, unsigned char* to, unsigned* scales,
                                        int lane) const {
    const bool is_in = lane < tokens && notes.parts[lane % CIRCLE] == centroid;
    unsigned left = __ballot_sync(0xffffffffu, is_in);
    const float count = static_cast<float>(__popc(left));
    float mean[OWN_ELEMENTS];
    #pragma unroll
    for (int i = 0; i < OWN_ELEMENTS; ++i) mean[i] = 0.0f;
    #pragma unroll 1
    while (left) {
      KeyWords words[TOKENS_AT_ONCE];
      #pragma unroll
      for (int j = 0; j < TOKENS_AT_ONCE; ++j, left &= left - 1) {
        words[j] = load(max(__ffs(left) - 1, 0));
        #pragma unroll
        for (int i = 0; i < OWN_ELEMENTS / 2; ++i) words[j].of[i] = left ? words[j].of[i] : 0;
      }
      #pragma unroll
      for (int j = 0; j < TOKENS_AT_ONCE; ++j) {
        float x[OWN_ELEMENTS];
        widen(x, words[j]);
        #pragma unroll
        for (int i = 0; i < OWN_ELEMENTS; ++i) mean[i] += x[i];
      }
    }
    const float share = share_of(count);
    float largest = 0.0f;
    #pragma unroll
    for (int i = 0; i < OWN_ELEMENTS; ++i) mean[i] *= share, largest = fmaxf(largest, fabsf(mean[i]));
    largest = __int_as_float(__reduce_max_sync(0xffffffffu, __float_as_int(largest)));
    const unsigned scale = centroid_scale(largest, count), codes = centroid_codes(mean, scale);
    unsigned char* codes_at = to + centroid * CENTROID_BYTES + lane * (OWN_ELEMENTS / 2);
    if constexpr (OWN_ELEMENTS == 2) *codes_at = static_cast<unsigned char>(codes);
    else if constexpr (OWN_ELEMENTS == 4) *reinterpret_cast<unsigned short*>(codes_at) = codes;
    else *reinterpret_cast<unsigned*>(codes_at) = codes;
    if (lane == 0) scales[centroid] = scale;
  }

 private:
  // Sums over lanes: with each hop a lane keeps half of what it has, until it has sum lane / 2, of half of the lanes.
  template <int KEPT>
  __device__ __forceinline__ static void keep_half(float (&sums)[2 * NEAR], int lane) {
    const bool upper = lane & 2 * KEPT;
    #pragma unroll
    for (int i = 0; i < KEPT; ++i) {
      const float low = sums[i], high = sums[i + KEPT];
      sums[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, 2 * KEPT);
    }
    if constexpr (KEPT > 1) keep_half<KEPT / 2>(sums, lane);
  }
};

}  // namespace pkv
