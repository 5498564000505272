// Products of a few tokens with packed weights: y[t, o] = sum over i of x[t, i] * w[o, i] (+ bias[o]), in float32.
//
// A row's weights are read once, for all tokens, and never written down: one token costs what reading the codes costs.
// What has to be hidden for that is the memory's latency: several rows that lie far apart are read at a time, which are
// as many streams, each AHEAD of its use. Codes of 4 bits become weights a block at a time (lanes.h has the ways), and
// the inputs are turned once a call to lie in the order in which those come. The sum of a lane is multiplied with its
// group's scale; zero points are left to one product with the groups' sums of inputs. Rows are independent and each is
// summed in one order, whatever the rows beside it, the tokens and the threads.
#pragma once

#include "codes.h"
#include "lanes.h"

namespace {

const int MOST_TOKENS = 4;
const int64_t BLOCK = 8 * LANES;  // codes of 4 bits in a vector of words
const int64_t SCALES = 128;       // scales of a row kept aside at a time

inline float input_of(const Job *job, int64_t place) {
    return job->x_type == FLOAT32 ? ((const float *)job->x)[place] : BFloat16::load(((const uint16_t *)job->x)[place]);
}

// Whether vectors do this job's rows: a word's eight codes share a scale.
inline bool has_blocks(const Job *job) {
#ifdef STROP_PLAIN_PRODUCTS
    return false;
#else
    return job->bits == 8 || (job->bits == 4 && (job->size % 8 == 0 || job->size == job->columns));
#endif
}

#ifdef STROP_DECODERS
enum Decoding { BY_TABLE, BY_INTEGERS, BY_PLANES };

// How a job's 4-bit codes become weights (lanes.h); elsewhere by table.
inline Decoding decoding_of(const Job *job) {
    if (!job->levels) return BY_INTEGERS;
    return job->size % 32 == 0 || job->size == job->columns ? BY_PLANES : BY_TABLE;
}
#endif

#ifndef STROP_PLAIN_PRODUCTS
// A block's inputs in the order in which its weights come, and what the sums begin with.
template <class Decoder, class X>
inline void lay_block(const typename X::Stored *__restrict__ x, float *__restrict__ inputs, float *__restrict__ firsts) {
    float totals[LANES] = {0};
    for (int64_t step = 0; step < 8; step++)
        for (int64_t lane = 0; lane < LANES; lane++) {
            const float value = X::load(x[Decoder::place(step, lane)]);
            inputs[step * LANES + lane] = value * Decoder::factor(step);
            totals[lane] += value;
        }
    for (int64_t lane = 0; lane < LANES; lane++) firsts[lane] = Decoder::first(totals[lane]);
}

template <class Decoder, class X> void lay_blocks(const typename X::Stored *x, int64_t columns, float *inputs) {
    float *firsts = inputs + first_place(columns), last[BLOCK] = {0};
    int64_t start = 0;
    for (; start + BLOCK <= columns; start += BLOCK)
        lay_block<Decoder, X>(x + start, inputs + start, firsts + start / 8);
    if (start == columns) return;
    for (int64_t i = start; i < columns; i++) last[i - start] = X::load(x[i]);
    lay_block<Decoder, Float32>(last, inputs + start, firsts + start / 8);
}
#endif

// A token's inputs as float32, turned where rows are read in blocks of 4-bit codes.
template <class X> void lay_inputs(const Job *job, int64_t token, float *inputs) {
    const int64_t columns = job->columns;
    const typename X::Stored *x = (const typename X::Stored *)job->x + token * columns;
#ifndef STROP_PLAIN_PRODUCTS
    if (has_blocks(job) && job->bits == 4) {
#ifdef STROP_DECODERS
        if (decoding_of(job) == BY_INTEGERS) return lay_blocks<Integers, X>(x, columns, inputs);
        if (decoding_of(job) == BY_PLANES) return lay_blocks<Planes, X>(x, columns, inputs);
#endif
        return lay_blocks<Looked, X>(x, columns, inputs);
    }
#endif
    for (int64_t i = 0; i < columns; i++) inputs[i] = X::load(x[i]);
}

// Units: tokens. The inputs as float32, and the groups' sums.
int prepare_product(const Job *job, int64_t begin, int64_t end) {
    const int64_t columns = job->columns, room = input_room(columns), groups = columns / job->size;
    for (int64_t token = begin; token < end; token++) {
        float *inputs = job->inputs + token * room, *sums = job->sums + token * sums_room(groups);
        memset(inputs, 0, (size_t)room * 4);
        if (job->x_type == FLOAT32) lay_inputs<Float32>(job, token, inputs);
        else lay_inputs<BFloat16>(job, token, inputs);
        if (!job->zero) continue;
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

// One row, whatever its bits and groups.
void plain_row(const Job *job, int64_t row, float *sums) {
    const int64_t columns = job->columns, room = input_room(columns), groups = columns / job->size;
    uint8_t codes[PIECE];
    float weights[PIECE];
    for (int64_t start = 0; start < columns; start += PIECE) {
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
                const float *inputs = job->inputs + token * room + first;
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
#define EACH_ROW _Pragma("GCC unroll 4") for (int r = 0; r < ROWS; r++)
#define EACH_TOKEN _Pragma("GCC unroll 4") for (int t = 0; t < TOKENS; t++)

// The scales of some groups of ROWS rows, `apart` rows from each other.
template <int ROWS>
inline void settle_scales(const Job *job, int64_t row, int64_t apart, int64_t first, int64_t count,
                          float (&scales)[ROWS][SCALES + 16]) {
    const int64_t groups = job->columns / job->size;
    for (int r = 0; r < ROWS; r++) {
        const int64_t place = job->shared ? 0 : (row + r * apart) * groups + first;
        load_scales(job->scale, job->scale_type, place, count, scales[r]);
        const int64_t bytes = job->scale_type == FLOAT32 ? 4 : 2;  // those that come next are asked for
        const char *next = (const char *)job->scale + (place + count) * bytes;
        for (int64_t i = 0; i < count * bytes; i += 64) __builtin_prefetch(next + i);
    }
}

// What zero points add to a row: its codes were taken less `middle`, not less their zero points.
template <int TOKENS> void zero_points(const Job *job, int64_t row, float middle, Lanes (&added)[TOKENS]) {
    const int64_t groups = job->columns / job->size, room = sums_room(groups);
    float scales[SCALES], factors[SCALES + LANES];
    EACH_TOKEN added[t] = zeros();
    for (int64_t first = 0; first < groups; first += SCALES) {
        const int64_t count = groups - first < SCALES ? groups - first : SCALES;
        const int64_t place = job->shared ? 0 : row * groups + first;
        const uint8_t *__restrict__ zero = job->zero + place;
        load_scales(job->scale, job->scale_type, place, count, scales);
        for (int64_t k = 0; k < count; k++) factors[k] = scales[k] * (middle - (float)zero[k]);
        for (int64_t k = count; k < count + LANES; k++) factors[k] = 0;
        for (int64_t k = 0; k < count; k += LANES)
            EACH_TOKEN added[t] = times_plus(load(factors + k), load(job->sums + t * room + first + k), added[t]);
        __builtin_prefetch(zero + AHEAD);
    }
}

void read_last(Words &words, const uint8_t *from, int64_t bytes) {
    uint8_t padded[BLOCK / 2] = {0};
    memcpy(padded, from, (size_t)bytes);
    words.read(padded);
}

// What the codes less `middle` came to, made up for their zero points, in one number a row and token.
template <int ROWS, int TOKENS>
inline void settle_totals(const Job *job, int64_t row, int64_t apart, float middle, Lanes (*sums)[TOKENS],
                          float *totals) {
    if (job->zero) {
        EACH_ROW {
            Lanes added[TOKENS];
            zero_points<TOKENS>(job, row + r * apart, middle, added);
            EACH_TOKEN sums[r][t] = plus(sums[r][t], added[t]);
        }
    }
    EACH_ROW EACH_TOKEN totals[r * TOKENS + t] = total_of(sums[r][t]);
}

// ROWS rows of 4-bit codes, `apart` rows from each other: totals [ROWS][TOKENS].
template <class Decoder, int ROWS, int TOKENS>
void rows_of_4_bits(const Job *job, int64_t row, int64_t apart, const float *levels, float *totals) {
    const int64_t columns = job->columns, size = job->size, room = input_room(columns);
    const int64_t blocks = (columns + BLOCK - 1) / BLOCK, groups = columns / size;
    const int64_t together = groups == 1 ? blocks : (SCALES - 18) * size / BLOCK;  // blocks whose scales are kept aside
    const int64_t whole = BLOCK / size, part = BLOCK % size, row_bytes = job->row_bytes;
    const uint8_t *packed = job->codes + row * row_bytes;
    const float *turned = job->inputs, *firsts = turned + first_place(columns);
    const Decoder decoder(levels);
    const float each = groups == 1 ? 0.0f : 1.0f / (float)size;
    float starts[LANES], scales[ROWS][SCALES + 16] = {{0}};
    for (int64_t lane = 0; lane < LANES; lane++) starts[lane] = (float)Decoder::inside(lane) * each;
    Lanes sums[ROWS][TOKENS];
    EACH_ROW EACH_TOKEN sums[r][t] = zeros();
    for (int64_t start = 0; start < blocks; start += together) {
        const int64_t stop = blocks - start < together ? blocks : start + together;
        const int64_t first = start * BLOCK / size, over = stop * BLOCK < columns ? stop * BLOCK : columns;
        settle_scales(job, row, apart, first, (over - 1) / size + 1 - first, scales);
        int64_t group = 0, into = start * BLOCK - first * size;  // the block's first weight: its group, and where in it
        for (int64_t block = start; block < stop; block++) {
            const Places places(times_plus(all((float)into), all(each), load(starts)));
            Words words[ROWS];
            EACH_ROW {
                const uint8_t *from = packed + r * apart * row_bytes + block * BLOCK / 2;
                if ((block + 1) * BLOCK <= columns) words[r].read(from);
                else read_last(words[r], from, row_bytes - block * BLOCK / 2);
                __builtin_prefetch(from + AHEAD);
            }
            Lanes inside[ROWS][TOKENS];
            if constexpr (Decoder::BY_STEPS) {
                EACH_ROW EACH_TOKEN inside[r][t] = zeros();
#pragma GCC unroll 8
                for (int step = 0; step < 8; step++) {
                    const float *inputs = turned + block * BLOCK + step * LANES;
                    Lanes x[TOKENS];
                    EACH_TOKEN x[t] = load(inputs + t * room);
                    EACH_ROW {
                        const Lanes weights = decoder.step(words[r], step);
                        EACH_TOKEN inside[r][t] = times_plus(weights, x[t], inside[r][t]);
                    }
                }
            } else {
                EACH_ROW {
                    Lanes weights[8];
                    decoder.decode(words[r], weights);
                    EACH_TOKEN {  // two sums, for each waits for its last addition
                        const float *inputs = turned + t * room + block * BLOCK;
                        Lanes even = load(firsts + t * room + block * LANES), odd = zeros();
#pragma GCC unroll 4
                        for (int step = 0; step < 8; step += 2) {
                            even = times_plus(weights[step], load(inputs + step * LANES), even);
                            odd = times_plus(weights[step + 1], load(inputs + (step + 1) * LANES), odd);
                        }
                        inside[r][t] = plus(even, odd);
                    }
                }
            }
            EACH_ROW {
                const Lanes scale = places.pick(scales[r] + group);
                EACH_TOKEN sums[r][t] = times_plus(inside[r][t], scale, sums[r][t]);
            }
            group += whole;
            into += part;
            if (into >= size) into -= size, group++;
        }
    }
    settle_totals<ROWS, TOKENS>(job, row, apart, 8.0f, sums, totals);
}

Lanes last_bytes(const uint8_t *from, int64_t count) {
    uint8_t padded[LANES];
    memset(padded, 128, sizeof padded);  // zeros, less 128
    memcpy(padded, from, (size_t)count);
    return signed_bytes(padded);
}

// The same for codes of 8 bits.
template <int ROWS, int TOKENS> void rows_of_8_bits(const Job *job, int64_t row, int64_t apart, float *totals) {
    const int64_t columns = job->columns, size = job->size, room = input_room(columns), groups = columns / size;
    const uint8_t *codes = job->codes + row * job->row_bytes;
    float scales[ROWS][SCALES + 16];
    Lanes sums[ROWS][TOKENS];
    EACH_ROW EACH_TOKEN sums[r][t] = zeros();
    for (int64_t first = 0; first < groups; first += SCALES) {
        const int64_t count = groups - first < SCALES ? groups - first : SCALES;
        settle_scales(job, row, apart, first, count, scales);
        for (int64_t group = 0; group < count; group++) {
            int64_t i = (first + group) * size;
            const int64_t end = i + size;
            Lanes even[ROWS][TOKENS], odd[ROWS][TOKENS];
            EACH_ROW EACH_TOKEN even[r][t] = odd[r][t] = zeros();
            for (; i + 2 * LANES <= end; i += 2 * LANES) {
                EACH_ROW {
                    const uint8_t *from = codes + r * apart * job->row_bytes + i;
                    const Lanes one = signed_bytes(from), other = signed_bytes(from + LANES);
                    __builtin_prefetch(from + AHEAD);
                    EACH_TOKEN {
                        even[r][t] = times_plus(one, load(job->inputs + t * room + i), even[r][t]);
                        odd[r][t] = times_plus(other, load(job->inputs + t * room + i + LANES), odd[r][t]);
                    }
                }
            }
            for (; i < end; i += LANES) {
                EACH_ROW {
                    const uint8_t *from = codes + r * apart * job->row_bytes + i;
                    const Lanes one = end - i < LANES ? last_bytes(from, end - i) : signed_bytes(from);
                    EACH_TOKEN even[r][t] = times_plus(one, load(job->inputs + t * room + i), even[r][t]);
                }
            }
            EACH_ROW {
                const Lanes scale = all(scales[r][group]);
                EACH_TOKEN sums[r][t] = times_plus(plus(even[r][t], odd[r][t]), scale, sums[r][t]);
            }
        }
    }
    settle_totals<ROWS, TOKENS>(job, row, apart, 128.0f, sums, totals);
}
#endif

inline void finish(const Job *job, int64_t row, int64_t token, float sum) {
    const float bias = !job->bias                ? 0.0f
                       : job->x_type == FLOAT32 ? ((const float *)job->bias)[row]
                                                 : BFloat16::load(((const uint16_t *)job->bias)[row]);
    const int64_t place = token * job->rows + row;
    if (job->x_type == FLOAT32) ((float *)job->y)[place] = sum + bias;
    else ((uint16_t *)job->y)[place] = bfloat16_of(sum + bias);
}

#ifndef STROP_PLAIN_PRODUCTS
template <int ROWS, int TOKENS> void rows_by_vectors(const Job *job, int64_t row, int64_t apart, const float *levels) {
    float totals[ROWS * TOKENS];
    if (job->bits == 8) rows_of_8_bits<ROWS, TOKENS>(job, row, apart, totals);
#ifdef STROP_DECODERS
    else if (decoding_of(job) == BY_INTEGERS) rows_of_4_bits<Integers, ROWS, TOKENS>(job, row, apart, levels, totals);
    else if (decoding_of(job) == BY_PLANES) rows_of_4_bits<Planes, ROWS, TOKENS>(job, row, apart, levels, totals);
#endif
    else rows_of_4_bits<Looked, ROWS, TOKENS>(job, row, apart, levels, totals);
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < TOKENS; t++) finish(job, row + r * apart, t, totals[r * TOKENS + t]);
}

template <int TOKENS> void all_by_vectors(const Job *job, int64_t begin, int64_t end, const float *levels) {
    const int ROWS = TOKENS == 1 ? 4 : 2;  // as many as registers hold the sums of
    const int64_t apart = (end - begin) / ROWS;
    for (int64_t row = begin; row < begin + apart; row++) rows_by_vectors<ROWS, TOKENS>(job, row, apart, levels);
    for (int64_t row = begin + ROWS * apart; row < end; row++) rows_by_vectors<1, TOKENS>(job, row, 0, levels);
}
#endif

int few_tokens(const Job *job, int64_t begin, int64_t end) {
#ifndef STROP_PLAIN_PRODUCTS
    if (has_blocks(job)) {
        float levels[16];
        for (int code = 0; code < 16; code++) levels[code] = job->levels ? job->levels[code] : (float)(code - 8);
        switch (job->tokens) {
            case 1: all_by_vectors<1>(job, begin, end, levels); break;
            case 2: all_by_vectors<2>(job, begin, end, levels); break;
            case 3: all_by_vectors<3>(job, begin, end, levels); break;
            default: all_by_vectors<4>(job, begin, end, levels); break;
        }
        return DONE;
    }
#endif
    for (int64_t row = begin; row < end; row++) {
        float sums[MOST_TOKENS] = {0};
        plain_row(job, row, sums);
        for (int64_t token = 0; token < job->tokens; token++) finish(job, row, token, sums[token]);
    }
    return DONE;
}

const int64_t STRETCH = 64;  // rows whose codes the caches keep until all tokens have met them

// Units: rows of the weight, which are columns of y.
int product(const Job *job, int64_t begin, int64_t end) {
    if (job->tokens <= MOST_TOKENS) return few_tokens(job, begin, end);
    const int64_t groups = job->columns / job->size, bytes = job->x_type == FLOAT32 ? 4 : 2;
    for (int64_t row = begin; row < end; row += STRETCH) {
        const int64_t stop = end - row < STRETCH ? end : row + STRETCH;
        for (int64_t token = 0; token < job->tokens; token += MOST_TOKENS) {
            Job part = *job;
            part.tokens = job->tokens - token < MOST_TOKENS ? job->tokens - token : MOST_TOKENS;
            part.inputs += token * input_room(job->columns);
            part.sums += token * sums_room(groups);
            part.y = (char *)job->y + token * job->rows * bytes;
            few_tokens(&part, row, stop);
        }
    }
    return DONE;
}

}  // namespace
