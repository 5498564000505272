// A step of AdamW with both moments in 8 bits, a block of 256 numbers after the other (training/adamw8bit.py): codes
// become numbers, the weights move by them, and the numbers become codes again, all while they are in cache. Every
// operation is one of float32's own, in the reference's order; levels are found by its tables (numerics/dynamic8.py).
#pragma once

#include "numbers.h"

namespace {

const int64_t BLOCK_OF_MOMENTS = 256;
const float LEAST_SCALE = 1e-38f;

inline void decode_moment(const Moment *moment, int64_t block, int64_t count, float *values) {
    const uint8_t *codes = moment->codes + block * BLOCK_OF_MOMENTS;
    const float scale = moment->scales[block], *levels = moment->levels;
    for (int64_t i = 0; i < count; i++) values[i] = levels[codes[i]] * scale;
}

// A cell is the upper half of a number; it holds at most one midpoint between levels.
template <bool SIGNED> void encode_moment(const Moment *moment, int64_t block, int64_t count, const float *values) {
    uint8_t *codes = moment->codes + block * BLOCK_OF_MOMENTS;
    const float scale = peak_of<Float32, 0>(values, count), reciprocal = 1.0f / (scale < LEAST_SCALE ? LEAST_SCALE : scale);
    float relative[BLOCK_OF_MOMENTS];
    for (int64_t i = 0; i < count; i++) relative[i] = values[i] * reciprocal;
    for (int64_t i = 0; i < count; i++) {
        const uint32_t cell = (bits_of(relative[i]) >> 16) ^ 0x8000;  // ordered as signed integers are
        const uint8_t code = (uint8_t)(moment->below[cell] + (relative[i] > moment->edges[cell]));
        codes[i] = !SIGNED && code == 0 && values[i] > 0.0f ? 1 : code;
    }
    moment->scales[block] = scale;
}

template <class X> void adam_block(const AdamJob *job, int64_t block) {
    const int64_t start = block * BLOCK_OF_MOMENTS, left = job->rows - start;
    const int64_t count = left < BLOCK_OF_MOMENTS ? left : BLOCK_OF_MOMENTS;
    const typename X::Stored *__restrict__ gradient = (const typename X::Stored *)job->gradient + start;
    float *__restrict__ weight = job->weight + start;
    float first[BLOCK_OF_MOMENTS], second[BLOCK_OF_MOMENTS];
    decode_moment(&job->first, block, count, first);
    decode_moment(&job->second, block, count, second);
    ask_ahead(weight, count * 4);
    ask_ahead(gradient, count * (int64_t)sizeof *gradient);
    for (int64_t i = 0; i < count; i++) {
        const float g = X::load(gradient[i]);
        first[i] = first[i] + (g - first[i]) * job->new_first;
        second[i] = second[i] * job->old_second + g * g * job->new_second;
        const float root = __builtin_sqrtf(second[i]) * job->root_scale + job->eps;
        weight[i] = weight[i] * job->decay + first[i] / root * job->rate;
    }
    encode_moment<true>(&job->first, block, count, first);
    encode_moment<false>(&job->second, block, count, second);
}

// Units: blocks.
int adam_step(const AdamJob *job, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
        if (job->gradient_type == FLOAT32) adam_block<Float32>(job, block);
        else adam_block<BFloat16>(job, block);
    }
    return DONE;
}

}  // namespace
