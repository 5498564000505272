// Tables of 16 levels over blocks of the flattened weight: NF4 and FP4 (numerics/codebook.py); and the gradient's mask.
#pragma once

#include "codes.h"

namespace {

// A block's scale, the largest magnitude, and the reciprocal that its values are multiplied with (codebook.py).
template <class X>
inline int settle_block(const Job *job, const typename X::Stored *x, int64_t count, int64_t block, float &scale) {
    scale = peak_of<X, 0>(x, count);
    if (!is_finite(scale)) return REFUSED;
    if (job->given) scale = ((const float *)job->scale)[block];
    else if (job->scale) ((float *)job->scale)[block] = scale;
    return DONE;
}

inline float relative_to(float x, float reciprocal) {
    float relative = x * reciprocal;
    relative = relative < -1.0f ? -1.0f : relative;
    return relative > 1.0f ? 1.0f : relative;
}

inline float reciprocal_of(float scale) { return 1.0f / (scale < 1e-38f ? 1e-38f : scale); }

inline int64_t values_in(const Job *job, int64_t block) {
    const int64_t left = job->rows * job->columns - block * job->size;
    return left < job->size ? left : job->size;
}

#if defined(__AVX512F__)
// How many of 15 ascending midpoints lie below each of 16 values, by halves.
inline __m512i places_among(const float *values, __m512 midpoints) {
    const __m512 x = _mm512_loadu_ps(values);
    const __m512 seventh = _mm512_permutexvar_ps(_mm512_set1_epi32(7), midpoints);
    __m512i place = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(x, seventh, _CMP_GT_OQ), 8);
#pragma GCC unroll 3
    for (int half = 0; half < 3; half++) {
        const int step = 4 >> half;
        const __m512 middle = _mm512_permutexvar_ps(_mm512_add_epi32(place, _mm512_set1_epi32(step - 1)), midpoints);
        const __mmask16 beyond = _mm512_cmp_ps_mask(x, middle, _CMP_GT_OQ);
        place = _mm512_mask_add_epi32(place, beyond, place, _mm512_set1_epi32(step));
    }
    return place;
}
inline __m512 midpoints_of(const float *midpoints) { return _mm512_maskz_loadu_ps(0x7FFF, midpoints); }
#elif defined(__AVX2__)
// How many of 15 ascending midpoints lie below each of 8 values.
inline __m256i places_among(const float *values, const float *midpoints) {
    const __m256 x = _mm256_loadu_ps(values);
    __m256i place = _mm256_setzero_si256();
#pragma GCC unroll 15
    for (int k = 0; k < 15; k++)  // a comparison that holds is -1
        place = _mm256_sub_epi32(place, _mm256_castps_si256(_mm256_cmp_ps(x, _mm256_broadcast_ss(midpoints + k), _CMP_GT_OQ)));
    return place;
}
// One of 16 numbers for each of 8 places: bit 3 of a place says which half, the look-up reads the three below it.
inline __m256 picked(__m256 below, __m256 above, __m256i places) {
    const __m256 low = _mm256_permutevar8x32_ps(below, places), high = _mm256_permutevar8x32_ps(above, places);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(places, 28)));
}
#endif

// Midpoint by midpoint over a few values at a time: a value is moved up a level wherever it lies beyond one.
template <class X, int SIZE>
inline void nearest_levels(const typename X::Stored *__restrict__ x, typename X::Stored *__restrict__ y, int64_t size,
                           const float *levels, const float *midpoints, float reciprocal, float scale) {
    const int64_t count = SIZE ? SIZE : size;
    float relative[32], level[32];
    for (int64_t i = 0; i < count; i++) {
        relative[i] = relative_to(X::load(x[i]), reciprocal);
        level[i] = levels[0];
    }
#if defined(__AVX512F__)
    for (int64_t i = 0; SIZE && i < SIZE; i += 16) {
        const __m512i places = places_among(relative + i, midpoints_of(midpoints));
        _mm512_storeu_ps(level + i, _mm512_permutexvar_ps(places, _mm512_loadu_ps(levels)));
    }
    const int first = SIZE ? 15 : 0;
#elif defined(__AVX2__)
    const __m256 low = _mm256_loadu_ps(levels), high = _mm256_loadu_ps(levels + 8);
    for (int64_t i = 0; SIZE && i < SIZE; i += 8)
        _mm256_storeu_ps(level + i, picked(low, high, places_among(relative + i, midpoints)));
    const int first = SIZE ? 15 : 0;
#else
    const int first = 0;
#endif
    for (int k = first; k < 15; k++) {
        const float middle = midpoints[k], above = levels[k + 1];
        for (int64_t i = 0; i < count; i++) level[i] = relative[i] > middle ? above : level[i];
    }
    for (int64_t i = 0; i < count; i++) y[i] = X::store_number(level[i] * scale);
}

template <class X, int SIZE>
inline void nearest_codes(const typename X::Stored *__restrict__ x, uint8_t *__restrict__ codes, int64_t size,
                          const int32_t *order, const float *midpoints, float reciprocal) {
    const int64_t count = SIZE ? SIZE : size;
    float relative[32];
    int32_t code[32];
    for (int64_t i = 0; i < count; i++) {
        relative[i] = relative_to(X::load(x[i]), reciprocal);
        code[i] = order[0];
    }
#if defined(__AVX512F__)
    for (int64_t i = 0; SIZE && i < SIZE; i += 16) {
        const __m512i places = places_among(relative + i, midpoints_of(midpoints));
        _mm512_storeu_si512(code + i, _mm512_permutexvar_epi32(places, _mm512_loadu_si512(order)));
    }
    const int first = SIZE ? 15 : 0;
#elif defined(__AVX2__)
    const __m256 low = _mm256_loadu_ps((const float *)order), high = _mm256_loadu_ps((const float *)order + 8);
    for (int64_t i = 0; SIZE && i < SIZE; i += 8)
        _mm256_storeu_ps((float *)code + i, picked(low, high, places_among(relative + i, midpoints)));
    const int first = SIZE ? 15 : 0;
#else
    const int first = 0;
#endif
    for (int k = first; k < 15; k++) {
        const float middle = midpoints[k];
        const int32_t above = order[k + 1];
        for (int64_t i = 0; i < count; i++) code[i] = relative[i] > middle ? above : code[i];
    }
    for (int64_t i = 0; i < count; i++) codes[i] = (uint8_t)code[i];
}

template <class X> int round_codebook_of(const Job *job, int64_t begin, int64_t end) {
    typedef typename X::Stored Stored;
    float levels[16], midpoints[15];
    memcpy(levels, job->levels, sizeof levels);
    memcpy(midpoints, job->midpoints, sizeof midpoints);
    const int64_t mask_bytes = (job->size + 7) / 8;
    for (int64_t block = begin; block < end; block++) {
        const int64_t count = values_in(job, block);
        const Stored *__restrict__ x = (const Stored *)job->x + block * job->size;
        Stored *__restrict__ y = (Stored *)job->y + block * job->size;
        float scale;
        if (settle_block<X>(job, x, count, block, scale)) return REFUSED;
        const float reciprocal = reciprocal_of(scale), value_scale = job->value_scale ? job->value_scale[block] : scale;
        int64_t done = 0;
        for (; done + 32 <= count; done += 32)
            nearest_levels<X, 32>(x + done, y + done, 32, levels, midpoints, reciprocal, value_scale);
        nearest_levels<X, 0>(x + done, y + done, count - done, levels, midpoints, reciprocal, value_scale);
        if (!job->mask) continue;
        float away[PIECE];
        for (int64_t start = 0; start < count; start += PIECE) {
            const int64_t part = count - start < PIECE ? count - start : PIECE;
            for (int64_t i = 0; i < part; i++)
                away[i] = float_of(bits_of(X::load(x[start + i]) / scale) & 0x7FFFFFFF);
            store_mask(away, part, 1.0f, job->mask + block * mask_bytes + start / 8);
        }
    }
    return DONE;
}

int round_codebook(const Job *job, int64_t begin, int64_t end) {
    return job->x_type == FLOAT32 ? round_codebook_of<Float32>(job, begin, end)
                                  : round_codebook_of<BFloat16>(job, begin, end);
}

template <class X> int quantize_codebook_of(const Job *job, int64_t begin, int64_t end) {
    typedef typename X::Stored Stored;
    float midpoints[15];
    int32_t order[16];
    memcpy(midpoints, job->midpoints, sizeof midpoints);
    for (int k = 0; k < 16; k++) order[k] = job->order[k];
    uint8_t held[PIECE];
    for (int64_t block = begin; block < end; block++) {
        const int64_t count = values_in(job, block);
        const Stored *x = (const Stored *)job->x + block * job->size;
        float scale;
        if (settle_block<X>(job, x, count, block, scale)) return REFUSED;
        const float reciprocal = reciprocal_of(scale);
        for (int64_t start = 0; start < count; start += PIECE) {
            const int64_t part = count - start < PIECE ? count - start : PIECE;
            int64_t done = 0;
            for (; done + 32 <= part; done += 32)
                nearest_codes<X, 32>(x + start + done, held + done, 32, order, midpoints, reciprocal);
            nearest_codes<X, 0>(x + start + done, held + done, part - done, order, midpoints, reciprocal);
            pack_codes(held, part, 4, job->codes + (block * job->size + start) / 2);
        }
    }
    return DONE;
}

int quantize_codebook(const Job *job, int64_t begin, int64_t end) {
    return job->x_type == FLOAT32 ? quantize_codebook_of<Float32>(job, begin, end)
                                  : quantize_codebook_of<BFloat16>(job, begin, end);
}

// The levels of codes, 0 to 15.
#if defined(__AVX512F__)
struct LevelTable {
    __m512 levels;
    inline LevelTable(const float *from) { levels = _mm512_loadu_ps(from); }
    inline void look_up(const uint8_t *packed, float *out) const {  // 16 bytes to 32 values
        __m128i bytes = _mm_loadu_si128((const __m128i *)packed), low = _mm_and_si128(bytes, _mm_set1_epi8(15));
        __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
        __m512i first = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high));
        __m512i second = _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(low, high));
        _mm512_storeu_ps(out, _mm512_permutexvar_ps(first, levels));
        _mm512_storeu_ps(out + 16, _mm512_permutexvar_ps(second, levels));
    }
};
#elif defined(__AVX2__)
struct LevelTable {
    __m256 below, above;
    inline LevelTable(const float *from) {
        below = _mm256_loadu_ps(from);
        above = _mm256_loadu_ps(from + 8);
    }
    inline __m256 level(__m128i codes) const { return picked(below, above, _mm256_cvtepu8_epi32(codes)); }
    inline void look_up(const uint8_t *packed, float *out) const {
        __m128i bytes = _mm_loadu_si128((const __m128i *)packed), low = _mm_and_si128(bytes, _mm_set1_epi8(15));
        __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
        __m128i first = _mm_unpacklo_epi8(low, high), second = _mm_unpackhi_epi8(low, high);
        _mm256_storeu_ps(out, level(first));
        _mm256_storeu_ps(out + 8, level(_mm_srli_si128(first, 8)));
        _mm256_storeu_ps(out + 16, level(second));
        _mm256_storeu_ps(out + 24, level(_mm_srli_si128(second, 8)));
    }
};
#elif defined(STROP_NEON)
// 32 codes in their order, of 16 bytes.
inline uint8x16x2_t codes_of(const uint8_t *packed) {
    const uint8x16_t bytes = vld1q_u8(packed);
    return vzipq_u8(vandq_u8(bytes, vdupq_n_u8(15)), vshrq_n_u8(bytes, 4));
}
struct LevelTable {
    float levels[16];
    uint8x16x4_t bytes;  // the first byte of each level, the second of each, ...
    inline LevelTable(const float *from) {
        memcpy(levels, from, sizeof levels);
        bytes = vld4q_u8((const uint8_t *)from);
    }
    inline void look_up(const uint8_t *packed, float *out) const {
        const uint8x16x2_t codes = codes_of(packed);
        for (int half = 0; half < 2; half++) {
            uint8x16x4_t found;
            for (int k = 0; k < 4; k++) found.val[k] = vqtbl1q_u8(bytes.val[k], codes.val[half]);
            vst4q_u8((uint8_t *)(out + 16 * half), found);
        }
    }
};
#else
struct LevelTable {
    float pairs[256][2];
    inline LevelTable(const float *from) {
        for (int byte = 0; byte < 256; byte++) {
            pairs[byte][0] = from[byte & 15];
            pairs[byte][1] = from[byte >> 4];
        }
    }
    inline void look_up(const uint8_t *packed, float *out) const {
        for (int i = 0; i < 16; i++) memcpy(out + 2 * i, pairs[packed[i]], 8);
    }
};
#endif

// The first values of a block, 32 at a time; says how many.
template <class Y> inline int64_t block_values(const LevelTable &table, const uint8_t *packed, float scale,
                                               int64_t count, typename Y::Stored *__restrict__ y) {
    float held[32];
    int64_t start = 0;
    for (; start + 32 <= count; start += 32) {
        table.look_up(packed + start / 2, held);
        for (int i = 0; i < 32; i++) y[start + i] = Y::store(held[i] * scale);
    }
    return start;
}

// A block has sixteen different values: they are rounded once, and the codes look those up.
#if defined(__AVX512BW__)
template <> inline int64_t block_values<BFloat16>(const LevelTable &table, const uint8_t *packed, float scale,
                                                  int64_t count, uint16_t *__restrict__ y) {
    const __m512 values = _mm512_mul_ps(table.levels, _mm512_set1_ps(scale));
    const __m512i bits = _mm512_castps_si512(values), one = _mm512_set1_epi32(1);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    const __m512i words = _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7FC0));
    const __m512i rounded = _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(words));
    int64_t start = 0;
    for (; start + 32 <= count; start += 32) {
        const __m128i bytes = _mm_loadu_si128((const __m128i *)(packed + start / 2));
        const __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(15));
        const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
        const __m256i codes = _mm256_set_m128i(_mm_unpackhi_epi8(low, high), _mm_unpacklo_epi8(low, high));
        _mm512_storeu_si512(y + start, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), rounded));
    }
    return start;
}
#elif defined(STROP_NEON)
template <> inline int64_t block_values<BFloat16>(const LevelTable &table, const uint8_t *packed, float scale,
                                                  int64_t count, uint16_t *__restrict__ y) {
    uint16_t rounded[16];
    for (int i = 0; i < 16; i++) rounded[i] = bfloat16_of(table.levels[i] * scale);
    const uint8x16x2_t bytes = vld2q_u8((const uint8_t *)rounded);
    int64_t start = 0;
    for (; start + 32 <= count; start += 32) {
        const uint8x16x2_t codes = codes_of(packed + start / 2);
        for (int half = 0; half < 2; half++) {
            uint8x16x2_t found;
            for (int k = 0; k < 2; k++) found.val[k] = vqtbl1q_u8(bytes.val[k], codes.val[half]);
            vst2q_u8((uint8_t *)(y + start + 16 * half), found);
        }
    }
    return start;
}
#endif

template <class Y> int dequantize_codebook_of(const Job *job, int64_t begin, int64_t end) {
    typedef typename Y::Stored Stored;
    const LevelTable table(job->levels);
    for (int64_t block = begin; block < end; block++) {
        const int64_t count = values_in(job, block);
        const uint8_t *packed = job->codes + block * job->size / 2;
        Stored *__restrict__ y = (Stored *)job->y + block * job->size;
        const float scale = ((const float *)job->scale)[block];
        int64_t start = block_values<Y>(table, packed, scale, count, y);
        for (; start < count; start++) {
            const int code = start % 2 ? packed[start / 2] >> 4 : packed[start / 2] & 15;
            y[start] = Y::store(job->levels[code] * scale);
        }
    }
    return DONE;
}

int dequantize_codebook(const Job *job, int64_t begin, int64_t end) {
    return job->y_type == FLOAT32 ? dequantize_codebook_of<Float32>(job, begin, end)
                                  : dequantize_codebook_of<BFloat16>(job, begin, end);
}

template <class X> int mask_gradient_of(const Job *job, int64_t begin, int64_t end) {
    typedef typename X::Stored Stored;
    const int64_t mask_bytes = (job->size + 7) / 8;
    float flags[PIECE];
    for (int64_t group = begin; group < end; group++) {
        const int64_t count = values_in(job, group);
        const Stored *__restrict__ x = (const Stored *)job->x + group * job->size;
        Stored *__restrict__ y = (Stored *)job->y + group * job->size;
        for (int64_t start = 0; start < count; start += PIECE) {
            const int64_t part = count - start < PIECE ? count - start : PIECE;
            load_mask(job->mask + group * mask_bytes + start / 8, part, flags);
            for (int64_t i = 0; i < part; i++) y[start + i] = X::store(X::load(x[start + i]) * flags[i]);
        }
    }
    return DONE;
}

int mask_gradient(const Job *job, int64_t begin, int64_t end) {
    return job->x_type == FLOAT32 ? mask_gradient_of<Float32>(job, begin, end)
                                  : mask_gradient_of<BFloat16>(job, begin, end);
}

}  // namespace
