// What of a decoder's block lies between its products while each of some texts gets one token: heads turned and put
// into the cache, attention over the cache, SwiGLU, and the sum with the stream.
//
// The cache is [slots, columns, kv_heads, size]: column t of a slot holds token t of its text, and a token sees its slot
// up to its own column. Arithmetic is in float32, with one rounding on the way out; the order of a text's sums depends
// on nothing beside it.
#pragma once

#include "block.h"

namespace {

const int64_t MOST_QUERIES = 4096;  // values of the queries that share keys

// Units: tokens. Queries turned where they lie, keys turned into the cache, values into it.
template <class X> int step_turn_of(const StepJob *job, int64_t begin, int64_t end) {
    typedef typename X::Stored Stored;
    const int64_t size = job->size, width = job->kv_heads * size;
    Stored head[MOST_QUERIES];
    for (int64_t token = begin; token < end; token++) {
        const float *cos = job->cos + token * job->turned, *sin = job->sin + token * job->turned;
        Stored *q = (Stored *)job->q + token * job->heads * size;
        for (int64_t h = 0; h < job->heads; h++) {
            memcpy(head, q + h * size, (size_t)size * sizeof(Stored));
            turn<X>(head, q + h * size, cos, sin, size, job->turned, 1.0f);
        }
        Stored *key = (Stored *)job->keys + job->index[token] * width;
        for (int64_t h = 0; h < job->kv_heads; h++)
            turn<X>((const Stored *)job->k + token * width + h * size, key + h * size, cos, sin, size, job->turned, 1.0f);
        memcpy((Stored *)job->values + job->index[token] * width, (const Stored *)job->v + token * width,
               (size_t)width * sizeof(Stored));
    }
    return DONE;
}

// scores[c] = e^(scaling * scores[c] - most); returns their sum.
inline float step_softmax(float *__restrict__ scores, int64_t count, float scaling) {
    float most = scores[0];
    for (int64_t c = 0; c < count; c++) most = scores[c] > most ? scores[c] : most;
    float lanes[SUMS] = {0};
    int64_t c = 0;
    for (; c + SUMS <= count; c += SUMS) {
        for (int lane = 0; lane < SUMS; lane++) {
            scores[c + lane] = exp_of((scores[c + lane] - most) * scaling);
            lanes[lane] += scores[c + lane];
        }
    }
    for (; c < count; c++) {
        scores[c] = exp_of((scores[c] - most) * scaling);
        lanes[c % SUMS] += scores[c];
    }
    return total(lanes);
}

// Units: a token's heads of keys, each with the queries that share it. The output takes the queries' place.
template <class X> int step_attend_of(const StepJob *job, int64_t begin, int64_t end) {
    typedef typename X::Stored Stored;
    const int64_t size = job->size, kv = job->kv_heads, group = job->heads / kv, columns = job->columns;
    float query[MOST_QUERIES], sums[MOST_QUERIES];
    for (int64_t unit = begin; unit < end; unit++) {
        const int64_t token = unit / kv, key_head = unit % kv, first = token * job->heads + key_head * group;
        const int64_t seen = job->index[token] % columns + 1;
        const int64_t start = ((job->index[token] + 1 - seen) * kv + key_head) * size;
        const Stored *keys = (const Stored *)job->keys + start, *values = (const Stored *)job->values + start;
        Stored *q = (Stored *)job->q + first * size;
        float *scores = job->scores + first * columns;
        for (int64_t i = 0; i < group * size; i++) query[i] = X::load(q[i]), sums[i] = 0;
        for (int64_t c = 0; c < seen; c++) {
            const Stored *key = keys + c * kv * size;
            for (int64_t h = 0; h < group; h++) {
                float lanes[SUMS] = {0};
                int64_t i = 0;
                for (; i + SUMS <= size; i += SUMS)
                    for (int lane = 0; lane < SUMS; lane++)
                        lanes[lane] = fused(query[h * size + i + lane], X::load(key[i + lane]), lanes[lane]);
                for (; i < size; i++) lanes[i % SUMS] += query[h * size + i] * X::load(key[i]);
                scores[h * columns + c] = total(lanes);
            }
        }
        float reciprocal[MOST_QUERIES];
        for (int64_t h = 0; h < group; h++)
            reciprocal[h] = 1.0f / step_softmax(scores + h * columns, seen, job->scaling);
        for (int64_t c = 0; c < seen; c++) {
            const Stored *value = values + c * kv * size;
            for (int64_t h = 0; h < group; h++) {
                const float weight = scores[h * columns + c];
                float *__restrict__ sum = sums + h * size;
                for (int64_t i = 0; i < size; i++) sum[i] = fused(weight, X::load(value[i]), sum[i]);
            }
        }
        for (int64_t h = 0; h < group; h++)
            for (int64_t i = 0; i < size; i++) q[h * size + i] = X::store(sums[h * size + i] * reciprocal[h]);
    }
    return DONE;
}

// Units: tokens. gate = silu(gate) * up.
template <class X> int step_swiglu_of(const StepJob *job, int64_t begin, int64_t end) {
    typedef typename X::Stored Stored;
    Stored *__restrict__ gate = (Stored *)job->gate;
    const Stored *__restrict__ up = (const Stored *)job->up;
    for (int64_t i = begin * job->inner; i < end * job->inner; i++)
        gate[i] = X::store(X::load(gate[i]) * sigmoid(X::load(gate[i])) * X::load(up[i]));
    return DONE;
}

// Units: tokens. x = between + what the last product gave.
template <class X> int step_add_of(const StepJob *job, int64_t begin, int64_t end) {
    typedef typename X::Stored Stored;
    Stored *__restrict__ x = (Stored *)job->x;
    const Stored *between = (const Stored *)job->between, *given = (const Stored *)job->given;
    for (int64_t i = begin * job->hidden; i < end * job->hidden; i++)
        x[i] = X::store(X::load(between[i]) + X::load(given[i]));
    return DONE;
}

#define STROP_STEP(name)                                                                                         \
    int name(const StepJob *job, int64_t begin, int64_t end) {                                                   \
        return job->type == FLOAT32 ? name##_of<Float32>(job, begin, end) : name##_of<BFloat16>(job, begin, end); \
    }
STROP_STEP(step_turn)
STROP_STEP(step_attend)
STROP_STEP(step_swiglu)
STROP_STEP(step_add)
#undef STROP_STEP

}  // namespace
