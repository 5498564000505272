// Integers of 2 to 8 bits with a scale, and maybe a zero point, for each group (numerics/scales.py and grid.py).
#pragma once

#include "codes.h"

namespace {

const int64_t BATCH = 32;   // groups whose scales are found together, so that vectors find them too
const int64_t BATCH_VALUES = 4096;

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

template <class X, int SIZE>
inline void round_values(const typename X::Stored *__restrict__ x, typename X::Stored *__restrict__ y, int64_t size,
                         Grid grid, float steps) {
    const int64_t count = SIZE ? SIZE : size;
    for (int64_t i = 0; i < count; i++) {
        const float code = code_of(X::load(x[i]), grid, steps);
        y[i] = X::store_number((code - grid.zero) * grid.scale);
    }
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
    return job->x_type == FLOAT32 ? round_affine_of<Float32>(job, begin, end)
                                  : round_affine_of<BFloat16>(job, begin, end);
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
inline void restore_values(const uint8_t *__restrict__ codes, typename Y::Stored *__restrict__ y, int64_t size,
                           Grid grid) {
    const int64_t count = SIZE ? SIZE : size;
    for (int64_t i = 0; i < count; i++) y[i] = Y::store(((float)codes[i] - grid.zero) * grid.scale);
}

// A group of at most 4 bits has sixteen different values: in bfloat16 they are rounded once, and 32 codes at a time look
// those up. Says how many it did.
template <class Y> inline int64_t look_up_values(const uint8_t *, typename Y::Stored *, int64_t, Grid) { return 0; }

#if defined(__AVX2__)
template <> inline int64_t look_up_values<BFloat16>(const uint8_t *codes, uint16_t *y, int64_t count, Grid grid) {
    if (count < 32) return 0;
    uint16_t values[16];
    for (int code = 0; code < 16; code++) values[code] = bfloat16_of(((float)code - grid.zero) * grid.scale);
    const __m128i one = _mm_loadu_si128((const __m128i *)values), other = _mm_loadu_si128((const __m128i *)values + 1);
    const __m128i byte = _mm_set1_epi16(255);
    const __m256i low = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(one, byte), _mm_and_si128(other, byte)));
    const __m256i high = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(one, 8), _mm_srli_epi16(other, 8)));
    int64_t done = 0;
    for (; done + 32 <= count; done += 32) {
        const __m256i places = _mm256_permute4x64_epi64(_mm256_loadu_si256((const __m256i *)(codes + done)), 0xD8);
        const __m256i lows = _mm256_shuffle_epi8(low, places), highs = _mm256_shuffle_epi8(high, places);
        _mm256_storeu_si256((__m256i *)(y + done), _mm256_unpacklo_epi8(lows, highs));
        _mm256_storeu_si256((__m256i *)(y + done + 16), _mm256_unpackhi_epi8(lows, highs));
    }
    return done;
}
#endif

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
                if (job->bits <= 4) first += look_up_values<Y>(held + first - start, y + first, last - first, grid);
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

}  // namespace
