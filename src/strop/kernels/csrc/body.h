// Every kernel, written once in plain C++ and compiled for each instruction set in a file of its own.
//
// The loops are such that compilers make vectors of them: no calls, no order of summation. Every operation is one of
// float32's own, in the order of the PyTorch reference (numerics/grid.py), without contraction: the bits are the same.
// Nothing here may be an inline function with external linkage, or the linker could keep the copy of one instruction
// set for all: no standard C++ headers, and all of it in an unnamed namespace.
#pragma once

#include <string.h>

#include "kernels.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

const int64_t PIECE = 512;  // values whose flags or codes are kept aside at a time; whole bytes at every width
const int64_t BATCH = 32;   // groups whose scales are found together, so that vectors find them too
const int64_t BATCH_VALUES = 4096;
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
    static inline float store(float value) { return value; }
};

struct BFloat16 {
    typedef uint16_t Stored;
    static inline float load(uint16_t value) { return float_of((uint32_t)value << 16); }
    static inline uint16_t store(float value) { return bfloat16_of(value); }
};

inline float load_scale(const void *scale, int32_t type, int64_t place) {
    if (type == FLOAT32) return ((const float *)scale)[place];
    uint16_t stored = ((const uint16_t *)scale)[place];
    return type == BFLOAT16 ? BFloat16::load(stored) : from_float16(stored);
}

inline void store_scales(void *scale, int32_t type, int64_t place, const float *values, int64_t count) {
    uint16_t *halves = (uint16_t *)scale + place;
    if (type == FLOAT32) memcpy((float *)scale + place, values, (size_t)count * 4);
    else if (type == BFLOAT16) for (int64_t k = 0; k < count; k++) halves[k] = bfloat16_of(values[k]);
    else for (int64_t k = 0; k < count; k++) halves[k] = float16_bits(values[k]);
}

inline bool is_finite(float value) { return (bits_of(value) & 0x7F800000) != 0x7F800000; }

// The largest magnitude of a group; not finite where any value is not. SIZE: the count where it is known to the
// compiler, else 0.
template <class X, int SIZE> inline float peak_of(const typename X::Stored *__restrict__ x, int64_t size) {
    const int64_t count = SIZE ? SIZE : size;
    int32_t peak = 0;
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

// Scales of some groups, and the stored codes of 0.0 as floats.
struct Grids {
    float scale[BATCH], zero[BATCH];
};

struct Grid {
    float scale, zero;
};

inline int64_t batch_of(int64_t size, int64_t left) {
    int64_t batch = BATCH_VALUES / size;
    batch = batch < 1 ? 1 : batch > BATCH ? BATCH : batch;
    return batch < left ? batch : left;
}

// Scales and zero points of `count` groups from `first` on: those given, or those of their own ranges, as
// scales.fit_scale finds them.
template <class X, int SIZE> int settle(const Job *job, int64_t first, int64_t count, Grids &grids) {
    typedef typename X::Stored Stored;
    const int64_t size = SIZE ? SIZE : job->size;
    const float steps = (float)((1 << job->bits) - 1), qmin = (float)job->qmin, qmax = qmin + steps;
    float peak[BATCH], low[BATCH], high[BATCH], ideal[BATCH];
    bool finite = true;
    for (int64_t k = 0; k < count; k++) {
        peak[k] = peak_of<X, SIZE>((const Stored *)job->x + (first + k) * size, size);
        finite = finite && is_finite(peak[k]);
        grids.zero[k] = -qmin;
    }
    if (!finite) return REFUSED;
    if (job->given) {
        for (int64_t k = 0; k < count; k++) {
            const int64_t place = job->shared ? 0 : first + k;
            grids.scale[k] = load_scale(job->scale, job->scale_type, place);
            if (job->zero) grids.zero[k] = (float)job->zero[place];
        }
        return DONE;
    }
    if (job->mode != SYMMETRIC) {
        for (int64_t k = 0; k < count; k++)
            range_of<X, SIZE>((const Stored *)job->x + (first + k) * size, size, low[k], high[k]);
    }
    if (job->mode == SYMMETRIC) for (int64_t k = 0; k < count; k++) ideal[k] = peak[k] / (steps / 2);
    else if (job->mode == FULL_RANGE) for (int64_t k = 0; k < count; k++) ideal[k] = peak[k] / -qmin;
    else for (int64_t k = 0; k < count; k++) ideal[k] = (high[k] - low[k]) / steps;
    // The smallest positive number of the dtype is the least scale: 2^-149, 2^-133 or 2^-24.
    const float least = job->scale_type == FLOAT32    ? float_of(1)
                        : job->scale_type == BFLOAT16 ? float_of(1u << 16)
                                                      : 5.9604644775390625e-8f;
    for (int64_t k = 0; k < count; k++) ideal[k] = ideal[k] < least ? least : ideal[k];
    if (job->scale_type == BFLOAT16) {
        for (int64_t k = 0; k < count; k++) ideal[k] = BFloat16::load(bfloat16_of(ideal[k]));
    } else if (job->scale_type == FLOAT16) {
        for (int64_t k = 0; k < count; k++) ideal[k] = to_float16(ideal[k]);
    }
    for (int64_t k = 0; k < count; k++) grids.scale[k] = peak[k] > 0 ? ideal[k] : 1.0f;
    for (int64_t k = 0; k < count; k++) finite = finite && is_finite(grids.scale[k]);
    if (!finite) return REFUSED;
    if (job->mode == FULL_RANGE) {
        for (int64_t k = 0; k < count; k++) grids.scale[k] = high[k] > -low[k] ? -grids.scale[k] : grids.scale[k];
    } else if (job->mode == ASYMMETRIC) {
        for (int64_t k = 0; k < count; k++) {
            float zero = qmin - low[k] / grids.scale[k];
            zero = zero < qmin ? qmin : zero;
            zero = zero > qmax ? qmax : zero;
            grids.zero[k] = ((zero + ROUND) - ROUND) - qmin;
        }
        if (job->zero) for (int64_t k = 0; k < count; k++) job->zero[first + k] = (uint8_t)grids.zero[k];
    }
    if (job->scale) store_scales(job->scale, job->scale_type, first, grids.scale, count);
    return DONE;
}

inline float code_of(float x, Grid grid, float steps) {
    float code = ((x / grid.scale + ROUND) - ROUND) + grid.zero;
    code = code < 0.0f ? 0.0f : code;
    return code > steps ? steps : code;
}

// 16 bits, the first the least significant: which of 16 numbers are at most `most`.
inline uint16_t at_most(const float *numbers, float most) {
#if defined(__AVX512F__)
    return (uint16_t)_mm512_cmp_ps_mask(_mm512_loadu_ps(numbers), _mm512_set1_ps(most), _CMP_LE_OQ);
#elif defined(__AVX2__)
    const __m256 limit = _mm256_set1_ps(most);
    int low = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(numbers), limit, _CMP_LE_OQ));
    int high = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(numbers + 8), limit, _CMP_LE_OQ));
    return (uint16_t)(low | high << 8);
#else
    unsigned bits = 0;
    for (int i = 0; i < 16; i++) bits |= (unsigned)(numbers[i] <= most) << i;
    return (uint16_t)bits;
#endif
}

inline void store_mask(const float *numbers, int64_t count, float most, uint8_t *mask) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        uint16_t bits = at_most(numbers + i, most);
        memcpy(mask + i / 8, &bits, 2);
    }
    for (; i < count; i += 8) {
        unsigned byte = 0;
        for (int64_t k = i; k < count && k < i + 8; k++) byte |= (unsigned)(numbers[k] <= most) << (k - i);
        mask[i / 8] = (uint8_t)byte;
    }
}

inline void unpack_flags(const uint8_t *mask, int64_t count, uint8_t *flags) {
    for (int64_t i = 0; i < count; i++) flags[i] = mask[i / 8] >> i % 8 & 1;
}

template <class X, int SIZE>
inline void round_values(const typename X::Stored *__restrict__ x, typename X::Stored *__restrict__ y, int64_t size,
                         Grid grid, float steps) {
    const int64_t count = SIZE ? SIZE : size;
    for (int64_t i = 0; i < count; i++) y[i] = X::store((code_of(X::load(x[i]), grid, steps) - grid.zero) * grid.scale);
}

template <class X, int SIZE>
inline void mask_inside(const typename X::Stored *__restrict__ x, uint8_t *mask, int64_t size, Grid grid, float steps) {
    float away[PIECE];
    const float middle = steps / 2, reach = (steps + 1) / 2;
    const int64_t count = SIZE ? SIZE : size;
    for (int64_t start = 0; start < count; start += PIECE) {
        const int64_t end = count - start < PIECE ? count - start : PIECE;
        for (int64_t i = 0; i < end; i++) {
            float distance = (X::load(x[start + i]) / grid.scale + grid.zero) - middle;
            away[i] = float_of(bits_of(distance) & 0x7FFFFFFF);
        }
        store_mask(away, end, reach, mask + start / 8);
    }
}

template <class X, int SIZE> int round_affine_as(const Job *job, int64_t begin, int64_t end) {
    typedef typename X::Stored Stored;
    const int64_t size = SIZE ? SIZE : job->size, mask_bytes = (size + 7) / 8;
    const float steps = (float)((1 << job->bits) - 1);
    Grids grids;
    for (int64_t first = begin, count; first < end; first += count) {
        count = batch_of(size, end - first);
        if (settle<X, SIZE>(job, first, count, grids)) return REFUSED;
        for (int64_t k = 0; k < count; k++) {
            const Grid grid = {grids.scale[k], grids.zero[k]};
            const Stored *x = (const Stored *)job->x + (first + k) * size;
            round_values<X, SIZE>(x, (Stored *)job->y + (first + k) * size, size, grid, steps);
            if (job->mask) mask_inside<X, SIZE>(x, job->mask + (first + k) * mask_bytes, size, grid, steps);
        }
    }
    return DONE;
}

template <class X> int round_affine_of(const Job *job, int64_t begin, int64_t end) {
    return job->size == 32 ? round_affine_as<X, 32>(job, begin, end) : round_affine_as<X, 0>(job, begin, end);
}

int round_affine(const Job *job, int64_t begin, int64_t end) {
    return job->x_type == FLOAT32 ? round_affine_of<Float32>(job, begin, end) : round_affine_of<BFloat16>(job, begin, end);
}

// Fields of a word, `width` apart and `bits` wide, moved together in pairs, and the other way round.
inline uint64_t paired(uint64_t word, int width, int bits) {
    const uint64_t field = (1ull << bits) - 1;
    const uint64_t low = width == 8 ? field * 0x0001000100010001ull : width == 16 ? field * 0x0000000100000001ull : field;
    return (word & low) | (word >> (width - bits) & low << bits);
}

inline uint64_t parted(uint64_t word, int width, int bits) {
    const uint64_t field = (1ull << bits) - 1;
    const uint64_t low = width == 8 ? field * 0x0001000100010001ull : width == 16 ? field * 0x0000000100000001ull : field;
    return (word & low) | (word & low << bits) << (width - bits);
}

// Eight codes of fewer than 8 bits, one a byte, to the lowest 8 * bits bits, and back.
inline uint64_t gathered(uint64_t word, int bits) {
    return paired(paired(paired(word, 8, bits), 16, 2 * bits), 32, 4 * bits);
}

inline uint64_t spread(uint64_t word, int bits) {
    return parted(parted(parted(word, 32, 4 * bits), 16, 2 * bits), 8, bits);
}

// `count` codes to bytes as packing.py lays them: code k in the bits k * bits on; the last byte filled with zeros.
void pack_codes(const uint8_t *__restrict__ codes, int64_t count, int bits, uint8_t *__restrict__ packed) {
    int64_t done = 0;
    if (bits == 8) {
        memcpy(packed, codes, (size_t)count);
        return;
    }
    if (bits == 4) {
        for (int64_t i = 0; i < count / 2; i++) packed[i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
        done = count / 2 * 2;
    } else if (bits == 2) {
        for (int64_t i = 0; i < count / 4; i++)
            packed[i] = (uint8_t)(codes[4 * i] | codes[4 * i + 1] << 2 | codes[4 * i + 2] << 4 | codes[4 * i + 3] << 6);
        done = count / 4 * 4;
    }
    uint8_t *out = packed + done * bits / 8;
    const int64_t bytes = (count * bits + 7) / 8;
    for (; done < count; done += 8, out += bits) {  // 8 codes are `bits` whole bytes
        uint64_t word = 0;
        if (count - done >= 8) memcpy(&word, codes + done, 8);
        else memcpy(&word, codes + done, (size_t)(count - done));
        word = gathered(word, bits);
        const int64_t room = packed + bytes - out;  // a whole word where it fits: what follows overwrites its zeros
        if (room >= 8) memcpy(out, &word, 8);
        else memcpy(out, &word, (size_t)(room < bits ? room : bits));
    }
}

void unpack_codes(const uint8_t *__restrict__ packed, int64_t count, int bits, uint8_t *__restrict__ codes) {
    int64_t done = 0;
    if (bits == 8) {
        memcpy(codes, packed, (size_t)count);
        return;
    }
    if (bits == 4) {
        for (int64_t i = 0; i < count / 2; i++) {
            codes[2 * i] = packed[i] & 15;
            codes[2 * i + 1] = packed[i] >> 4;
        }
        done = count / 2 * 2;
    } else if (bits == 2) {
        for (int64_t i = 0; i < count / 4; i++) {
            codes[4 * i] = packed[i] & 3;
            codes[4 * i + 1] = packed[i] >> 2 & 3;
            codes[4 * i + 2] = packed[i] >> 4 & 3;
            codes[4 * i + 3] = packed[i] >> 6;
        }
        done = count / 4 * 4;
    }
    const uint8_t *in = packed + done * bits / 8;
    const int64_t bytes = (count * bits + 7) / 8;
    for (; done < count; done += 8, in += bits) {
        uint64_t word = 0;
        const int64_t left = packed + bytes - in;
        if (left >= 8) memcpy(&word, in, 8);
        else memcpy(&word, in, (size_t)left);
        word = spread(word, bits);
        if (count - done >= 8) memcpy(codes + done, &word, 8);
        else memcpy(codes + done, &word, (size_t)(count - done));
    }
}

template <class X, int SIZE>
inline void code_values(const typename X::Stored *__restrict__ x, uint8_t *__restrict__ codes, int64_t size, Grid grid,
                        float steps) {
    const int64_t count = SIZE ? SIZE : size;
    for (int64_t i = 0; i < count; i++) codes[i] = (uint8_t)(int32_t)code_of(X::load(x[i]), grid, steps);
}

// A row's codes are kept in `held` until they are PIECE of them, which are whole bytes.
template <class X, int SIZE> int quantize_affine_as(const Job *job, int64_t begin, int64_t end) {
    typedef typename X::Stored Stored;
    const int64_t size = SIZE ? SIZE : job->size, groups = job->columns / size;
    const float steps = (float)((1 << job->bits) - 1);
    uint8_t held[PIECE];
    Grids grids;
    for (int64_t row = begin; row < end; row++) {
        uint8_t *packed = job->codes + row * job->row_bytes;
        int64_t kept = 0;
        for (int64_t first = 0, batch; first < groups; first += batch) {
            batch = batch_of(size, groups - first);
            if (settle<X, SIZE>(job, row * groups + first, batch, grids)) return REFUSED;
            for (int64_t k = 0; k < batch; k++) {
                const Grid grid = {grids.scale[k], grids.zero[k]};
                const Stored *x = (const Stored *)job->x + (row * groups + first + k) * size;
                for (int64_t start = 0, count; start < size; start += count) {
                    count = size - start < PIECE - kept ? size - start : PIECE - kept;
                    if (SIZE && count == SIZE) code_values<X, SIZE>(x, held + kept, size, grid, steps);
                    else code_values<X, 0>(x + start, held + kept, count, grid, steps);
                    kept += count;
                    if (kept < PIECE) continue;
                    pack_codes(held, kept, job->bits, packed);
                    packed += PIECE * job->bits / 8;
                    kept = 0;
                }
            }
        }
        pack_codes(held, kept, job->bits, packed);
    }
    return DONE;
}

template <class X> int quantize_affine_of(const Job *job, int64_t begin, int64_t end) {
    return job->size == 32 ? quantize_affine_as<X, 32>(job, begin, end) : quantize_affine_as<X, 0>(job, begin, end);
}

int quantize_affine(const Job *job, int64_t begin, int64_t end) {
    return job->x_type == FLOAT32 ? quantize_affine_of<Float32>(job, begin, end)
                                  : quantize_affine_of<BFloat16>(job, begin, end);
}

template <class Y, int SIZE>
inline void restore_values(const uint8_t *__restrict__ codes, typename Y::Stored *__restrict__ y, int64_t size, Grid grid) {
    const int64_t count = SIZE ? SIZE : size;
    for (int64_t i = 0; i < count; i++) y[i] = Y::store(((float)codes[i] - grid.zero) * grid.scale);
}

template <class Y> int dequantize_affine_of(const Job *job, int64_t begin, int64_t end) {
    typedef typename Y::Stored Stored;
    const int64_t groups = job->columns / job->size;
    uint8_t held[PIECE];
    for (int64_t row = begin; row < end; row++) {
        Stored *y = (Stored *)job->y + row * job->columns;
        for (int64_t start = 0; start < job->columns; start += PIECE) {
            const int64_t stop = job->columns - start < PIECE ? job->columns : start + PIECE;
            unpack_codes(job->codes + row * job->row_bytes + start * job->bits / 8, stop - start, job->bits, held);
            for (int64_t first = start; first < stop;) {
                const int64_t group = first / job->size, over = (group + 1) * job->size;
                const int64_t last = over < stop ? over : stop, place = job->shared ? 0 : row * groups + group;
                Grid grid = {load_scale(job->scale, job->scale_type, place),
                             job->zero ? (float)job->zero[place] : -(float)job->qmin};
                if (last - first == 32) restore_values<Y, 32>(held + first - start, y + first, 32, grid);
                else restore_values<Y, 0>(held + first - start, y + first, last - first, grid);
                first = last;
            }
        }
    }
    return DONE;
}

int dequantize_affine(const Job *job, int64_t begin, int64_t end) {
    return job->y_type == FLOAT32 ? dequantize_affine_of<Float32>(job, begin, end)
                                  : dequantize_affine_of<BFloat16>(job, begin, end);
}

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
    for (int k = 0; k < 15; k++) {
        const float middle = midpoints[k], above = levels[k + 1];
        for (int64_t i = 0; i < count; i++) level[i] = relative[i] > middle ? above : level[i];
    }
    for (int64_t i = 0; i < count; i++) y[i] = X::store(level[i] * scale);
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
    for (int k = 0; k < 15; k++) {
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
        for (; done + 32 <= count; done += 32) nearest_levels<X, 32>(x + done, y + done, 32, levels, midpoints, reciprocal, value_scale);
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
    inline __m256 level(__m128i codes) const {
        __m256i places = _mm256_cvtepu8_epi32(codes);  // bit 3 says which half; the look-up reads the three below it
        __m256 low = _mm256_permutevar8x32_ps(below, places), high = _mm256_permutevar8x32_ps(above, places);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(places, 28)));
    }
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

template <class Y> int dequantize_codebook_of(const Job *job, int64_t begin, int64_t end) {
    typedef typename Y::Stored Stored;
    const LevelTable table(job->levels);
    float held[32];
    for (int64_t block = begin; block < end; block++) {
        const int64_t count = values_in(job, block);
        const uint8_t *packed = job->codes + block * job->size / 2;
        Stored *__restrict__ y = (Stored *)job->y + block * job->size;
        const float scale = ((const float *)job->scale)[block];
        int64_t start = 0;
        for (; start + 32 <= count; start += 32) {
            table.look_up(packed + start / 2, held);
            for (int i = 0; i < 32; i++) y[start + i] = Y::store(held[i] * scale);
        }
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
    uint8_t flags[PIECE];
    for (int64_t group = begin; group < end; group++) {
        const int64_t count = values_in(job, group);
        const Stored *__restrict__ x = (const Stored *)job->x + group * job->size;
        Stored *__restrict__ y = (Stored *)job->y + group * job->size;
        for (int64_t start = 0; start < count; start += PIECE) {
            const int64_t part = count - start < PIECE ? count - start : PIECE;
            unpack_flags(job->mask + group * mask_bytes + start / 8, part, flags);
            for (int64_t i = 0; i < part; i++) y[start + i] = X::store(X::load(x[start + i]) * (float)flags[i]);
        }
    }
    return DONE;
}

int mask_gradient(const Job *job, int64_t begin, int64_t end) {
    return job->x_type == FLOAT32 ? mask_gradient_of<Float32>(job, begin, end)
                                  : mask_gradient_of<BFloat16>(job, begin, end);
}

}  // namespace
