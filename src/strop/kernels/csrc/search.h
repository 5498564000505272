// The searches behind GGUF's superblocks of 256 values, Q4_K and Q6_K: methods/superblocks.py and methods/block_fit.py.
//
// Every group of a superblock is a lane of a vector (Q6_K: 16 groups of 16 values; Q4_K: 8 of 32, two superblocks at a
// time), so that all sums run over vectors, in one order whatever the processor: halves are added, then the halves of
// what that gives. The reference adds in the same order, and every operation is one of float32's own in its order, so
// the bits are the same.
#pragma once

#include "numbers.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed within this file alone
#endif

namespace {
namespace superblocks {

const int WIDE = 16, SUPERBLOCK = 256;  // lanes, values
const float INFINITE = __builtin_inff(), LARGEST = 3.4028234663852886e38f;

#if defined(__AVX512F__)
const int PART = 16;
#elif defined(__AVX2__)
const int PART = 8;
#else
const int PART = 4;
#endif
typedef float Part __attribute__((vector_size(4 * PART)));
typedef int32_t PartFlags __attribute__((vector_size(4 * PART)));

// WIDE floats in as few registers as hold them: compilers take vectors that no register holds apart lane by lane.
struct Lanes {
    Part parts[WIDE / PART];
    float operator[](int lane) const { return parts[lane / PART][lane % PART]; }
    void set(int lane, float value) { parts[lane / PART][lane % PART] = value; }
};
struct Flags {
    PartFlags parts[WIDE / PART];
};

inline Lanes all(float value) {
    Lanes lanes;
    for (Part &part : lanes.parts) {
        const Part zeros = {};
        part = zeros + value;
    }
    return lanes;
}

#define STROP_EACH(RESULT, EXPRESSION)                              \
    RESULT made;                                                    \
    for (int p = 0; p < WIDE / PART; p++) made.parts[p] = EXPRESSION; \
    return made;
#define STROP_OPERATOR(RESULT, SIGN)                                                                             \
    inline RESULT operator SIGN(const Lanes &a, const Lanes &b) { STROP_EACH(RESULT, a.parts[p] SIGN b.parts[p]) } \
    inline RESULT operator SIGN(const Lanes &a, float b) { STROP_EACH(RESULT, a.parts[p] SIGN b) }                 \
    inline RESULT operator SIGN(float a, const Lanes &b) { STROP_EACH(RESULT, a SIGN b.parts[p]) }
STROP_OPERATOR(Lanes, +)
STROP_OPERATOR(Lanes, -)
STROP_OPERATOR(Lanes, *)
STROP_OPERATOR(Lanes, /)
STROP_OPERATOR(Flags, <)
STROP_OPERATOR(Flags, >)
STROP_OPERATOR(Flags, ==)
inline Lanes operator-(const Lanes &a) { STROP_EACH(Lanes, -a.parts[p]) }
inline Lanes chosen(const Flags &where, const Lanes &a, const Lanes &b) {
    STROP_EACH(Lanes, where.parts[p] ? a.parts[p] : b.parts[p])
}
#undef STROP_OPERATOR
#undef STROP_EACH

inline Lanes rounded(const Lanes &x) { return (x + ROUND) - ROUND; }
inline Lanes least(const Lanes &a, const Lanes &b) { return chosen(b < a, b, a); }
inline Lanes most(const Lanes &a, const Lanes &b) { return chosen(b > a, b, a); }
inline Lanes within(const Lanes &x, float low, float high) { return least(most(x, all(low)), all(high)); }
inline Lanes nonzero(const Lanes &x) { return chosen(x == 0.0f, all(INFINITE), x); }  // what is divided by it becomes 0

// The sum of `count` vectors, a power of two; they are overwritten.
inline Lanes summed(Lanes *parts, int count) {
    for (int half = count / 2; half; half /= 2)
        for (int k = 0; k < half; k++) parts[k] = parts[k] + parts[k + half];
    return parts[0];
}

// The same over `count` lanes from `first` on.
inline float lane_sum(const Lanes &values, int first, int count) {
    float parts[WIDE];
    for (int k = 0; k < count; k++) parts[k] = values[first + k];
    for (int half = count / 2; half; half /= 2)
        for (int k = 0; k < half; k++) parts[k] += parts[k + half];
    return parts[0];
}

inline float half_of(float value) {  // rounded to float16, of either sign
    const uint32_t sign = bits_of(value) & 0x80000000u;
    return float_of(bits_of(to_float16(float_of(bits_of(value) & 0x7FFFFFFF))) | sign);
}

// Whether all values of a superblock are finite.
inline bool are_finite(const float *x) {
    uint32_t bad = 0;
    for (int k = 0; k < SUPERBLOCK; k++) bad |= (bits_of(x[k]) & 0x7F800000) == 0x7F800000;
    return !bad;
}

// VALUES of each lane's group, x[group * VALUES + value], as vectors.
template <int VALUES> inline void laid(const float *x, int groups, int first, Lanes *out) {
    for (int group = 0; group < groups; group++)
        for (int k = 0; k < VALUES; k++) out[k].set(first + group, x[group * VALUES + k]);
}

// --- Q6_K: x = d * sc * q, sc of 8 signed bits for 16 values each, q from -32 to 31 ---------------------------------

struct SixBits {
    Lanes x[16], weights[16];

    void codes(const Lanes &scale, Lanes *out) const {
        const Lanes divisor = nonzero(scale);
        for (int k = 0; k < 16; k++) out[k] = within(rounded(x[k] / divisor), -32.0f, 31.0f);
    }
    Lanes errors(float d, const Lanes &sub_scales) const {  // of each group; what is not a number is no error's equal
        const Lanes scale = d * sub_scales;
        Lanes parts[16];
        codes(scale, parts);
        for (int k = 0; k < 16; k++) {
            const Lanes difference = parts[k] * scale - x[k];
            parts[k] = weights[k] * (difference * difference);
        }
        const Lanes error = least(summed(parts, 16), all(LARGEST));
        return chosen(error == error, error, all(INFINITE));
    }
    void better_step(const Lanes *code, Lanes &best, Lanes &scale) const {
        Lanes products[16], squares[16];
        for (int k = 0; k < 16; k++) {
            products[k] = weights[k] * x[k] * code[k];
            squares[k] = weights[k] * code[k] * code[k];
        }
        const Lanes product = summed(products, 16), square = summed(squares, 16);
        const Lanes fitted = product / chosen(square > 0.0f, square, all(1.0f)), gain = fitted * product;
        const Flags better = gain > best;
        best = chosen(better, gain, best);
        scale = chosen(better, fitted, scale);
    }
    Lanes fit_step() const {
        static const double factors[6] = {1.08, 1.16, 1.24, 1.32, -1.0, -1.08};
        Lanes low = all(INFINITE), high = all(-INFINITE), code[16], unit[16];
        for (int k = 0; k < 16; k++) {
            const Lanes used = chosen(weights[k] > 0.0f, x[k], all(0.0f));
            low = least(low, used);
            high = most(high, used);
        }
        const Lanes extreme = chosen(high > -low, high, low);
        const Lanes divisor = chosen(extreme == 0.0f, all(1.0f), extreme);
        for (int k = 0; k < 16; k++) unit[k] = x[k] / divisor;
        Lanes best = all(0.0f), scale = all(0.0f);
        for (int tried = 0; tried < 15; tried++) {
            const float reach = (float)(tried < 9 ? -32 + 0.2 * (tried - 4) : -32 * factors[tried - 9]);
            for (int k = 0; k < 16; k++) code[k] = within(rounded(unit[k] * reach), -32.0f, 31.0f);
            better_step(code, best, scale);
        }
        for (int round = 0; round < 2; round++) {
            codes(scale, code);
            better_step(code, best, scale);
        }
        return scale;
    }
    // Scales as d, which has float16's precision, and codes of 8 bits: the one of largest magnitude becomes -128.
    static float nested(const Lanes &scales, Lanes &codes) {
        float low = INFINITE, high = -INFINITE;
        for (int k = 0; k < WIDE; k++) {
            low = scales[k] < low ? scales[k] : low;
            high = scales[k] > high ? scales[k] : high;
        }
        const float d = half_of((high > -low ? high : low) / -128.0f);
        codes = within(rounded(scales / (d == 0.0f ? INFINITE : d)), -128.0f, 127.0f);
        return d;
    }
};

int search_six_bit(const SearchJob *job, int64_t begin, int64_t end) {
    const int64_t across = job->columns / SUPERBLOCK;
    SixBits block;
    for (int64_t at = begin; at < end; at++) {
        if (!are_finite(job->x + at * SUPERBLOCK)) return REFUSED;
        laid<16>(job->x + at * SUPERBLOCK, 16, 0, block.x);
        if (job->weights) laid<16>(job->weights + at % across * SUPERBLOCK, 16, 0, block.weights);
        else for (int k = 0; k < 16; k++) block.weights[k] = all(1.0f);

        Lanes low = block.x[0], high = block.x[0], plain_scales, sub_scales, code[16];
        for (int k = 1; k < 16; k++) {
            low = least(low, block.x[k]);
            high = most(high, block.x[k]);
        }
        const float plain_d = SixBits::nested(chosen(high > -low, high, low) / -32.0f, plain_scales);
        float d = SixBits::nested(block.fit_step(), sub_scales);
        if (!is_finite(plain_d) || !is_finite(d)) return REFUSED;

        Lanes errors = block.errors(d, sub_scales);
        for (int round = 0; round < 2; round++) {
            for (int move = -4; move <= 4; move++) {
                if (!move) continue;
                const Lanes moved = within(sub_scales + (float)move, -128.0f, 127.0f), error = block.errors(d, moved);
                sub_scales = chosen(error < errors, moved, sub_scales);
                errors = least(errors, error);
            }
            Lanes squares[16], products[16];
            block.codes(d * sub_scales, code);
            for (int k = 0; k < 16; k++) {
                const Lanes product = code[k] * sub_scales;
                squares[k] = block.weights[k] * product * product;
                products[k] = block.weights[k] * product * block.x[k];
            }
            const float square = lane_sum(summed(squares, 16), 0, 16), product = lane_sum(summed(products, 16), 0, 16);
            const float fitted = half_of(product / (square > 0.0f ? square : 1.0f));
            const Lanes error = block.errors(fitted, sub_scales);
            if (lane_sum(error, 0, 16) < lane_sum(errors, 0, 16) && square > 0.0f) {
                d = fitted;
                errors = error;
            }
        }
        if (!(lane_sum(errors, 0, 16) < lane_sum(block.errors(plain_d, plain_scales), 0, 16))) {
            d = plain_d;
            sub_scales = plain_scales;
        }
        block.codes(d * sub_scales, code);
        job->d[at] = float16_bits(d);
        for (int group = 0; group < 16; group++) {
            job->sub_scale[at * 16 + group] = (uint8_t)(int8_t)sub_scales[group];
            for (int k = 0; k < 16; k++) job->codes[at * SUPERBLOCK + group * 16 + k] = (uint8_t)(int8_t)code[k][group];
        }
    }
    return DONE;
}

// --- Q4_K: x = d * sc * q - dmin * m, sc and m of 6 bits for 32 values each, q from 0 to 15 -------------------------

const float GAIN = (float)(1.0 - 1e-5);  // an error must fall by this share to count
const float LARGEST_SCALE = 65504.0f * 63.0f;

// d and dmin of two superblocks, each over the lanes of its groups.
struct Pair {
    float of[2];
    Lanes spread() const {
        Lanes lanes;
        for (int k = 0; k < WIDE; k++) lanes.set(k, of[k / 8]);
        return lanes;
    }
};

struct FourBits {
    Lanes x[32], weights[32];

    void codes(const Lanes &scale, const Lanes &minimum, Lanes *out) const {
        const Lanes divisor = chosen(scale > 0.0f, scale, all(INFINITE));
        for (int k = 0; k < 32; k++) out[k] = within(rounded((x[k] + minimum) / divisor), 0.0f, 15.0f);
    }
    Lanes errors(const Lanes &scale, const Lanes &minimum) const {
        Lanes parts[32];
        codes(scale, minimum, parts);
        for (int k = 0; k < 32; k++) {
            const Lanes difference = parts[k] * scale - minimum - x[k];
            parts[k] = difference * difference * weights[k];
        }
        return summed(parts, 32);
    }
    Lanes errors(const Pair &d, const Pair &dmin, const Lanes &sub_scale, const Lanes &sub_minimum) const {
        return errors(sub_scale * d.spread(), sub_minimum * dmin.spread());
    }
    void least_squares(Lanes &step, Lanes &offset) const {
        Lanes code[32], totals[32], firsts[32], seconds[32], x_firsts[32], x_totals[32];
        codes(step, offset, code);
        for (int k = 0; k < 32; k++) {
            const Lanes weighted = weights[k] * code[k];
            totals[k] = weights[k];
            firsts[k] = weighted;
            seconds[k] = weighted * code[k];
            x_firsts[k] = weighted * x[k];
            x_totals[k] = weights[k] * x[k];
        }
        const Lanes total = summed(totals, 32), first = summed(firsts, 32), second = summed(seconds, 32);
        const Lanes x_first = summed(x_firsts, 32), x_total = summed(x_totals, 32);
        const Lanes determinant = total * second - first * first;
        const Flags solvable = determinant > 1e-6f * total * second;
        const Lanes safe = chosen(solvable, determinant, all(1.0f));
        Lanes slope = (total * x_first - first * x_total) / safe, level = (second * x_total - first * x_first) / safe;
        const Lanes through_zero = x_first / chosen(second > 0.0f, second, all(1.0f));
        slope = within(chosen(level > 0.0f, through_zero, slope), 0.0f, LARGEST_SCALE);
        level = within(-level, 0.0f, LARGEST_SCALE);
        step = chosen(solvable, slope, step);
        offset = chosen(solvable, level, offset);
    }
    // The range of each group, zero within it: what remains of x where `used`.
    void range(bool used, Lanes &low, Lanes &high) const {
        low = all(INFINITE);
        high = all(-INFINITE);
        for (int k = 0; k < 32; k++) {
            const Lanes value = used ? chosen(weights[k] > 0.0f, x[k], all(0.0f)) : x[k];
            low = least(low, value);
            high = most(high, value);
        }
        low = least(low, all(0.0f));
    }
    void group_by_group(Lanes &scale, Lanes &minimum) const {
        static const float steps[7] = {-1.5f, -0.5f, 0.0f, 0.5f, 1.5f, 3.0f, 5.0f};
        Lanes low, high;
        range(false, low, high);
        scale = (high - low) / 15.0f;
        minimum = -low;
        Lanes best = errors(scale, minimum);
        range(true, low, high);
        for (float more : steps) {
            Lanes step = (high - low) / (15.0f + more), offset = -low;
            for (int fit = 0; fit < 2; fit++) {
                least_squares(step, offset);
                const Lanes error = errors(step, offset);
                const Flags better = error < best * GAIN;
                best = chosen(better, error, best);
                scale = chosen(better, step, scale);
                minimum = chosen(better, offset, minimum);
            }
        }
    }
    void moved(const Pair &d, const Pair &dmin, Lanes &sub_scale, Lanes &sub_minimum) const {
        const Lanes first_scale = sub_scale, first_minimum = sub_minimum;
        Lanes best = errors(d, dmin, sub_scale, sub_minimum);
        for (int up = -1; up <= 1; up++)
            for (int down = -1; down <= 1; down++) {
                if (!up && !down) continue;
                const Lanes scale = within(first_scale + (float)up, 0.0f, 63.0f);
                const Lanes minimum = within(first_minimum + (float)down, 0.0f, 63.0f);
                const Lanes error = errors(d, dmin, scale, minimum);
                const Flags better = error < best * GAIN;
                best = chosen(better, error, best);
                sub_scale = chosen(better, scale, sub_scale);
                sub_minimum = chosen(better, minimum, sub_minimum);
            }
    }
    void fitted(Pair &d, Pair &dmin, const Lanes &sub_scale, const Lanes &sub_minimum) const {
        const Lanes before = errors(d, dmin, sub_scale, sub_minimum);
        Lanes code[32], aa[32], ab[32], bb[32], ax[32], bx[32];
        codes(sub_scale * d.spread(), sub_minimum * dmin.spread(), code);
        for (int k = 0; k < 32; k++) {  // x = d * one - dmin * other
            const Lanes one = code[k] * sub_scale, other = sub_minimum;
            aa[k] = weights[k] * (one * one);
            ab[k] = weights[k] * (one * other);
            bb[k] = weights[k] * (other * other);
            ax[k] = weights[k] * (one * x[k]);
            bx[k] = weights[k] * (other * x[k]);
        }
        const Lanes sums[5] = {summed(aa, 32), summed(ab, 32), summed(bb, 32), summed(ax, 32), summed(bx, 32)};
        Pair new_d, new_dmin;
        for (int part = 0; part < 2; part++) {
            float of[5];
            for (int k = 0; k < 5; k++) of[k] = lane_sum(sums[k], 8 * part, 8);
            const float determinant = of[0] * of[2] - of[1] * of[1];
            const bool solvable = determinant > 1e-6f * of[0] * of[2];
            const float safe = solvable ? determinant : 1.0f;
            const float found = solvable ? (of[2] * of[3] - of[1] * of[4]) / safe : of[3] / (of[0] > 0.0f ? of[0] : 1.0f);
            const float lowest = solvable ? (of[1] * of[3] - of[0] * of[4]) / safe : dmin.of[part];
            new_d.of[part] = half_of(found < 0.0f ? 0.0f : found > 65504.0f ? 65504.0f : found);
            new_dmin.of[part] = half_of(lowest < 0.0f ? 0.0f : lowest > 65504.0f ? 65504.0f : lowest);
        }
        const Lanes after = errors(new_d, new_dmin, sub_scale, sub_minimum);
        for (int part = 0; part < 2; part++)
            if (lane_sum(after, 8 * part, 8) < lane_sum(before, 8 * part, 8) * GAIN) {
                d.of[part] = new_d.of[part];
                dmin.of[part] = new_dmin.of[part];
            }
    }
    // Values as a number of each superblock in float16's precision and codes of 6 bits: the largest becomes 63.
    static Pair nested(const Lanes &values, Lanes &codes) {
        Pair unit;
        for (int part = 0; part < 2; part++) {
            float largest = values[8 * part];
            for (int k = 1; k < 8; k++) largest = values[8 * part + k] > largest ? values[8 * part + k] : largest;
            const float part63 = largest / 63.0f;
            float found = half_of(part63 < 5.9604644775390625e-8f ? 5.9604644775390625e-8f : part63);
            if (largest > 63.5f * found) found = from_float16((uint16_t)(float16_bits(found) + 1));
            unit.of[part] = largest > 0.0f ? found : 0.0f;
        }
        const Lanes units = unit.spread();
        codes = within(rounded(values / chosen(units > 0.0f, units, all(INFINITE))), 0.0f, 63.0f);
        return unit;
    }
};

int search_four_bit(const SearchJob *job, int64_t begin, int64_t end) {
    const int64_t across = job->columns / SUPERBLOCK;
    FourBits block;
    for (int64_t at = begin; at < end; at += 2) {
        for (int part = 0; part < 2; part++) {  // a last one alone stands in both places
            const int64_t from = at + part < end ? at + part : at;
            if (!are_finite(job->x + from * SUPERBLOCK)) return REFUSED;
            laid<32>(job->x + from * SUPERBLOCK, 8, 8 * part, block.x);
            if (job->weights) laid<32>(job->weights + from % across * SUPERBLOCK, 8, 8 * part, block.weights);
        }
        if (!job->weights) for (int k = 0; k < 32; k++) block.weights[k] = all(1.0f);

        Lanes scale, minimum, sub_scale, sub_minimum, plain_scale, plain_minimum, low, high;
        block.range(false, low, high);
        const Pair plain_d = FourBits::nested((high - low) / 15.0f, plain_scale);
        const Pair plain_dmin = FourBits::nested(-low, plain_minimum);
        block.group_by_group(scale, minimum);
        Pair d = FourBits::nested(scale, sub_scale), dmin = FourBits::nested(minimum, sub_minimum);
        for (int part = 0; part < 2; part++)
            if (!is_finite(d.of[part]) || !is_finite(dmin.of[part]) || !is_finite(plain_d.of[part]) ||
                !is_finite(plain_dmin.of[part]))
                return REFUSED;
        for (int fit = 0; fit < 2; fit++) {
            block.moved(d, dmin, sub_scale, sub_minimum);
            block.fitted(d, dmin, sub_scale, sub_minimum);
        }
        const Lanes found = block.errors(d, dmin, sub_scale, sub_minimum);
        const Lanes plain = block.errors(plain_d, plain_dmin, plain_scale, plain_minimum);
        for (int part = 0; part < 2 && at + part < end; part++) {
            const bool better = lane_sum(found, 8 * part, 8) < lane_sum(plain, 8 * part, 8) * GAIN;
            job->d[at + part] = float16_bits(better ? d.of[part] : plain_d.of[part]);
            job->dmin[at + part] = float16_bits(better ? dmin.of[part] : plain_dmin.of[part]);
            for (int k = 0; k < 8; k++) {
                const int lane = 8 * part + k;
                job->sub_scale[(at + part) * 8 + k] = (uint8_t)(better ? sub_scale[lane] : plain_scale[lane]);
                job->sub_minimum[(at + part) * 8 + k] = (uint8_t)(better ? sub_minimum[lane] : plain_minimum[lane]);
            }
        }
    }
    return DONE;
}

}  // namespace superblocks
}  // namespace
