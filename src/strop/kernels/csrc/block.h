// The parts of a decoder's block that are no matrix products: norms, rotary positions, softmax, SwiGLU, cross-entropy.
//
// Forward and backward, each in one pass over its rows; arithmetic in float32, one rounding on the way out. Values that
// go through products have the compute type (Y below), the residual stream has its own (X), and the two may differ.
// Sums run over sixteen lanes, so that their order is that of the columns alone: rows are independent, and the result
// does not depend on the threads.
#pragma once

#include "numbers.h"

namespace {

const int SUMS = 16;

inline float total(const float *lanes) {
    float sum = 0;
    for (int lane = 0; lane < SUMS; lane++) sum += lanes[lane];
    return sum;
}

// a * b + c: nothing here is held to the bits of a reference, as roundings are.
inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// e^x for x <= 88: 2^n by the exponent's bits, the rest by a polynomial (relative error below 3e-7); 0 below -87.
inline float exp_of(float x) {
    const float clamped = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float n = fused(clamped, 1.44269504f, ROUND) - ROUND;
    const float r = fused(n, 2.12194440e-4f, fused(n, -0.693359375f, clamped));
    float p = 1.9875691500e-4f;
    p = fused(p, r, 1.3981999507e-3f);
    p = fused(p, r, 8.3334519073e-3f);
    p = fused(p, r, 4.1665795894e-2f);
    p = fused(p, r, 1.6666665459e-1f);
    p = fused(p, r, 5.0000001201e-1f);
    p = fused(p, r * r, r + 1.0f);
    const float power = float_of((uint32_t)((int32_t)n + 127) << 23);
    return x < -87.0f ? 0.0f : p * power;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

// --- norms: y = gain * x / sqrt(mean(x^2) + eps), a row being a head of a token -----------------------------------------

inline int64_t place_of(int64_t row, int64_t heads, int64_t stride, int64_t columns) {
    return row / heads * stride + row % heads * columns;
}

template <class X, class Y> int norm_of(const BlockJob *job, int64_t begin, int64_t end) {
    typedef typename X::Stored In;
    typedef typename Y::Stored Out;
    const int64_t columns = job->columns;
    for (int64_t row = begin; row < end; row++) {
        const int64_t place = place_of(row, job->heads, job->stride, columns);
        const In *x = (const In *)job->x + place;
        if (job->add) {
            const Out *__restrict__ add = (const Out *)job->add + place;
            In *__restrict__ sum = (In *)job->sum + place;
            for (int64_t i = 0; i < columns; i++) sum[i] = X::store(X::load(x[i]) + Y::load(add[i]));
            x = sum;
        }
        float lanes[SUMS] = {0};
        int64_t i = 0;
        for (; i + SUMS <= columns; i += SUMS)
            for (int lane = 0; lane < SUMS; lane++) lanes[lane] += X::load(x[i + lane]) * X::load(x[i + lane]);
        for (; i < columns; i++) lanes[i % SUMS] += X::load(x[i]) * X::load(x[i]);
        const float reciprocal = 1.0f / __builtin_sqrtf(total(lanes) / (float)columns + job->eps);
        job->reciprocal[row] = reciprocal;
        Out *__restrict__ y = (Out *)job->y + place;
        for (i = 0; i < columns; i++) y[i] = Y::store(job->gain[i] * (X::load(x[i]) * reciprocal));
    }
    return DONE;
}

// y = dL/dx of the row, of its gradient in `grad`, plus `add` where there is one.
template <class X, class Y> int norm_backward_of(const BlockJob *job, int64_t begin, int64_t end) {
    typedef typename X::Stored Stream;
    typedef typename Y::Stored Compute;
    const int64_t columns = job->columns;
    for (int64_t row = begin; row < end; row++) {
        const int64_t place = place_of(row, job->heads, job->stride, columns);
        const Stream *x = (const Stream *)job->x + place;
        const Compute *grad = (const Compute *)job->grad + place;
        float lanes[SUMS] = {0};
        int64_t i = 0;
        for (; i + SUMS <= columns; i += SUMS)
            for (int lane = 0; lane < SUMS; lane++)
                lanes[lane] += Y::load(grad[i + lane]) * job->gain[i + lane] * X::load(x[i + lane]);
        for (; i < columns; i++) lanes[i % SUMS] += Y::load(grad[i]) * job->gain[i] * X::load(x[i]);
        const float reciprocal = job->reciprocal[row];
        const float along = total(lanes) / (float)columns * reciprocal * reciprocal * reciprocal;
        Stream *__restrict__ y = (Stream *)job->y + place;
        if (job->add) {
            const Stream *add = (const Stream *)job->add + place;
            for (i = 0; i < columns; i++) {
                const float part = Y::load(grad[i]) * job->gain[i] * reciprocal - X::load(x[i]) * along;
                y[i] = X::store(part + X::load(add[i]));
            }
        } else {
            for (i = 0; i < columns; i++)
                y[i] = X::store(Y::load(grad[i]) * job->gain[i] * reciprocal - X::load(x[i]) * along);
        }
    }
    return DONE;
}

// Units: columns. sums[column] = sum over rows of grad * x / rms: the gradient of the gain.
template <class X, class Y> int norm_gain_of(const BlockJob *job, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) job->sums[i] = 0;
    for (int64_t row = 0; row < job->rows; row++) {
        const int64_t place = place_of(row, job->heads, job->stride, job->columns);
        const typename X::Stored *x = (const typename X::Stored *)job->x + place;
        const typename Y::Stored *grad = (const typename Y::Stored *)job->grad + place;
        const float reciprocal = job->reciprocal[row];
        float *__restrict__ sums = job->sums;
        for (int64_t i = begin; i < end; i++) sums[i] += Y::load(grad[i]) * (X::load(x[i]) * reciprocal);
    }
    return DONE;
}

// --- heads: [tokens, heads * size] to [rows, kv heads, length, group, size] and back ------------------------------------

// A head of a token on its way: turned by its position where `turned`, backwards where `back` (the transposed matrix).
template <class Y>
inline void turn(const typename Y::Stored *__restrict__ from, typename Y::Stored *__restrict__ to, const float *cos,
                 const float *sin, int64_t size, int64_t turned, float back) {
    const int64_t half = turned / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = Y::load(from[i]), b = Y::load(from[i + half]);
        to[i] = Y::store(a * cos[i] - back * b * sin[back < 0 ? i + half : i]);
        to[i + half] = Y::store(b * cos[i + half] + back * a * sin[back < 0 ? i : i + half]);
    }
    for (int64_t i = turned; i < size; i++) to[i] = from[i];
}

// Where a token's heads lie among those of its row, and where its rotary position does.
struct Place {
    int64_t kv, group, length, row, at, angle;
    inline Place(const BlockJob *job, int64_t token) {
        kv = job->kv_heads, group = job->heads / kv, length = job->length;
        row = token / length, at = token % length, angle = (job->shared ? at : token) * job->turned;
    }
    inline int64_t query(int64_t head) const {  // its row among all rows of queries
        return ((row * kv + head / group) * length + at) * group + head % group;
    }
    inline int64_t key(int64_t head) const { return (row * kv + head) * length + at; }
};

template <class Y> int split_heads_of(const BlockJob *job, int64_t begin, int64_t end) {
    typedef typename Y::Stored Stored;
    const int64_t size = job->columns, heads = job->heads;
    for (int64_t token = begin; token < end; token++) {
        const Place place(job, token);
        const float *cos = job->cos + place.angle, *sin = job->sin + place.angle;
        const Stored *x = (const Stored *)job->x + token * job->stride;
        const Stored *plain = (const Stored *)job->add + token * job->stride;
        for (int64_t head = 0; head < heads; head++)
            turn<Y>(x + head * size, (Stored *)job->q + place.query(head) * size, cos, sin, size, job->turned, 1.0f);
        for (int64_t head = 0; head < job->kv_heads; head++) {
            const int64_t to = place.key(head) * size;
            turn<Y>(x + (heads + head) * size, (Stored *)job->k + to, cos, sin, size, job->turned, 1.0f);
            memcpy((Stored *)job->v + to, plain + head * size, (size_t)size * sizeof(Stored));
        }
    }
    return DONE;
}

// The gradient of what split_heads was given: y like its x and add together, [tokens, stride].
template <class Y> int split_heads_backward_of(const BlockJob *job, int64_t begin, int64_t end) {
    typedef typename Y::Stored Stored;
    const int64_t size = job->columns, heads = job->heads, kv = job->kv_heads;
    for (int64_t token = begin; token < end; token++) {
        const Place place(job, token);
        const float *cos = job->cos + place.angle, *sin = job->sin + place.angle;
        Stored *y = (Stored *)job->y + token * job->stride;
        for (int64_t head = 0; head < heads; head++)
            turn<Y>((const Stored *)job->q + place.query(head) * size, y + head * size, cos, sin, size,
                    job->turned, -1.0f);
        for (int64_t head = 0; head < kv; head++) {
            const int64_t from = place.key(head) * size;
            turn<Y>((const Stored *)job->k + from, y + (heads + head) * size, cos, sin, size, job->turned, -1.0f);
            memcpy(y + (heads + kv + head) * size, (const Stored *)job->v + from, (size_t)size * sizeof(Stored));
        }
    }
    return DONE;
}

// y [tokens, heads * size] = what attention gave, laid like q, times each row's reciprocal.
template <class Y> int merge_heads_of(const BlockJob *job, int64_t begin, int64_t end) {
    typedef typename Y::Stored Stored;
    const int64_t size = job->columns;
    for (int64_t token = begin; token < end; token++) {
        const Place place(job, token);
        for (int64_t head = 0; head < job->heads; head++) {
            const int64_t row = place.query(head);
            const float reciprocal = job->reciprocal[row];
            const Stored *from = (const Stored *)job->q + row * size;
            Stored *__restrict__ to = (Stored *)job->y + (token * job->heads + head) * size;
            for (int64_t i = 0; i < size; i++) to[i] = Y::store(Y::load(from[i]) * reciprocal);
        }
    }
    return DONE;
}

// q = the gradient in `grad` [tokens, heads * size], laid like q; sums[row] = grad . x of a head, x what was given.
template <class Y> int merge_heads_backward_of(const BlockJob *job, int64_t begin, int64_t end) {
    typedef typename Y::Stored Stored;
    const int64_t size = job->columns;
    for (int64_t token = begin; token < end; token++) {
        const Place place(job, token);
        for (int64_t head = 0; head < job->heads; head++) {
            const int64_t row = place.query(head), at = (token * job->heads + head) * size;
            const Stored *grad = (const Stored *)job->grad + at, *x = (const Stored *)job->x + at;
            memcpy((Stored *)job->q + row * size, grad, (size_t)size * sizeof(Stored));
            float lanes[SUMS] = {0};
            int64_t i = 0;
            for (; i + SUMS <= size; i += SUMS)
                for (int lane = 0; lane < SUMS; lane++) lanes[lane] += Y::load(grad[i + lane]) * Y::load(x[i + lane]);
            for (; i < size; i++) lanes[i % SUMS] += Y::load(grad[i]) * Y::load(x[i]);
            job->sums[row] = total(lanes);
        }
    }
    return DONE;
}

// --- attention: rows of scores, of which each sees the keys `first` to `last` of its token ------------------------------

// The columns that a row of scores sees: keys begin at `key`, rows at token `token`, `group` rows a token.
struct Seen {
    int64_t from, to, row;
    inline Seen(const BlockJob *job, int64_t unit) {
        const int64_t group = job->heads / job->kv_heads, rows = job->tokens * group;
        const int64_t block = unit / rows, at = job->token + unit % rows / group;
        const int64_t place = block / job->kv_heads * job->length + at;
        from = job->first[place] - job->key;
        to = job->last[place] + 1 - job->key;
        from = from < 0 ? 0 : from;
        to = to > job->columns ? job->columns : to;
        if (to < from) to = from;
        row = (block * job->length + job->token) * group + unit % rows;
    }
};

template <class Stored> inline void blank(Stored *row, const Seen &seen, int64_t columns) {
    memset(row, 0, (size_t)seen.from * sizeof(Stored));
    memset(row + seen.to, 0, (size_t)(columns - seen.to) * sizeof(Stored));
}

// y [rows, columns] = e^(scale * x - m) in place, 0 where a row does not see; reciprocal = 1 / sum, sums = m + log sum.
template <class Y> int softmax_of(const BlockJob *job, int64_t begin, int64_t end) {
    typedef typename Y::Stored Stored;
    for (int64_t unit = begin; unit < end; unit++) {
        const Seen seen(job, unit);
        Stored *x = (Stored *)job->y + unit * job->columns;
        float lanes[SUMS], most = -3.4e38f;
        for (int lane = 0; lane < SUMS; lane++) lanes[lane] = most;
        int64_t i = seen.from;
        for (; i + SUMS <= seen.to; i += SUMS)
            for (int lane = 0; lane < SUMS; lane++) {
                const float value = Y::load(x[i + lane]) * job->scaling;
                lanes[lane] = value > lanes[lane] ? value : lanes[lane];
            }
        for (; i < seen.to; i++) {
            const float value = Y::load(x[i]) * job->scaling;
            lanes[0] = value > lanes[0] ? value : lanes[0];
        }
        for (int lane = 0; lane < SUMS; lane++) most = lanes[lane] > most ? lanes[lane] : most;
        for (int lane = 0; lane < SUMS; lane++) lanes[lane] = 0;
        for (i = seen.from; i + SUMS <= seen.to; i += SUMS)
            for (int lane = 0; lane < SUMS; lane++) {
                const float value = exp_of(Y::load(x[i + lane]) * job->scaling - most);
                x[i + lane] = Y::store(value);
                lanes[lane] += value;
            }
        for (; i < seen.to; i++) {
            const float value = exp_of(Y::load(x[i]) * job->scaling - most);
            x[i] = Y::store(value);
            lanes[i % SUMS] += value;
        }
        blank(x, seen, job->columns);
        const float sum = total(lanes);
        job->reciprocal[seen.row] = sum > 0 ? 1.0f / sum : 0.0f;
        job->sums[seen.row] = sum > 0 ? most + __builtin_logf(sum) : 0.0f;
    }
    return DONE;
}

// y [rows, columns]: scores to probabilities; q, the gradients of probabilities, to those of scores. `sums` has the log
// of each row's sum, `reciprocal` the product of its output with the output's gradient.
template <class Y> int softmax_backward_of(const BlockJob *job, int64_t begin, int64_t end) {
    typedef typename Y::Stored Stored;
    for (int64_t unit = begin; unit < end; unit++) {
        const Seen seen(job, unit);
        Stored *__restrict__ x = (Stored *)job->y + unit * job->columns;
        Stored *__restrict__ grad = (Stored *)job->q + unit * job->columns;
        const float logarithm = job->sums[seen.row], product = job->reciprocal[seen.row];
        for (int64_t i = seen.from; i < seen.to; i++) {
            const float p = exp_of(Y::load(x[i]) * job->scaling - logarithm);
            x[i] = Y::store(p);
            grad[i] = Y::store(job->scaling * p * (Y::load(grad[i]) - product));
        }
        blank(x, seen, job->columns);
        blank(grad, seen, job->columns);
    }
    return DONE;
}

// --- SwiGLU: y = silu(gate) * up, x being [rows, gate and up] -----------------------------------------------------------

template <class Y> int swiglu_of(const BlockJob *job, int64_t begin, int64_t end) {
    typedef typename Y::Stored Stored;
    const int64_t columns = job->columns;
    for (int64_t row = begin; row < end; row++) {
        const Stored *gate = (const Stored *)job->x + row * 2 * columns, *up = gate + columns;
        Stored *__restrict__ y = (Stored *)job->y + row * columns;
        for (int64_t i = 0; i < columns; i++)
            y[i] = Y::store(Y::load(gate[i]) * sigmoid(Y::load(gate[i])) * Y::load(up[i]));
    }
    return DONE;
}

template <class Y, class Stored = typename Y::Stored>
inline void swiglu_piece(const Stored *gate, const Stored *up, const Stored *grad, const float *s,
                         Stored *__restrict__ to_gate, Stored *__restrict__ to_up, Stored *__restrict__ y,
                         int64_t count) {
    for (int64_t i = 0; i < count; i++) y[i] = Y::store(Y::load(gate[i]) * s[i] * Y::load(up[i]));
    for (int64_t i = 0; i < count; i++) to_up[i] = Y::store(Y::load(grad[i]) * Y::load(gate[i]) * s[i]);
    for (int64_t i = 0; i < count; i++) {
        const float g = Y::load(gate[i]);
        to_gate[i] = Y::store(Y::load(grad[i]) * Y::load(up[i]) * s[i] * (1.0f + g * (1.0f - s[i])));
    }
}

// q [rows, gate and up] = the gradient of x; y the product again.
template <class Y> int swiglu_backward_of(const BlockJob *job, int64_t begin, int64_t end) {
    typedef typename Y::Stored Stored;
    const int64_t columns = job->columns;
    for (int64_t row = begin; row < end; row++) {
        const Stored *gate = (const Stored *)job->x + row * 2 * columns, *up = gate + columns;
        const Stored *grad = (const Stored *)job->grad + row * columns;
        Stored *to_gate = (Stored *)job->q + row * 2 * columns, *to_up = to_gate + columns;
        Stored *y = (Stored *)job->y + row * columns;
        for (int64_t start = 0; start < columns; start += PIECE) {
            const int64_t count = columns - start < PIECE ? columns - start : PIECE;
            float s[PIECE];
            for (int64_t i = 0; i < count; i++) s[i] = sigmoid(Y::load(gate[start + i]));
            swiglu_piece<Y>(gate + start, up + start, grad + start, s, to_gate + start, to_up + start, y + start, count);
        }
    }
    return DONE;
}

// --- cross-entropy: y [rows, columns] from logits to their gradient, sums[row] the loss; a negative label has none ------

template <class Y> int cross_entropy_of(const BlockJob *job, int64_t begin, int64_t end) {
    typedef typename Y::Stored Stored;
    const int64_t columns = job->columns;
    for (int64_t row = begin; row < end; row++) {
        Stored *x = (Stored *)job->y + row * columns;
        const int64_t label = job->labels[row];
        if (label >= columns) return REFUSED;
        if (label < 0) {
            memset(x, 0, (size_t)columns * sizeof(Stored));
            job->sums[row] = 0;
            continue;
        }
        const float wanted = Y::load(x[label]);
        float lanes[SUMS], most = -3.4e38f;
        for (int lane = 0; lane < SUMS; lane++) lanes[lane] = most;
        int64_t i = 0;
        for (; i + SUMS <= columns; i += SUMS)
            for (int lane = 0; lane < SUMS; lane++) {
                const float value = Y::load(x[i + lane]);
                lanes[lane] = value > lanes[lane] ? value : lanes[lane];
            }
        for (; i < columns; i++) lanes[0] = Y::load(x[i]) > lanes[0] ? Y::load(x[i]) : lanes[0];
        for (int lane = 0; lane < SUMS; lane++) most = lanes[lane] > most ? lanes[lane] : most;
        for (int lane = 0; lane < SUMS; lane++) lanes[lane] = 0;
        for (i = 0; i + SUMS <= columns; i += SUMS)
            for (int lane = 0; lane < SUMS; lane++) lanes[lane] += exp_of(Y::load(x[i + lane]) - most);
        for (; i < columns; i++) lanes[i % SUMS] += exp_of(Y::load(x[i]) - most);
        const float logarithm = most + __builtin_logf(total(lanes));
        for (i = 0; i < columns; i++) x[i] = Y::store(exp_of(Y::load(x[i]) - logarithm));
        x[label] = Y::store(exp_of(wanted - logarithm) - 1.0f);
        job->sums[row] = logarithm - wanted;
    }
    return DONE;
}

// Each kernel for the types of its job: the stream's (x_type) and that of products (y_type).
#define STROP_TWO_TYPES(name)                                                                                       \
    int name(const BlockJob *job, int64_t begin, int64_t end) {                                                     \
        if (job->x_type == FLOAT32)                                                                                 \
            return job->y_type == FLOAT32 ? name##_of<Float32, Float32>(job, begin, end)                            \
                                          : name##_of<Float32, BFloat16>(job, begin, end);                          \
        return job->y_type == FLOAT32 ? REFUSED : name##_of<BFloat16, BFloat16>(job, begin, end);                   \
    }
#define STROP_ONE_TYPE(name)                                                                                        \
    int name(const BlockJob *job, int64_t begin, int64_t end) {                                                     \
        return job->y_type == FLOAT32 ? name##_of<Float32>(job, begin, end) : name##_of<BFloat16>(job, begin, end); \
    }
STROP_TWO_TYPES(norm)
STROP_TWO_TYPES(norm_backward)
STROP_TWO_TYPES(norm_gain)
STROP_ONE_TYPE(split_heads)
STROP_ONE_TYPE(split_heads_backward)
STROP_ONE_TYPE(merge_heads)
STROP_ONE_TYPE(merge_heads_backward)
STROP_ONE_TYPE(softmax)
STROP_ONE_TYPE(softmax_backward)
STROP_ONE_TYPE(swiglu)
STROP_ONE_TYPE(swiglu_backward)
STROP_ONE_TYPE(cross_entropy)
#undef STROP_TWO_TYPES
#undef STROP_ONE_TYPE

}  // namespace
