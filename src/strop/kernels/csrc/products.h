// Products of a few tokens with packed weights: y[t, o] = sum over i of x[t, i] * w[o, i] (+ bias[o]), in float32.
//
// A row's weights are read once, for all tokens, and never written down: one token costs what reading the codes costs.
// Codes of 4 bits are looked up in a table of 16 floats that registers hold, eight to a 32-bit word: word j of a block
// has the weights 8 j to 8 j + 7, so the inputs are turned once a call to lie in that order. The sum of a group is
// multiplied with its scale; a zero point is left to one product with the group's sum of inputs. Rows are independent,
// so the order of summation does not depend on the threads.
#pragma once

#include "codes.h"

namespace {

const int MOST_TOKENS = 4;

#if defined(__AVX512F__)
typedef __m512 Lanes;
const int64_t LANES = 16;
inline Lanes zeros() { return _mm512_setzero_ps(); }
inline Lanes all(float value) { return _mm512_set1_ps(value); }
inline Lanes load(const float *from) { return _mm512_loadu_ps(from); }
inline void store(float *to, Lanes lanes) { _mm512_storeu_ps(to, lanes); }
inline Lanes plus(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
inline Lanes times_plus(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline Lanes signed_bytes(const uint8_t *codes) {  // stored codes less 128
    __m128i bytes = _mm_xor_si128(_mm_loadu_si128((const __m128i *)codes), _mm_set1_epi8((char)0x80));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
struct Words {
    __m512i words;
    inline Words(const uint8_t *packed) { words = _mm512_loadu_si512(packed); }
    inline void next() { words = _mm512_srli_epi32(words, 4); }
};
struct Table16 {
    __m512 levels;
    inline Table16(const float *from) { levels = _mm512_loadu_ps(from); }
    inline Lanes of(Words at) const { return _mm512_permutexvar_ps(at.words, levels); }  // reads four bits of a word
};
struct Repeat {  // lane j takes the scale of weight 8 j of its block
    __m512i places;
    inline Repeat(int64_t size) {
        int32_t from[16];
        for (int64_t j = 0; j < 16; j++) from[j] = (int32_t)(8 * j / size);
        places = _mm512_loadu_si512(from);
    }
    inline Lanes of(const float *scales) const { return _mm512_permutexvar_ps(places, _mm512_loadu_ps(scales)); }
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
inline Lanes signed_bytes(const uint8_t *codes) {
    __m128i bytes = _mm_xor_si128(_mm_loadl_epi64((const __m128i *)codes), _mm_set1_epi8((char)0x80));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
struct Words {
    __m256i words;
    inline Words(const uint8_t *packed) { words = _mm256_loadu_si256((const __m256i *)packed); }
    inline void next() { words = _mm256_srli_epi32(words, 4); }
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
struct Repeat {
    __m256i places;
    inline Repeat(int64_t size) {
        int32_t from[8];
        for (int64_t j = 0; j < 8; j++) from[j] = (int32_t)(8 * j / size);
        places = _mm256_loadu_si256((const __m256i *)from);
    }
    inline Lanes of(const float *scales) const { return _mm256_permutevar8x32_ps(_mm256_loadu_ps(scales), places); }
};
#else
#define STROP_PLAIN_PRODUCTS
const int64_t LANES = 16;
#endif

const int64_t BLOCK = 8 * LANES;  // codes of 4 bits in a vector of words
const int64_t SCALES = 256;       // scales of a row kept aside at a time

inline float input_of(const Job *job, int64_t place) {
    return job->x_type == FLOAT32 ? ((const float *)job->x)[place] : BFloat16::load(((const uint16_t *)job->x)[place]);
}

// Whether the vectors' path takes whole blocks of this job's rows: a lane's eight weights share a scale.
inline bool has_blocks(const Job *job) {
    const int64_t size = job->size;
#ifdef STROP_PLAIN_PRODUCTS
    return false;
#else
    if (job->bits == 8) return size % LANES == 0;
    return job->bits == 4 && (size % BLOCK == 0 || (BLOCK % size == 0 && size % 8 == 0));
#endif
}

// Units: tokens. The inputs as float32, turned where rows are read in blocks of 4-bit codes, and the groups' sums.
int prepare_product(const Job *job, int64_t begin, int64_t end) {
    const int64_t columns = job->columns, groups = columns / job->size;
    const int64_t turned = has_blocks(job) && job->bits == 4 ? columns / BLOCK * BLOCK : 0;
    for (int64_t token = begin; token < end; token++) {
        float *inputs = job->inputs + token * columns, *sums = job->sums + token * groups;
        for (int64_t i = 0; i < turned; i++) {
            const int64_t block = i / BLOCK, lane = i % BLOCK / 8, step = i % 8;
            inputs[block * BLOCK + step * LANES + lane] = input_of(job, token * columns + i);
        }
        for (int64_t i = turned; i < columns; i++) inputs[i] = input_of(job, token * columns + i);
        for (int64_t group = 0; group < groups; group++) {
            float lanes[16] = {0};
            for (int64_t i = 0; i < job->size; i++)
                lanes[i % 16] += input_of(job, token * columns + group * job->size + i);
            sums[group] = 0;
            for (int lane = 0; lane < 16; lane++) sums[group] += lanes[lane];
        }
    }
    return DONE;
}

// The part from `from` on of one row, whatever its bits and groups; `from` is a whole byte of the row.
void plain_row(const Job *job, int64_t row, int64_t from, float *sums) {
    const int64_t columns = job->columns, groups = columns / job->size;
    uint8_t codes[PIECE];
    float weights[PIECE];
    for (int64_t start = from; start < columns; start += PIECE) {
        const int64_t stop = columns - start < PIECE ? columns : start + PIECE;
        unpack_codes(job->codes + row * job->row_bytes + start * job->bits / 8, stop - start, job->bits, codes);
        for (int64_t first = start, last; first < stop; first = last) {
            const int64_t group = first / job->size, place = job->shared ? 0 : row * groups + group;
            last = (group + 1) * job->size < stop ? (group + 1) * job->size : stop;
            const float scale = load_scale(job->scale, job->scale_type, place);
            const float zero = job->zero ? (float)job->zero[place] : -(float)job->qmin;
            const int64_t count = last - first;
            if (job->levels) {
                for (int64_t i = 0; i < count; i++) weights[i] = job->levels[codes[first - start + i] & 15];
            } else {
                for (int64_t i = 0; i < count; i++) weights[i] = (float)codes[first - start + i] - zero;
            }
            for (int64_t token = 0; token < job->tokens; token++) {
                const float *inputs = job->inputs + token * columns + first;
                float lanes[16] = {0}, total = 0;
                int64_t i = 0;
                for (; i + 16 <= count; i += 16)
                    for (int lane = 0; lane < 16; lane++) lanes[lane] += weights[i + lane] * inputs[i + lane];
                for (; i < count; i++) lanes[i % 16] += weights[i] * inputs[i];
                for (int lane = 0; lane < 16; lane++) total += lanes[lane];
                sums[token] += total * scale;
            }
        }
    }
}

#ifndef STROP_PLAIN_PRODUCTS
inline float total_of(Lanes lanes) {
    float each[LANES], total = 0;
    store(each, lanes);
    for (int64_t lane = 0; lane < LANES; lane++) total += each[lane];
    return total;
}

// Whole blocks of a row of 4-bit codes, for TOKENS tokens; says how many columns those were.
template <int TOKENS> int64_t row_of_4_bits(const Job *job, int64_t row, const float *levels, float *sums) {
    const int64_t columns = job->columns, size = job->size, groups = columns / size, blocks = columns / BLOCK;
    const int64_t per_block = size < BLOCK ? BLOCK / size : 1, blocks_each = size < BLOCK ? 1 : size / BLOCK;
    const int64_t together = SCALES / per_block * blocks_each;  // blocks whose scales are kept aside
    const uint8_t *packed = job->codes + row * job->row_bytes;
    const Table16 table(levels);
    const Repeat repeat(size < BLOCK ? size : BLOCK);
    float scales[SCALES + 16] = {0};
    Lanes all_sums[TOKENS];
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++) all_sums[t] = zeros();
    for (int64_t start = 0; start < blocks; start += together) {
        const int64_t stop = blocks - start < together ? blocks : start + together;
        const int64_t first = start * BLOCK / size, count = (stop * BLOCK - 1) / size + 1 - first;
        load_scales(job->scale, job->scale_type, job->shared ? 0 : row * groups + first, count, scales);
        for (int64_t block = start; block < stop; block++) {
            Words words(packed + block * BLOCK / 2);
            Lanes even[TOKENS], odd[TOKENS];
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; t++) even[t] = odd[t] = zeros();
#pragma GCC unroll 4
            for (int step = 0; step < 8; step += 2) {
                const float *inputs = job->inputs + block * BLOCK + step * LANES;
                const Lanes one = table.of(words);
                words.next();
                const Lanes other = table.of(words);
                words.next();
#pragma GCC unroll 4
                for (int t = 0; t < TOKENS; t++) {
                    even[t] = times_plus(one, load(inputs + t * columns), even[t]);
                    odd[t] = times_plus(other, load(inputs + t * columns + LANES), odd[t]);
                }
            }
            const Lanes scale = size < BLOCK ? repeat.of(scales + (block - start) * per_block)
                                             : all(scales[(block - start) / blocks_each]);
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; t++) all_sums[t] = times_plus(plus(even[t], odd[t]), scale, all_sums[t]);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++) sums[t] += total_of(all_sums[t]);
    return blocks * BLOCK;
}

template <int TOKENS> void row_of_8_bits(const Job *job, int64_t row, float *sums) {
    const int64_t columns = job->columns, size = job->size, groups = columns / size;
    const uint8_t *codes = job->codes + row * job->row_bytes;
    Lanes all_sums[TOKENS];
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++) all_sums[t] = zeros();
    for (int64_t group = 0; group < groups; group++) {
        const Lanes scale = all(load_scale(job->scale, job->scale_type, job->shared ? 0 : row * groups + group));
        Lanes even[TOKENS], odd[TOKENS];
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; t++) even[t] = odd[t] = zeros();
        int64_t i = group * size;
        for (; i + 2 * LANES <= (group + 1) * size; i += 2 * LANES) {
            const Lanes one = signed_bytes(codes + i), other = signed_bytes(codes + i + LANES);
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; t++) {
                even[t] = times_plus(one, load(job->inputs + t * columns + i), even[t]);
                odd[t] = times_plus(other, load(job->inputs + t * columns + i + LANES), odd[t]);
            }
        }
        if (i < (group + 1) * size) {
            const Lanes one = signed_bytes(codes + i);
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; t++) even[t] = times_plus(one, load(job->inputs + t * columns + i), even[t]);
        }
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; t++) all_sums[t] = times_plus(plus(even[t], odd[t]), scale, all_sums[t]);
    }
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++) sums[t] += total_of(all_sums[t]);
}

// What the blocks left out: the codes were taken less `middle`, not less their zero points.
inline void add_zero_points(const Job *job, int64_t row, int64_t done, float middle, float *sums) {
    const int64_t groups = job->columns / job->size;
    for (int64_t group = 0; group < done / job->size; group++) {
        const int64_t place = job->shared ? 0 : row * groups + group;
        const float factor = load_scale(job->scale, job->scale_type, place) * (middle - (float)job->zero[place]);
        for (int64_t t = 0; t < job->tokens; t++) sums[t] += factor * job->sums[t * groups + group];
    }
}

template <int TOKENS> int64_t blocks_of_row(const Job *job, int64_t row, const float *levels, float *sums) {
    if (job->bits == 4) return row_of_4_bits<TOKENS>(job, row, levels, sums);
    row_of_8_bits<TOKENS>(job, row, sums);
    return job->columns;
}
#endif

// Units: rows of the weight, which are columns of y.
int product(const Job *job, int64_t begin, int64_t end) {
#ifndef STROP_PLAIN_PRODUCTS
    const bool blocks = has_blocks(job);
    const float middle = job->bits == 8 ? 128.0f : 8.0f;
    float levels[16];
    for (int code = 0; code < 16; code++) levels[code] = job->levels ? job->levels[code] : (float)code - middle;
#endif
    for (int64_t row = begin; row < end; row++) {
        float sums[MOST_TOKENS] = {0};
        int64_t done = 0;
#ifndef STROP_PLAIN_PRODUCTS
        if (blocks) {
            switch (job->tokens) {
                case 1: done = blocks_of_row<1>(job, row, levels, sums); break;
                case 2: done = blocks_of_row<2>(job, row, levels, sums); break;
                case 3: done = blocks_of_row<3>(job, row, levels, sums); break;
                default: done = blocks_of_row<4>(job, row, levels, sums); break;
            }
            if (job->zero) add_zero_points(job, row, done, middle, sums);
        }
#endif
        if (done < job->columns) plain_row(job, row, done, sums);
        const float bias = !job->bias                ? 0.0f
                           : job->x_type == FLOAT32 ? ((const float *)job->bias)[row]
                                                     : BFloat16::load(((const uint16_t *)job->bias)[row]);
        for (int64_t token = 0; token < job->tokens; token++) {
            const float value = sums[token] + bias;
            const int64_t place = token * job->rows + row;
            if (job->x_type == FLOAT32) ((float *)job->y)[place] = value;
            else ((uint16_t *)job->y)[place] = bfloat16_of(value);
        }
    }
    return DONE;
}

}  // namespace
