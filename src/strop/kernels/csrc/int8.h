// Rows rounded to int8 with a scale each, and products of such rows with an int8 weight, summed in int32.
//
// The product is one of tiles (AMX): 32 rows of x by 32 columns of y at a time, 64 deep; with AVX2 alone it is that of
// pairs.h. The weight lies as it is stored, [out, in], for both directions; a panel of it is laid out when its turn
// comes, which is little beside what all rows do with it. Sums are exact, so that nothing depends on the order, nor on
// the threads.
#pragma once

#include <stdlib.h>

#include "numbers.h"

namespace {

const float MOST = 127.0f;
const float LEAST_PEAK = 1e-30f;  // below, a row counts as zeros: its reciprocal would overflow

// FACTORS: whether columns are multiplied first; known to the compiler, or it makes no vectors of the loops.
template <class X, bool FACTORS> int round_rows_of(const Int8Job *job, int64_t begin, int64_t end) {
    const int64_t columns = job->columns;
    const float *__restrict__ factor = job->factor;
    for (int64_t row = begin; row < end; row++) {
        const typename X::Stored *__restrict__ x = (const typename X::Stored *)job->x + row * job->x_stride;
        int8_t *__restrict__ codes = job->codes + row * job->stride;
        int32_t peak = 0;  // of the magnitudes' bits, which are in their order; those of NaN are the largest
        for (int64_t i = 0; i < columns; i++) {
            const float value = FACTORS ? X::load(x[i]) * factor[i] : X::load(x[i]);
            const int32_t magnitude = (int32_t)(bits_of(value) & 0x7FFFFFFF);
            peak = magnitude > peak ? magnitude : peak;
        }
        const float most = float_of((uint32_t)peak);
        const bool zeros = most < LEAST_PEAK;
        job->scales[row] = zeros ? 0 : most / MOST;
        if (zeros || !is_finite(most)) {
            memset(codes, 0, (size_t)job->stride);
            continue;
        }
        const float inverse = MOST / most;
        for (int64_t i = 0; i < columns; i++) {
            const float value = FACTORS ? X::load(x[i]) * factor[i] : X::load(x[i]);
            codes[i] = (int8_t)(int32_t)bits_of(value * inverse + ROUND);  // the sum's low bits are the integer's
        }
        for (int64_t i = columns; i < job->stride; i++) codes[i] = 0;
    }
    return DONE;
}

template <class X> int round_rows_as(const Int8Job *job, int64_t begin, int64_t end) {
    return job->factor ? round_rows_of<X, true>(job, begin, end) : round_rows_of<X, false>(job, begin, end);
}

// Units: rows. codes and scales of x, times `factor` where there is one.
int round_rows(const Int8Job *job, int64_t begin, int64_t end) {
    return job->x_type == FLOAT32 ? round_rows_as<Float32>(job, begin, end) : round_rows_as<BFloat16>(job, begin, end);
}

#ifdef STROP_TILES
#define TILES __attribute__((target("amx-tile,amx-int8")))

const int64_t SIDE = 16, PANEL = 2 * SIDE, DEEP = 64;

struct TileShape {
    uint8_t palette, start, none[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

inline __mmask16 first_of(int64_t count) { return (__mmask16)(count >= 16 ? 0xFFFF : count < 1 ? 0 : (1 << count) - 1); }
inline __mmask64 first_bytes(int64_t count) { return count >= 64 ? ~0ull : count < 1 ? 0 : (1ull << count) - 1; }

// 16 rows of 16 words, turned.
inline void turn_words(__m512i *r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD);
    }
}

// A tile of the weight, 64 of the sum by 16 columns of y from `column` on: [16, 16, 4], zeros where there is nothing.
inline void lay_tile(const Int8Job *job, int64_t deep, int64_t column, int8_t *tile) {
    const int64_t left = job->columns - deep;
    if (!job->back) {  // columns of y are rows of the weight
        __m512i rows[16];
        for (int64_t n = 0; n < SIDE; n++)
            rows[n] = column + n < job->outputs
                          ? _mm512_maskz_loadu_epi8(first_bytes(left), job->weight + (column + n) * job->weight_stride + deep)
                          : _mm512_setzero_si512();
        turn_words(rows);
        for (int64_t k = 0; k < SIDE; k++) _mm512_store_si512(tile + 64 * k, rows[k]);
        return;
    }
    const __mmask16 those = first_of(job->outputs - column);
    for (int64_t k = 0; k < DEEP; k += 4) {
        __m128i r[4];
        for (int64_t i = 0; i < 4; i++)
            r[i] = k + i < left ? _mm_maskz_loadu_epi8(those, job->weight + (deep + k + i) * job->weight_stride + column)
                                : _mm_setzero_si128();
        const __m128i a = _mm_unpacklo_epi8(r[0], r[1]), b = _mm_unpackhi_epi8(r[0], r[1]);
        const __m128i c = _mm_unpacklo_epi8(r[2], r[3]), d = _mm_unpackhi_epi8(r[2], r[3]);
        __m128i *to = (__m128i *)(tile + 16 * k);
        _mm_store_si128(to, _mm_unpacklo_epi16(a, c));
        _mm_store_si128(to + 1, _mm_unpackhi_epi16(a, c));
        _mm_store_si128(to + 2, _mm_unpacklo_epi16(b, d));
        _mm_store_si128(to + 3, _mm_unpackhi_epi16(b, d));
    }
}

// What 32 by 32 sums come to: times the row's scale, times the column's.
inline void settle(const Int8Job *job, const int32_t *sums, int64_t row, int64_t column) {
    for (int64_t r = 0; r < PANEL && row + r < job->rows; r++) {
        const __m512 scale = _mm512_set1_ps(job->scales[row + r]);
        for (int64_t half = 0; half < PANEL; half += SIDE) {
            const __mmask16 those = first_of(job->outputs - column - half);
            __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums + r * PANEL + half)), scale);
            if (job->channel) y = _mm512_mul_ps(y, _mm512_maskz_loadu_ps(those, job->channel + column + half));
            const int64_t place = (row + r) * job->y_stride + column + half;
            if (job->x_type == FLOAT32) {
                _mm512_mask_storeu_ps((float *)job->y + place, those, y);
                continue;
            }
            const __m512i bits = _mm512_castps_si512(y);
            const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
            const __m512i nearest = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
            __m512i stored = _mm512_srli_epi32(nearest, 16);
            stored = _mm512_mask_mov_epi32(stored, _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC0));
            _mm256_mask_storeu_epi16((uint16_t *)job->y + place, those, _mm512_cvtepi32_epi16(stored));
        }
    }
}

// Units: panels of 32 columns of y. y[t, n] = scales[t] * channel[n] * sum over k of codes[t, k] * W[n, k], or W[k, n].
// The codes have room for whole tiles: rows up to a multiple of 32, `stride` a multiple of 64.
TILES int int8_product(const Int8Job *job, int64_t begin, int64_t end) {
    const int64_t blocks = (job->columns + DEEP - 1) / DEEP;
    int8_t *panel = (int8_t *)aligned_alloc(64, (size_t)(blocks * DEEP * PANEL));
    if (!panel) return REFUSED;
    alignas(64) int32_t sums[PANEL * PANEL];
    alignas(64) TileShape before, shape;
    memset(&shape, 0, sizeof shape);
    shape.palette = 1;
    for (int tile = 0; tile < 8; tile++) shape.bytes[tile] = 64, shape.rows[tile] = 16;
    _tile_storeconfig(&before);  // other libraries' tiles are as they were, afterwards
    _tile_loadconfig(&shape);
    for (int64_t place = begin; place < end; place++) {
        const int64_t column = place * PANEL;
        for (int64_t block = 0; block < blocks; block++) {
            lay_tile(job, block * DEEP, column, panel + block * 2048);
            lay_tile(job, block * DEEP, column + SIDE, panel + block * 2048 + 1024);
        }
        for (int64_t row = 0; row < job->rows; row += PANEL) {
            const int8_t *upper = job->codes + row * job->stride, *lower = upper + SIDE * job->stride;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t block = 0; block < blocks; block++) {
                _tile_loadd(4, upper + block * DEEP, job->stride);
                _tile_loadd(6, panel + block * 2048, 64);
                _tile_dpbssd(0, 4, 6);
                _tile_loadd(7, panel + block * 2048 + 1024, 64);
                _tile_dpbssd(1, 4, 7);
                _tile_loadd(5, lower + block * DEEP, job->stride);
                _tile_dpbssd(2, 5, 6);
                _tile_dpbssd(3, 5, 7);
            }
            _tile_stored(0, sums, PANEL * 4);
            _tile_stored(1, sums + SIDE, PANEL * 4);
            _tile_stored(2, sums + SIDE * PANEL, PANEL * 4);
            _tile_stored(3, sums + SIDE * PANEL + SIDE, PANEL * 4);
            settle(job, sums, row, column);
        }
    }
    if (before.palette) _tile_loadconfig(&before);
    else _tile_release();
    free(panel);
    return DONE;
}
#elif !defined(__AVX2__) || defined(__AVX512F__)
int int8_product(const Int8Job *, int64_t, int64_t) { return REFUSED; }
#endif

}  // namespace

#if defined(__AVX2__) && !defined(__AVX512F__)
#include "pairs.h"
#endif
