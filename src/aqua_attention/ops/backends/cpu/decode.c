// SPDX-License-Identifier: Apache-2.0
// One decoding attention step on a CPU, reading only the chosen dimensions of the keys; see step.py and decode.py.
// Keys and values lie as in TiledCache: tiles of TILE tokens by dimension, a ring of two tiles by token behind them.
#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

#define TILE 128
#define MOST_DIMS 256
#define MOST_HEADS 16 // of a group at once

enum { MAGNITUDE, WEIGHTED, STATIC };

typedef struct {
    const void *query, *key, *value; // new tokens: [rows, group, wide], [rows, wide], [rows, value_dims]
    const float *rotation, *rms;     // [rows_each, wide, dims], [rows_each, dims]
    void *tiles;                     // [rows, tiles_each, dims, TILE]
    void *tail;                      // [rows, 2 * TILE, dims]
    void *values;                    // [rows, tiles_each * TILE, value_dims]
    int32_t *lengths;                // [rows / rows_each], one more after the new tokens
    void *rotated;                   // queries that keys are multiplied with, [rows, group, dims]
    int32_t *chosen, *counts;        // [rows, most], and [rows] or NULL: all of `most`
    uint8_t *mask;                   // [rows, dims], 1 for the chosen
    void *output;                    // [rows, group, value_dims]
    float *sums;                     // [rows, parts, group, value_dims], not yet divided
    float *largest, *total;          // [rows, parts, group]
    int64_t rows, rows_each, group, wide, dims, value_dims, tiles_each;
    int64_t selection, squared, adaptive;
    // Dimensions to choose: `count`, or all in sequences of fewer tokens than min_length; 0: `chosen` is given.
    int64_t most, count, min_length;
    int64_t rotated_from; // keys of sequences of fewer tokens are as they came
    int64_t sink, recent, parts;
    float scaling, logit_error;
} Step;

// Dimensions by falling size; of equal ones the first, and a NaN is largest. As many as `count`, or as few as the
// expected error allows: dropping one costs its own and that of all behind it. Of a sequence too short to choose, all.
static void choose(const Step *given, int64_t row, int is_short, const float *sizes, const float *errors) {
    int64_t dims = given->dims, count = given->count;
    int32_t keys[MOST_DIMS], ranks[MOST_DIMS], *chosen = given->chosen + row * given->most, order[MOST_DIMS];
    if (is_short) {
        for (int64_t d = 0; d < dims; d++) chosen[d] = (int32_t)d, given->mask[row * dims + d] = 1;
        given->counts[row] = (int32_t)dims;
        return;
    }
    for (int64_t d = 0; d < dims; d++) {
        // Floats that are not negative have the order of their bits.
        memcpy(&keys[d], &sizes[d], sizeof(keys[d]));
        keys[d] = given->selection == STATIC ? (int32_t)(dims - d) : sizes[d] != sizes[d] ? INT32_MAX : keys[d];
        ranks[d] = 0;
    }
    for (int64_t i = 0; i < dims; i++) {
#pragma omp simd
        for (int64_t d = 0; d < dims; d++) ranks[d] += keys[i] > keys[d] || (keys[i] == keys[d] && i < d);
    }
    for (int64_t d = 0; d < dims; d++) order[ranks[d]] = (int32_t)d;
    if (given->adaptive) {
        float left = 0.0f;
        for (; count > 1; count--) {
            left += errors[order[count - 1]];
            if (!(left <= given->logit_error)) break;
        }
    }
    if (given->counts) given->counts[row] = (int32_t)count;
    memcpy(chosen, order, (size_t)count * sizeof(*chosen));
    for (int64_t d = 0; d < dims; d++) given->mask[row * dims + d] = ranks[d] < count;
}

// e to the power of x, for x of at most 0, to a few units in the last place; a NaN stays one. Compilers vectorise it.
static inline float exponential(float x) {
    float scaled = x * 1.44269504f;
    scaled = scaled < -126.0f ? -126.0f : scaled;
    // Adding and subtracting 1.5 * 2^23 rounds, and leaves the whole number in the low bits.
    float shifted = scaled + 12582912.0f, whole = shifted - 12582912.0f, rest = scaled - whole;
    float power = 1.0f + rest * (0.693147181f + rest * (0.240226507f + rest * (0.0555041087f +
                  rest * (0.00961812911f + rest * (0.00133335581f + rest * 0.000154035304f)))));
    int32_t bits;
    memcpy(&bits, &shifted, sizeof(bits));
    bits = (int32_t)((uint32_t)(bits + 127) << 23);
    float two;
    memcpy(&two, &bits, sizeof(two));
    return power * (x < -87.0f ? 0.0f : two);
}

// Sixteen numbers in as many registers as it takes.
#define LANES 16
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef float HalfLanes __attribute__((vector_size(LANES / 2 * sizeof(float))));
typedef float FewLanes __attribute__((vector_size(LANES / 4 * sizeof(float))));
typedef uint16_t Halves __attribute__((vector_size(LANES * sizeof(uint16_t))));
typedef uint32_t Words __attribute__((vector_size(LANES * sizeof(uint32_t))));

static inline Lanes load_float32(const float *numbers) {
    Lanes wide;
    memcpy(&wide, numbers, sizeof(wide));
    return wide;
}
static inline Lanes load_bfloat16(const uint16_t *numbers) {
    Halves halves;
    memcpy(&halves, numbers, sizeof(halves));
    return (Lanes)(__builtin_convertvector(halves, Words) << 16);
}

// Compilers would widen them one by one.
static inline Lanes load_codes(const int8_t *numbers) {
    Lanes wide;
#if defined(__AVX512F__)
    __m512 all = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)numbers)));
    memcpy(&wide, &all, sizeof(wide));
#elif defined(__AVX2__)
    for (int half = 0; half < 2; half++) {
        __m128i some = _mm_loadl_epi64((const __m128i *)(numbers + half * LANES / 2));
        __m256 all = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(some));
        memcpy((char *)&wide + half * sizeof(all), &all, sizeof(all));
    }
#else
    for (int i = 0; i < LANES; i++) wide[i] = (float)numbers[i];
#endif
    return wide;
}
static inline HalfLanes halved(Lanes wide) {
    HalfLanes halves[2];
    memcpy(halves, &wide, sizeof(wide));
    return halves[0] + halves[1];
}

// What the lanes of each sum up to. Compilers would add them one by one.
static inline FewLanes four_totals(HalfLanes a, HalfLanes b, HalfLanes c, HalfLanes d) {
    FewLanes totals;
#ifdef __AVX__
    __m256 both = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
    __m128 sums = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    memcpy(&totals, &sums, sizeof(totals));
#else
    HalfLanes all[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++) {
        FewLanes quarters[2];
        memcpy(quarters, &all[i], sizeof(all[i]));
        quarters[0] += quarters[1];
        totals[i] = (quarters[0][0] + quarters[0][1]) + (quarters[0][2] + quarters[0][3]);
    }
#endif
    return totals;
}

// An online softmax over `count` more scores of each head, which become weights, with zeros up to a multiple of four.
static inline void soften(int heads, int count, float scores[][TILE], int64_t width, float sums[][MOST_DIMS],
                          float *largest, float *total) {
    for (int h = 0; h < heads; h++) {
        float *score = scores[h], top = largest[h], added = 0.0f;
#pragma omp simd reduction(max : top)
        for (int t = 0; t < count; t++) top = score[t] > top ? score[t] : top;
        float safe = top == -INFINITY ? 0.0f : top;
#pragma omp simd
        for (int t = 0; t < count; t++) score[t] = exponential(score[t] - safe);
#pragma omp simd reduction(+ : added)
        for (int t = 0; t < count; t++) added += score[t];
        float shrink = exponential(largest[h] - safe);
        total[h] = total[h] * shrink + added;
        largest[h] = top;
        for (int64_t d = 0; d < width; d++) sums[h][d] *= shrink;
        for (int t = count; t < (count + 3) / 4 * 4; t++) score[t] = 0.0f;
    }
}

static inline float same(float number) { return number; }
static inline float from_bfloat16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float wide;
    memcpy(&wide, &bits, sizeof(wide));
    return wide;
}
static inline uint16_t to_bfloat16(float number) {
    uint32_t bits;
    memcpy(&bits, &number, sizeof(bits));
    // To the nearest, of two equally near ones to the even; a NaN must not become an infinity.
    return number != number ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// So many bytes ahead of use memory is asked for what will be read, into the second cache: where rows lie here and
// there, a processor does not guess them.
#define AHEAD 8192
static inline void fetch(const void *from, size_t bytes) {
    for (size_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch((const char *)from + byte, 0, 2);
}

#ifdef __AVX512F__
#define AT_ONCE 4 // chosen keys that are multiplied together, as many as registers hold
#else
#define AT_ONCE 2
#endif

#include "choose.inc"
#include "scores.inc"

#define NUMBER float
#define WIDE same
#define NARROW same
#define NAME(function) function##_float32
#include "prepare.inc"
#include "decode.inc"
#include "select.inc"
#undef NUMBER
#undef WIDE
#undef NARROW
#undef NAME

#define NUMBER uint16_t
#define WIDE from_bfloat16
#define NARROW to_bfloat16
#define NAME(function) function##_bfloat16
#include "prepare.inc"
#include "decode.inc"
#include "select.inc"
