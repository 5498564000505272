// Products of int8 rows with an int8 weight where there are no tiles, by AVX2: int8.h says what for.
//
// Codes are widened to int16, and those of two neighbours in a sum lie beside each other: an instruction multiplies
// both and adds them, in int32, where nothing saturates. (That of 8-bit pairs would: 127 * 255 + 127 * 255 > 32767.)
#pragma once

#include <stdlib.h>

#include "numbers.h"

namespace {

const int64_t PANEL = 32, HALF = 16, DEEP = 256, HIGH = 6, STRETCH_OF_ROWS = 80 * HIGH;
const int64_t FEW = 4;  // rows for which laying the weight out would take longer than multiplying

inline __m256i widened(const int8_t *codes, int64_t left) {  // 16 of them, zeros behind the `left` that there are
    if (left >= 16) return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)codes));
    int8_t padded[16] = {0};
    if (left > 0) memcpy(padded, codes, (size_t)left);
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)padded));
}

// 8 rows of 8 words, turned.
inline void turn_words(__m256i *r) {
    __m256i t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
    }
    for (int i = 0; i < 8; i++) r[i] = t[i];
}

// DEEP of the sum by 32 columns of y: [DEEP / 2, 32, 2], zeros where there is nothing.
inline void lay_panel(const Int8Job *job, int64_t deep, int64_t column, int16_t *panel) {
    const int64_t depth = job->columns - deep < DEEP ? job->columns - deep : DEEP;
    if (!job->back) {  // columns of y are rows of the weight
        for (int64_t k = 0; k < depth; k += 16)
            for (int64_t n = 0; n < PANEL; n += 8) {
                __m256i rows[8];
                for (int64_t i = 0; i < 8; i++) {
                    const int64_t row = column + n + i;
                    rows[i] = row < job->outputs ? widened(job->weight + row * job->weight_stride + deep + k, depth - k)
                                                 : _mm256_setzero_si256();
                }
                turn_words(rows);
                for (int64_t i = 0; i < 8; i++)
                    _mm256_store_si256((__m256i *)(panel + (k / 2 + i) * 2 * PANEL + 2 * n), rows[i]);
            }
        return;
    }
    for (int64_t k = 0; k < depth; k += 2)
        for (int64_t n = 0; n < PANEL; n += HALF) {
            const int8_t *from = job->weight + (deep + k) * job->weight_stride + column + n;
            const int64_t left = job->outputs - column - n;
            const __m256i none = _mm256_setzero_si256();
            const __m256i one = widened(from, left), other = k + 1 < depth ? widened(from + job->weight_stride, left) : none;
            const __m256i low = _mm256_unpacklo_epi16(one, other), high = _mm256_unpackhi_epi16(one, other);
            __m256i *to = (__m256i *)(panel + k * PANEL + 2 * n);
            _mm256_store_si256(to, _mm256_permute2x128_si256(low, high, 0x20));
            _mm256_store_si256(to + 1, _mm256_permute2x128_si256(low, high, 0x31));
        }
}

// 6 rows of x by 16 columns, added to what they came to before.
inline void add_pairs(const int16_t *x, const int16_t *panel, int64_t pairs, int32_t *sums) {
    __m256i left[HIGH], right[HIGH];
#pragma GCC unroll 6
    for (int r = 0; r < HIGH; r++) {
        left[r] = _mm256_loadu_si256((const __m256i *)(sums + r * PANEL));
        right[r] = _mm256_loadu_si256((const __m256i *)(sums + r * PANEL + 8));
    }
    for (int64_t p = 0; p < pairs; p++) {
        const __m256i *from = (const __m256i *)(panel + p * 2 * PANEL);
        __m256i one = _mm256_load_si256(from), other = _mm256_load_si256(from + 1);
        asm("" : "+x"(one), "+x"(other));
#pragma GCC unroll 6
        for (int r = 0; r < HIGH; r++) {
            int32_t both;
            memcpy(&both, x + r * DEEP + 2 * p, 4);
            const __m256i pair = _mm256_set1_epi32(both);
            left[r] = _mm256_add_epi32(left[r], _mm256_madd_epi16(pair, one));
            right[r] = _mm256_add_epi32(right[r], _mm256_madd_epi16(pair, other));
            asm("" : "+x"(left[r]), "+x"(right[r]));
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < HIGH; r++) {
        _mm256_storeu_si256((__m256i *)(sums + r * PANEL), left[r]);
        _mm256_storeu_si256((__m256i *)(sums + r * PANEL + 8), right[r]);
    }
}

// What sums come to: themselves, or times the row's scale, times the column's.
inline void settle(const Int8Job *job, const int32_t *sums, int64_t row, int64_t column, int64_t count) {
    const int64_t place = row * job->y_stride + column;
    if (job->x_type == INT32) {
        memcpy((int32_t *)job->y + place, sums, (size_t)count * 4);
        return;
    }
    const float scale = job->scales[row], *channel = job->channel;
    float y[PANEL];
    for (int64_t i = 0; i < count; i++) y[i] = (float)sums[i] * scale;
    if (channel) for (int64_t i = 0; i < count; i++) y[i] *= channel[column + i];
    if (job->x_type == FLOAT32) memcpy((float *)job->y + place, y, (size_t)count * 4);
    else for (int64_t i = 0; i < count; i++) ((uint16_t *)job->y)[place + i] = bfloat16_of(y[i]);
}

// Columns of y from `begin` to `end` for one to four rows: rows of the weight as they lie.
template <int ROWS> void few_rows(const Int8Job *job, const int16_t *x, int64_t room, int64_t begin, int64_t end) {
    for (int64_t column = begin; column < end; column += PANEL) {
        const int64_t count = end - column < PANEL ? end - column : PANEL;
        int32_t sums[ROWS][PANEL];
        for (int64_t n = 0; n < count; n++) {
            const int8_t *weight = job->weight + (column + n) * job->weight_stride;
            __m256i even[ROWS], odd[ROWS];
            for (int r = 0; r < ROWS; r++) even[r] = odd[r] = _mm256_setzero_si256();
            for (int64_t k = 0; k < job->columns; k += 32) {
                const __m256i one = widened(weight + k, job->columns - k);
                const __m256i other = widened(weight + k + 16, job->columns - k - 16);
                __builtin_prefetch(weight + k + AHEAD);
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; r++) {
                    const __m256i *own = (const __m256i *)(x + r * room + k);
                    even[r] = _mm256_add_epi32(even[r], _mm256_madd_epi16(one, _mm256_loadu_si256(own)));
                    odd[r] = _mm256_add_epi32(odd[r], _mm256_madd_epi16(other, _mm256_loadu_si256(own + 1)));
                }
            }
            for (int r = 0; r < ROWS; r++) {
                const __m256i all = _mm256_add_epi32(even[r], odd[r]);
                const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
                const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
                sums[r][n] = _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xB1)));
            }
        }
        for (int r = 0; r < ROWS; r++) settle(job, sums[r], r, column, count);
    }
}

int few_rows_of(const Int8Job *job, int64_t begin, int64_t end) {
    const int64_t room = (job->columns + 31) / 32 * 32;
    int16_t *x = (int16_t *)aligned_alloc(64, (size_t)(job->rows * room * 2));
    if (!x) return REFUSED;
    for (int64_t row = 0; row < job->rows; row++)
        for (int64_t k = 0; k < room; k += 16)
            _mm256_store_si256((__m256i *)(x + row * room + k), widened(job->codes + row * job->stride + k, job->columns - k));
    switch (job->rows) {
        case 1: few_rows<1>(job, x, room, begin, end); break;
        case 2: few_rows<2>(job, x, room, begin, end); break;
        case 3: few_rows<3>(job, x, room, begin, end); break;
        default: few_rows<4>(job, x, room, begin, end); break;
    }
    free(x);
    return DONE;
}

// Units: panels of 32 columns of y. y[t, n] = scales[t] * channel[n] * sum over k of codes[t, k] * W[n, k], or W[k, n].
int int8_product(const Int8Job *job, int64_t begin, int64_t end) {
    const int64_t last = end * PANEL < job->outputs ? end * PANEL : job->outputs;
    if (!job->back && job->rows <= FEW) return few_rows_of(job, begin * PANEL, last);
    alignas(64) int16_t panel[DEEP * PANEL], x[HIGH * DEEP];
    alignas(64) static thread_local int32_t sums[STRETCH_OF_ROWS * PANEL];
    for (int64_t column = begin * PANEL; column < last; column += PANEL)
        for (int64_t start = 0; start < job->rows; start += STRETCH_OF_ROWS) {
            const int64_t rows = job->rows - start < STRETCH_OF_ROWS ? job->rows - start : STRETCH_OF_ROWS;
            memset(sums, 0, (size_t)((rows + HIGH - 1) / HIGH * HIGH * PANEL) * 4);
            for (int64_t deep = 0; deep < job->columns; deep += DEEP) {
                const int64_t depth = job->columns - deep < DEEP ? job->columns - deep : DEEP, pairs = (depth + 1) / 2;
                lay_panel(job, deep, column, panel);
                for (int64_t row = 0; row < rows; row += HIGH) {
                    for (int64_t r = 0; r < HIGH; r++)
                        for (int64_t k = 0; k < depth; k += 16) {
                            const int8_t *codes = job->codes + (start + row + r) * job->stride + deep + k;
                            const __m256i wide = row + r < rows ? widened(codes, depth - k) : _mm256_setzero_si256();
                            _mm256_store_si256((__m256i *)(x + r * DEEP + k), wide);
                        }
                    add_pairs(x, panel, pairs, sums + row * PANEL);
                    add_pairs(x, panel + 2 * HALF, pairs, sums + row * PANEL + HALF);
                }
            }
            const int64_t count = last - column < PANEL ? last - column : PANEL;
            for (int64_t row = 0; row < rows; row++) settle(job, sums + row * PANEL, start + row, column, count);
        }
    return DONE;
}

}  // namespace
