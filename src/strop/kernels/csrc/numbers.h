// Numbers as kernels see them: float32, bfloat16 and float16, and the range of a group.
//
// The kernels are written once in plain C++ (affine.h, codebook.h, products.h) and compiled for each instruction set in
// a file of its own. The loops are such that compilers make vectors of them: no calls, no order of summation. Every
// operation of a rounding is one of float32's own, in the order of the PyTorch reference (numerics/grid.py), without
// contraction, and so the bits are the same. Nothing here may be an inline function with external linkage, or the
// linker could keep the copy of one instruction set for all: no standard C++ headers, all in an unnamed namespace.
#pragma once

#include <string.h>

#include "kernels.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(STROP_NEON)
#include <arm_neon.h>
#endif

namespace {

const int64_t PIECE = 512;  // values whose flags or codes are kept aside at a time; whole bytes at every width
const float ROUND = 12582912.0f;  // 1.5 * 2^23: (t + ROUND) - ROUND rounds t to an integer, ties to even, -0.0 to 0.0

inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline uint16_t bfloat16_of(float value) {  // to nearest, ties to even
    uint32_t bits = bits_of(value);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

inline float from_float16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7FFF;
    uint32_t small = bits_of((float)(int32_t)rest * 5.9604644775390625e-8f);  // 2^-24
    uint32_t normal = (rest << 13) + ((rest >= 0x7C00 ? 224u : 112u) << 23);
    return float_of(sign | (rest < 0x400 ? small : normal));
}

// Rounded to float16, as a float: to nearest, ties to even, infinite from 65520 on. For positive values.
inline float to_float16(float value) {
    uint32_t bits = bits_of(value);
    float normal = float_of((bits + 0xFFF + (bits >> 13 & 1)) & 0xFFFFE000);
    float small = (value + 0.5f) - 0.5f;  // below 2^-14 a multiple of 2^-24, which is what float32 keeps beside 0.5
    float rounded = value < 6.103515625e-5f ? small : normal;
    return value >= 65520.0f ? float_of(0x7F800000) : rounded;
}

// The bits of a float16 that a float holds exactly, of either sign.
inline uint16_t float16_bits(float value) {
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
    uint32_t small = bits_of(float_of(rest) + 0.5f) - 0x3F000000, normal = (rest - (112u << 23)) >> 13;
    return (uint16_t)(sign | (rest < 0x38800000 ? small : normal));
}

struct Float32 {
    typedef float Stored;
    static inline float load(float value) { return value; }
    static inline float store_number(float value) { return value; }
    static inline float store(float value) { return value; }
};

struct BFloat16 {
    typedef uint16_t Stored;
    static inline float load(uint16_t value) { return float_of((uint32_t)value << 16); }
    static inline uint16_t store(float value) { return bfloat16_of(value); }
    static inline uint16_t store_number(float value) {  // of what is not NaN
        return (uint16_t)((bits_of(value) + 0x7FFF + (bits_of(value) >> 16 & 1)) >> 16);
    }
};

inline float load_scale(const void *scale, int32_t type, int64_t place) {
    if (type == FLOAT32) return ((const float *)scale)[place];
    uint16_t stored = ((const uint16_t *)scale)[place];
    return type == BFLOAT16 ? BFloat16::load(stored) : from_float16(stored);
}

inline void load_scales(const void *scale, int32_t type, int64_t place, int64_t count, float *values) {
    const uint16_t *halves = (const uint16_t *)scale + place;
    if (type == FLOAT32) memcpy(values, (const float *)scale + place, (size_t)count * 4);
    else if (type == BFLOAT16) for (int64_t k = 0; k < count; k++) values[k] = BFloat16::load(halves[k]);
    else {
#if defined(__AVX512F__)
        for (int64_t k = 0; k < count; k += 16) {
            const __mmask16 those = (__mmask16)(count - k < 16 ? (1 << (count - k)) - 1 : 0xFFFF);
            _mm512_mask_storeu_ps(values + k, those, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(those, halves + k)));
        }
#else
        int64_t k = 0;
#if defined(__F16C__)
        for (; k + 8 <= count; k += 8)
            _mm256_storeu_ps(values + k, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(halves + k))));
#elif defined(STROP_NEON)
        for (; k + 4 <= count; k += 4)
            vst1q_f32(values + k, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves + k))));
#endif
        for (; k < count; k++) values[k] = from_float16(halves[k]);
#endif
    }
}

inline void store_scales(void *scale, int32_t type, int64_t place, const float *values, int64_t count) {
    uint16_t *halves = (uint16_t *)scale + place;
    if (type == FLOAT32) memcpy((float *)scale + place, values, (size_t)count * 4);
    else if (type == BFLOAT16) for (int64_t k = 0; k < count; k++) halves[k] = bfloat16_of(values[k]);
    else for (int64_t k = 0; k < count; k++) halves[k] = float16_bits(values[k]);
}

inline bool is_finite(float value) { return (bits_of(value) & 0x7F800000) != 0x7F800000; }

const int64_t AHEAD = 1024;  // bytes between what is asked for and what is used

// Asks for what lies AHEAD of `bytes` that are about to be read: the processor waits for memory longer than it works.
inline void ask_ahead(const void *from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)from + AHEAD + i);
}

// The largest magnitude of a group; not finite where any value is not. SIZE: the count where it is known to the
// compiler, else 0.
template <class X, int SIZE> inline float peak_of(const typename X::Stored *__restrict__ x, int64_t size) {
    const int64_t count = SIZE ? SIZE : size;
    int32_t peak = 0;
    ask_ahead(x, count * (int64_t)sizeof *x);
    for (int64_t i = 0; i < count; i++) {
        int32_t magnitude = (int32_t)(bits_of(X::load(x[i])) & 0x7FFFFFFF);
        peak = magnitude > peak ? magnitude : peak;
    }
    return float_of((uint32_t)peak);
}

inline int32_t ordered(uint32_t bits) {  // integers in the order of the floats whose bits they are; its own inverse
    return (int32_t)bits ^ (int32_t)((uint32_t)((int32_t)bits >> 31) & 0x7FFFFFFF);
}

template <class X, int SIZE>
inline void range_of(const typename X::Stored *__restrict__ x, int64_t size, float &low, float &high) {
    const int64_t count = SIZE ? SIZE : size;
    int32_t least = 0, most = 0;  // a range holds zero
    for (int64_t i = 0; i < count; i++) {
        int32_t place = ordered(bits_of(X::load(x[i])));
        least = place < least ? place : least;
        most = place > most ? place : most;
    }
    low = float_of((uint32_t)ordered((uint32_t)least));
    high = float_of((uint32_t)most);
}

}  // namespace
