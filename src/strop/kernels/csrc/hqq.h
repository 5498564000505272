// HQQ's scales of integer grids (methods/hqq.py): a group goes through all its iterations while it is in cache.
//
// What the method raises to a power goes through logarithms here, good to about 1e-6 and the same on every instruction
// set; sums are those of 16 lanes, in one order.
#pragma once

#include "numbers.h"

namespace {

const int64_t SUM_LANES = 16;
const float LEAST_ERROR = 1e-20f;  // smaller errors, in steps, count as this, so that they have a logarithm
const float LARGER = 18446744073709551616.0f;  // 2^64, with which every scale but zero is a normal number

// Of a positive, normal number: its exponent, and the series of 2 / ln 2 * artanh((m - 1) / (m + 1)) for the rest.
inline float log2_of(float value) {
    const uint32_t bits = bits_of(value), rest = bits & 0x007FFFFF;
    const uint32_t upper = rest > 0x3504F3 ? 1 : 0;  // beyond the root of 2, half of it
    const float m = float_of(rest | (127 - upper) << 23), s = (m - 1.0f) / (m + 1.0f), t = s * s;
    const float series = s * (2.8853900818f + t * (0.9617966939f + t * (0.5770780164f + t * 0.4121985831f)));
    return (float)((int32_t)(bits >> 23) - 127 + (int32_t)upper) + series;
}

// Of -126 to 126; beyond, that of the nearer end.
inline float exp2_of(float value) {
    float bounded = value < -126.0f ? -126.0f : value;
    bounded = bounded > 126.0f ? 126.0f : bounded;
    const float whole = (bounded + ROUND) - ROUND, f = bounded - whole;
    const float high = 0.00961812911f + f * (0.00133335581f + f * 0.000154035304f);
    const float series = 1.0f + f * (0.693147181f + f * (0.240226507f + f * (0.0555041087f + f * high)));
    return float_of(bits_of(series) + ((uint32_t)(int32_t)whole << 23));
}

inline float as_stored(float value, int32_t type) {
    if (type == FLOAT32) return value;
    if (type == BFLOAT16) return BFloat16::load(bfloat16_of(value));
    const float half = to_float16(value < 0 ? -value : value);
    return value < 0 ? -half : half;
}

struct Measured {
    float total, pull, strength;
};

inline float sum_of_lanes(const float *lanes) {
    float total = 0;
    for (int64_t lane = 0; lane < SUM_LANES; lane++) total += lanes[lane];
    return total;
}

// Sums over a group, in steps: |d| * most, d no more than `most` * code, code^2, with most = |d|^(p - 1) / beta.
inline Measured measured(const HqqJob *job, const float *x, float scale, float zero, float log2_beta) {
    const float low = job->low - zero, high = job->high - zero, power = job->power - 1.0f;
    float totals[SUM_LANES] = {0}, pulls[SUM_LANES] = {0}, strengths[SUM_LANES] = {0};
    float code[PIECE], error[PIECE], size[PIECE], most[PIECE];
    for (int64_t start = 0; start < job->columns; start += PIECE) {
        const int64_t left = job->columns - start, count = left < PIECE ? left : PIECE;
        for (int64_t i = 0; i < count; i++) {
            const float place = x[start + i] / scale;
            float nearest = (place + ROUND) - ROUND;
            nearest = nearest < low ? low : nearest;
            nearest = nearest > high ? high : nearest;
            code[i] = nearest;
            error[i] = place - nearest;
            const float magnitude = float_of(bits_of(error[i]) & 0x7FFFFFFF);
            size[i] = magnitude < LEAST_ERROR ? LEAST_ERROR : magnitude;
        }
        for (int64_t i = 0; i < count; i++) most[i] = exp2_of(log2_of(size[i]) * power - log2_beta);
        for (int64_t i = 0; i < count; i++) {
            const float above = error[i] > most[i] ? most[i] : error[i];
            error[i] = above < -most[i] ? -most[i] : above;
        }
        int64_t i = 0;
        for (; i + SUM_LANES <= count; i += SUM_LANES)
            for (int64_t lane = 0; lane < SUM_LANES; lane++) {
                totals[lane] += size[i + lane] * most[i + lane];
                pulls[lane] += error[i + lane] * code[i + lane];
                strengths[lane] += code[i + lane] * code[i + lane];
            }
        for (int64_t lane = 0; i < count; i++, lane++) {
            totals[lane] += size[i] * most[i];
            pulls[lane] += error[i] * code[i];
            strengths[lane] += code[i] * code[i];
        }
    }
    return {sum_of_lanes(totals), sum_of_lanes(pulls), sum_of_lanes(strengths)};
}

// Units: groups.
int hqq_scales(const HqqJob *job, int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; group++) {
        const float *x = job->x + group * job->columns, zero = job->zero ? job->zero[group] : 0.0f;
        float scale = job->scales[group], best = scale, bar = float_of(0x7F800000), log2_beta = job->log2_beta;
        for (int32_t turn = 0; turn <= job->iterations; turn++) {
            const Measured sums = measured(job, x, scale, zero, log2_beta);
            const float size = float_of(bits_of(scale) & 0x7FFFFFFF) * LARGER;
            const float total = sums.total * exp2_of((log2_of(size) - 64.0f) * job->power) * exp2_of(log2_beta);
            if (!(total < bar)) break;
            best = scale;
            bar = total * (1.0f - job->gain);
            float change = sums.pull / sums.strength * job->stride + 1.0f;  // NaN where all codes are 0: no gain
            change = change < 0.5f ? 0.5f : change;
            scale = as_stored(scale * change, job->scale_type);
            log2_beta += job->log2_kappa;
        }
        job->scales[group] = best;
    }
    return DONE;
}

}  // namespace
