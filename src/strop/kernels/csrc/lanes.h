// Vectors of floats, and 4-bit codes read eight to a 32-bit word, by instruction set: what products.h is written with.
#pragma once

#include "numbers.h"

namespace {

#if defined(__AVX512F__)
typedef __m512 Lanes;
const int64_t LANES = 16;
inline Lanes zeros() { return _mm512_setzero_ps(); }
inline Lanes all(float value) { return _mm512_set1_ps(value); }
inline Lanes load(const float *from) { return _mm512_loadu_ps(from); }
inline void store(float *to, Lanes lanes) { _mm512_storeu_ps(to, lanes); }
inline Lanes plus(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
inline Lanes times_plus(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline float total_of(Lanes lanes) { return _mm512_reduce_add_ps(lanes); }
inline Lanes signed_bytes(const uint8_t *codes) {  // stored codes less 128
    __m128i bytes = _mm_xor_si128(_mm_loadu_si128((const __m128i *)codes), _mm_set1_epi8((char)0x80));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
struct Words {
    __m512i words;
    inline void read(const uint8_t *packed) { words = _mm512_loadu_si512(packed); }
    inline Words from(int bit) const {
        Words later;
        later.words = _mm512_srli_epi32(words, bit);
        return later;
    }
};
struct Table16 {
    __m512 levels;
    inline Table16(const float *from) { levels = _mm512_loadu_ps(from); }
    inline Lanes of(Words at) const { return _mm512_permutexvar_ps(at.words, levels); }  // reads four bits of a word
};
struct Places {  // where the lanes of a block find their scales
    __m512i of;
    inline Places(Lanes lanes) { of = _mm512_cvttps_epi32(lanes); }
    inline Lanes pick(const float *scales) const { return _mm512_permutexvar_ps(of, _mm512_loadu_ps(scales)); }
};
#elif defined(__AVX2__)
typedef __m256 Lanes;
const int64_t LANES = 8;
inline Lanes zeros() { return _mm256_setzero_ps(); }
inline Lanes all(float value) { return _mm256_set1_ps(value); }
inline Lanes load(const float *from) { return _mm256_loadu_ps(from); }
inline void store(float *to, Lanes lanes) { _mm256_storeu_ps(to, lanes); }
inline Lanes plus(Lanes a, Lanes b) { return _mm256_add_ps(a, b); }
inline Lanes times_plus(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
inline float total_of(Lanes lanes) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline Lanes signed_bytes(const uint8_t *codes) {
    __m128i bytes = _mm_xor_si128(_mm_loadl_epi64((const __m128i *)codes), _mm_set1_epi8((char)0x80));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
struct Words {
    __m256i words;
    inline void read(const uint8_t *packed) { words = _mm256_loadu_si256((const __m256i *)packed); }
    inline Words from(int bit) const {
        Words later;
        later.words = _mm256_srli_epi32(words, bit);
        return later;
    }
};
struct Table16 {
    __m256 below, above;
    inline Table16(const float *from) {
        below = _mm256_loadu_ps(from);
        above = _mm256_loadu_ps(from + 8);
    }
    inline Lanes of(Words at) const {  // each look-up reads three bits of a word; the fourth chooses between them
        __m256 low = _mm256_permutevar8x32_ps(below, at.words), high = _mm256_permutevar8x32_ps(above, at.words);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(at.words, 28)));
    }
};
struct Places {
    __m256i of;
    inline Places(Lanes lanes) { of = _mm256_cvttps_epi32(lanes); }
    inline Lanes pick(const float *scales) const { return _mm256_permutevar8x32_ps(_mm256_loadu_ps(scales), of); }
};
#elif defined(STROP_NEON)
typedef float32x4_t Lanes;
const int64_t LANES = 4;
inline Lanes zeros() { return vdupq_n_f32(0.0f); }
inline Lanes all(float value) { return vdupq_n_f32(value); }
inline Lanes load(const float *from) { return vld1q_f32(from); }
inline Lanes plus(Lanes a, Lanes b) { return vaddq_f32(a, b); }
inline Lanes times_plus(Lanes a, Lanes b, Lanes c) { return vfmaq_f32(c, a, b); }
inline float total_of(Lanes lanes) { return vaddvq_f32(lanes); }
inline Lanes signed_bytes(const uint8_t *codes) {
    uint32_t four;
    memcpy(&four, codes, 4);
    const int16x8_t halves = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four ^ 0x80808080)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(halves)));
}
// Where a table of bytes has the four of each of these floats.
inline uint8x16_t bytes_of(uint32x4_t floats) {
    const uint32x4_t first = vmulq_u32(floats, vdupq_n_u32(0x04040404));
    return vreinterpretq_u8_u32(vaddq_u32(first, vdupq_n_u32(0x03020100)));
}
struct Words {
    uint32x4_t words;
    inline void read(const uint8_t *packed) { words = vreinterpretq_u32_u8(vld1q_u8(packed)); }
    inline Words from(int bit) const {
        Words later;
        later.words = vshlq_u32(words, vdupq_n_s32(-bit));
        return later;
    }
};
struct Table16 {
    uint8x16x4_t bytes;
    inline Table16(const float *from) {
        for (int k = 0; k < 4; k++) bytes.val[k] = vld1q_u8((const uint8_t *)(from + 4 * k));
    }
    inline Lanes of(Words at) const {
        return vreinterpretq_f32_u8(vqtbl4q_u8(bytes, bytes_of(vandq_u32(at.words, vdupq_n_u32(15)))));
    }
};
struct Places {
    uint8x16_t of;
    inline Places(Lanes lanes) { of = bytes_of(vcvtq_u32_f32(lanes)); }
    inline Lanes pick(const float *scales) const {
        return vreinterpretq_f32_u8(vqtbl1q_u8(vld1q_u8((const uint8_t *)scales), of));
    }
};
#else
#define STROP_PLAIN_PRODUCTS
const int64_t LANES = 16;
#endif

#ifndef STROP_PLAIN_PRODUCTS
// How a block's 4-bit codes become weights, 8 vectors (steps) of them, and so in which order they meet the inputs.
//
//     place     which of a block's inputs meets a lane of a step
//     factor    what that input is multiplied with beforehand
//     inside    a place in the middle of the weights of a lane, which share a scale
//     first     what a lane's sum begins with, of the sum of its inputs
//
// Codes by the table, a step after the other for all rows.
struct Looked {
    static const bool BY_STEPS = true;
    static inline int64_t place(int64_t step, int64_t lane) { return 8 * lane + step; }
    static inline float factor(int64_t) { return 1.0f; }
    static inline int64_t inside(int64_t lane) { return 8 * lane + 4; }
    static inline float first(float) { return 0.0f; }
    Table16 table;
    inline Looked(const float *levels) : table(levels) {}
    inline Lanes step(Words at, int step) const { return table.of(at.from(4 * step)); }
};
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
// Codes as integers: each stays where it lies in its word, becomes a float that is 16^step too large, and meets an input
// that is as much too small. What codes have more than their values, 8, is in what the sum begins with.
struct Integers {
    static const bool BY_STEPS = false;
    static inline int64_t place(int64_t step, int64_t lane) { return 8 * lane + step; }
    static inline float factor(int64_t step) { return step < 7 ? 1.0f / (float)(1 << 4 * step) : 1.0f; }
    static inline int64_t inside(int64_t lane) { return 8 * lane + 4; }
    static inline float first(float inputs) { return -8.0f * inputs; }
    inline Integers(const float *) {}
    inline void decode(Words at, Lanes *weights) const {
#pragma GCC unroll 7
        for (int step = 0; step < 7; step++)
            weights[step] = _mm256_cvtepi32_ps(_mm256_and_si256(at.words, _mm256_set1_epi32(15 << 4 * step)));
        weights[7] = _mm256_cvtepi32_ps(_mm256_srli_epi32(at.words, 28));
    }
};

// Codes of any 16 levels, in groups of whole 32: the four bytes of a level are looked up apart, 32 codes at a time.
struct Planes {
    static const bool BY_STEPS = false;
    static inline int64_t place(int64_t step, int64_t lane) {
        return 2 * ((lane & 3) * 2 + (lane & 4) * 4 + (step & 1) + (step & 2) * 4) + (step >> 2);
    }
    static inline float factor(int64_t) { return 1.0f; }
    static inline int64_t inside(int64_t lane) { return lane < 4 ? 16 : 48; }
    static inline float first(float) { return 0.0f; }
    __m256i plane[4];
    inline Planes(const float *levels) {
        for (int k = 0; k < 4; k++) {
            uint8_t bytes[16];
            for (int code = 0; code < 16; code++) bytes[code] = (uint8_t)(bits_of(levels[code]) >> 8 * k);
            plane[k] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)bytes));
        }
    }
    inline void decode(Words at, Lanes *weights) const {
        const __m256i mask = _mm256_set1_epi8(15);
        decode_bytes(_mm256_and_si256(at.words, mask), weights);
        decode_bytes(_mm256_and_si256(_mm256_srli_epi16(at.words, 4), mask), weights + 4);
    }
    inline void decode_bytes(__m256i codes, Lanes *weights) const {
        const __m256i low0 = _mm256_shuffle_epi8(plane[0], codes), low1 = _mm256_shuffle_epi8(plane[1], codes);
        const __m256i high0 = _mm256_shuffle_epi8(plane[2], codes), high1 = _mm256_shuffle_epi8(plane[3], codes);
        two_of(_mm256_unpacklo_epi8(low0, low1), _mm256_unpacklo_epi8(high0, high1), weights);
        two_of(_mm256_unpackhi_epi8(low0, low1), _mm256_unpackhi_epi8(high0, high1), weights + 2);
    }
    static inline void two_of(__m256i low, __m256i high, Lanes *weights) {  // of the even and of the odd halves
        weights[0] = _mm256_castsi256_ps(_mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xAA));
        weights[1] = _mm256_castsi256_ps(_mm256_blend_epi16(_mm256_srli_epi32(low, 16), high, 0xAA));
    }
};
#define STROP_DECODERS
#endif

}  // namespace
