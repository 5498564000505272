// Products of more than a few tokens with packed weights: a strip of the weight's rows is decoded into bfloat16, a
// chunk of its columns at a time, and multiplied with all tokens while it lies in the first cache.
//
// Weights are rounded to bfloat16 once, as a dense weight would be; sums are float32. Values below float32's smallest
// normal number count as zeros, as the instructions have it. Codes of 4 bits are looked up: a vector of 16-bit words
// holds a block of 128 weights, weight 4 j + s of it in the s-th four bits of word j, so that step s gives the weights
// s, 4 + s, 8 + s, ...; the inputs are laid in that order once a call. A table in registers has the sixteen values of
// each of two quarters of a block (32 weights, which share a scale) or of its halves, rounded once. What has other widths or groups is
// decoded value by value. A row is summed in one order, whatever the rows beside it, the tokens and the threads.
#pragma once

#include "codes.h"

namespace {

const int64_t CHUNK = 512;            // weights of a row that are decoded at a time
const int64_t STEP = 32;              // and that one instruction multiplies
const int64_t QUARTERS = CHUNK / 32;  // of blocks, in a chunk
const int64_t STRIP = 16;             // rows of a tile, and tokens of one

inline int64_t whole_blocks(int64_t columns) { return (columns + 127) / 128 * 128; }
inline int64_t whole_tokens(int64_t tokens) { return (tokens + 15) / 16 * 16; }

// Whether codes are looked up, and inputs lie in the order of the look-ups.
inline bool has_quarters(const Job *job) { return job->bits == 4 && (job->size % 32 == 0 || job->size == job->columns); }

// Where step `step`'s inputs of a token lie, in pairs of values, each followed by those of the tile's other tokens.
inline uint16_t *laid_inputs(const Job *job, int64_t step, int64_t token) {
    return job->laid + (step * whole_tokens(job->tokens) + token / 16 * 16) * STEP + token % 16 * 2;
}
const int64_t PAIR = 32;  // values from a pair to the token's next

// Units: tokens. Lays the inputs, in room that holds zeros.
int lay_tiles(const Job *job, int64_t begin, int64_t end) {
    const int64_t columns = job->columns;
    const bool turned = has_quarters(job);
    for (int64_t token = begin; token < end; token++) {
        const uint16_t *x = (const uint16_t *)job->x + token * columns;
        for (int64_t block = 0; block < columns; block += 128) {
            uint16_t values[128] = {0}, order[128];
            memcpy(values, x + block, (size_t)(columns - block < 128 ? columns - block : 128) * 2);
            const uint16_t *from = values;
            if (turned) {
                for (int s = 0; s < 4; s++)
                    for (int j = 0; j < 32; j++) order[s * 32 + j] = values[4 * j + s];
                from = order;
            }
            for (int64_t step = 0; step < 4; step++) {
                uint16_t *to = laid_inputs(job, block / STEP + step, token);
                for (int64_t pair = 0; pair < STEP / 2; pair++) memcpy(to + pair * PAIR, from + step * STEP + 2 * pair, 4);
            }
        }
    }
    return DONE;
}

// A chunk of a row's weights, value by value.
inline void decode_plain(const Job *job, int64_t row, int64_t start, int64_t count, float *weights) {
    const int64_t size = job->size, groups = job->columns / size;
    uint8_t codes[CHUNK];
    unpack_codes(job->codes + row * job->row_bytes + start * job->bits / 8, count, job->bits, codes);
    for (int64_t i = 0, last; i < count; i = last) {
        const int64_t group = (start + i) / size, place = job->shared ? 0 : row * groups + group;
        last = (group + 1) * size - start < count ? (group + 1) * size - start : count;
        const float scale = load_scale(job->scale, job->scale_type, place);
        if (job->levels) {
            for (int64_t k = i; k < last; k++) weights[k] = job->levels[codes[k] & 15] * scale;
        } else {
            const float zero = job->zero ? (float)job->zero[place] : -(float)job->qmin;
            for (int64_t k = i; k < last; k++) weights[k] = ((float)codes[k] - zero) * scale;
        }
    }
}

// The sixteen values that a code stands for, in each of a chunk's quarters: (levels - zero) * scale.
struct Quarters {
    __m512 levels;
    __m512i of;       // a quarter's group, counted from the chunk's first
    int64_t first, groups;

    inline Quarters(const Job *job, int64_t start, int64_t count) {
        float codes[16];
        for (int code = 0; code < 16; code++) codes[code] = job->levels ? job->levels[code] : (float)code;
        levels = _mm512_loadu_ps(codes);
        int32_t places[QUARTERS] = {0};
        first = job->shared ? 0 : start / job->size;
        groups = job->shared ? 1 : (start + count - 1) / job->size + 1 - first;
        for (int64_t i = 0; i * 32 < count && !job->shared; i++) places[i] = (int32_t)((start + i * 32) / job->size - first);
        of = _mm512_loadu_si512(places);
    }

    // Scales and zero points of a row's quarters.
    inline void settle(const Job *job, int64_t row, float *scales, float *zeros) const {
        float held[QUARTERS] = {0};
        const int64_t place = job->shared ? 0 : row * (job->columns / job->size) + first;
        load_scales(job->scale, job->scale_type, place, groups, held);
        _mm512_store_ps(scales, _mm512_permutexvar_ps(of, _mm512_loadu_ps(held)));
        if (job->zero) {
            const __mmask16 those = (__mmask16)((1u << groups) - 1);
            const __m512i found = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(those, job->zero + place));
            _mm512_store_ps(zeros, _mm512_permutexvar_ps(of, _mm512_cvtepi32_ps(found)));
        } else {
            _mm512_store_ps(zeros, _mm512_set1_ps(job->levels ? 0.0f : -(float)job->qmin));
        }
    }

    inline __m512 values(float scale, float zero) const {
        return _mm512_mul_ps(_mm512_sub_ps(levels, _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
    }
};

// `count` weights of a row from `start` on, by steps `apart` values from each other; those past them meet inputs of zero.
// HALVES: of a block have one scale.
template <bool HALVES>
inline void decode_quarters(const Job *job, const Quarters &quarters, int64_t row, int64_t start, int64_t count,
                            uint16_t *to, int64_t apart) {
    alignas(64) float scales[QUARTERS], zeros[QUARTERS];
    quarters.settle(job, row, scales, zeros);
    const uint8_t *packed = job->codes + row * job->row_bytes + start / 2;
    // Four bits of a word say which of sixteen values; a fifth, which of two quarters or halves.
    const __m512i four = _mm512_set1_epi16(15);
    const __m512i fifth = HALVES ? _mm512_maskz_set1_epi16(0xFFFF0000u, 16) : _mm512_maskz_set1_epi16(0xFF00FF00u, 16);
    for (int64_t block = 0; block < count; block += 128) {
        const int64_t bytes = (count - block + 1) / 2;
        const __mmask64 those = bytes < 64 ? (1ull << bytes) - 1 : ~0ull;
        const __m512i words = _mm512_maskz_loadu_epi8(those, packed + block / 2);
        __builtin_prefetch(packed + block / 2 + AHEAD);
        const float *scale = scales + block / 32, *zero = zeros + block / 32;
        const int other = HALVES ? 2 : 1;
        const __m512 one = quarters.values(scale[0], zero[0]), two = quarters.values(scale[other], zero[other]);
        const __m512i front = (__m512i)_mm512_cvtne2ps_pbh(two, one);
        __m512i back = front;
        if (!HALVES) {
            const __m512 three = quarters.values(scale[2], zero[2]), last = quarters.values(scale[3], zero[3]);
            back = (__m512i)_mm512_cvtne2ps_pbh(last, three);
        }
        uint16_t *into = to + block / STEP * apart;
#pragma GCC unroll 4
        for (int step = 0; step < 4; step++) {
            const __m512i shifted = _mm512_srli_epi16(words, (unsigned)(4 * step));
            const __m512i at = _mm512_ternarylogic_epi32(shifted, four, fifth, 0xEA);  // (shifted & four) | fifth
            __m512i values = _mm512_permutexvar_epi16(at, front);
            if (!HALVES) values = _mm512_mask_permutexvar_epi16(values, 0xFFFF0000u, at, back);
            _mm512_store_si512(into + step * apart, values);
        }
    }
}

// The same for codes of 8 bits, in the order of the columns.
inline void decode_bytes(const Job *job, const Quarters &quarters, int64_t row, int64_t start, int64_t count,
                         uint16_t *to, int64_t apart) {
    alignas(64) float scales[QUARTERS], zeros[QUARTERS];
    quarters.settle(job, row, scales, zeros);
    const uint8_t *codes = job->codes + row * job->row_bytes + start;
    for (int64_t i = 0; i < count; i += STEP) {
        const __mmask32 those = count - i < STEP ? (__mmask32)((1ull << (count - i)) - 1) : 0xFFFFFFFFu;
        const __m256i bytes = _mm256_maskz_loadu_epi8(those, codes + i);
        const __m512 scale = _mm512_set1_ps(scales[i / 32]), zero = _mm512_set1_ps(zeros[i / 32]);
        const __m512 one = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_castsi256_si128(bytes)));
        const __m512 other = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_extracti128_si256(bytes, 1)));
        const __m512i values = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(_mm512_sub_ps(other, zero), scale),
                                                           _mm512_mul_ps(_mm512_sub_ps(one, zero), scale));
        __builtin_prefetch(codes + i + AHEAD);
        _mm512_store_si512(to + i / STEP * apart, values);
    }
}

inline void decode_others(const Job *job, int64_t row, int64_t start, int64_t count, uint16_t *to, int64_t apart) {
    float weights[CHUNK + STEP] = {0};
    decode_plain(job, row, start, count, weights);
    for (int64_t i = 0; i < count; i += STEP) {
        const __m512 one = _mm512_loadu_ps(weights + i), other = _mm512_loadu_ps(weights + i + 16);
        _mm512_store_si512(to + i / STEP * apart, (__m512i)_mm512_cvtne2ps_pbh(other, one));
    }
}

// A chunk of a strip: step by step, and in a step row by row. Rows past `rows` stay as they are.
void decode_strip(const Job *job, int64_t row, int64_t rows, int64_t start, int64_t count, uint16_t *to) {
    const bool wide = job->size % 32 == 0 || job->size == job->columns;
    const bool halves = job->size % 64 == 0 || job->size == job->columns;
    const Quarters quarters(job, start, wide ? count : 1);
    for (int64_t r = 0; r < rows; r++) {
        uint16_t *mine = to + r * STEP;
        if (halves && job->bits == 4) decode_quarters<true>(job, quarters, row + r, start, count, mine, STRIP * STEP);
        else if (wide && job->bits == 4) decode_quarters<false>(job, quarters, row + r, start, count, mine, STRIP * STEP);
        else if (wide && job->bits == 8) decode_bytes(job, quarters, row + r, start, count, mine, STRIP * STEP);
        else decode_others(job, row + r, start, count, mine, STRIP * STEP);
    }
}

inline float bias_of(const Job *job, int64_t row) {
    return job->bias ? BFloat16::load(((const uint16_t *)job->bias)[row]) : 0.0f;
}

// Palette 1: what each of the eight tiles holds. Sums lie in the first four, weights in the next, inputs in one more.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {0};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
};

// 16 rows of weights with 16 GROUPS tokens.
template <int GROUPS> void strip_by_tiles(const Job *job, int64_t row, int64_t rows, uint16_t *weights) {
    const int64_t columns = job->columns, step_values = GROUPS * 16 * STEP;
    _tile_zero(0);
    if (GROUPS > 1) _tile_zero(1);
    if (GROUPS > 2) _tile_zero(2);
    if (GROUPS > 3) _tile_zero(3);
    for (int64_t start = 0; start < columns; start += CHUNK) {
        const int64_t count = columns - start < CHUNK ? columns - start : CHUNK;
        decode_strip(job, row, rows, start, count, weights);
        const uint16_t *x = job->laid + start / STEP * step_values;
        for (int64_t step = 0; step * STEP < whole_blocks(count); step++, x += step_values) {
            _tile_loadd(4, weights + step * STRIP * STEP, 64);
            _tile_loadd(5, x, 64);
            _tile_dpbf16ps(0, 4, 5);
            if (GROUPS > 1) {
                _tile_loadd(5, x + 16 * STEP, 64);
                _tile_dpbf16ps(1, 4, 5);
            }
            if (GROUPS > 2) {
                _tile_loadd(5, x + 32 * STEP, 64);
                _tile_dpbf16ps(2, 4, 5);
            }
            if (GROUPS > 3) {
                _tile_loadd(5, x + 48 * STEP, 64);
                _tile_dpbf16ps(3, 4, 5);
            }
        }
    }
    alignas(64) float sums[GROUPS][256], bias[16] = {0};
    _tile_stored(0, sums[0], 64);
    if (GROUPS > 1) _tile_stored(1, sums[GROUPS > 1 ? 1 : 0], 64);
    if (GROUPS > 2) _tile_stored(2, sums[GROUPS > 2 ? 2 : 0], 64);
    if (GROUPS > 3) _tile_stored(3, sums[GROUPS > 3 ? 3 : 0], 64);
    for (int64_t r = 0; r < rows; r++) bias[r] = bias_of(job, row + r);
    const __mmask16 those = (__mmask16)((1u << rows) - 1);
    const __m512i places = _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 4);
    for (int64_t token = 0; token < job->tokens; token++) {
        const __m512 found = _mm512_i32gather_ps(places, sums[token / 16] + token % 16, 4);
        const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(found, _mm512_load_ps(bias)));
        _mm256_mask_storeu_epi16((uint16_t *)job->y + token * job->rows + row, those, rounded);
    }
}

// Units: rows of the weight.
int tiles(const Job *job, int64_t begin, int64_t end) {
    alignas(64) uint16_t weights[STRIP * CHUNK] = {0};
    const TileShapes shapes;
    _tile_loadconfig(&shapes);
    for (int64_t row = begin; row < end; row += STRIP) {
        const int64_t rows = end - row < STRIP ? end - row : STRIP;
        switch (whole_tokens(job->tokens) / 16) {
            case 1: strip_by_tiles<1>(job, row, rows, weights); break;
            case 2: strip_by_tiles<2>(job, row, rows, weights); break;
            case 3: strip_by_tiles<3>(job, row, rows, weights); break;
            default: strip_by_tiles<4>(job, row, rows, weights); break;
        }
    }
    _tile_release();
    return DONE;
}

}  // namespace
