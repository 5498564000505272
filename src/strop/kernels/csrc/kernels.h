// What the files of the native library share: the job that a caller describes, and the kernels that do it.
//
// The interface is plain C over raw arrays: contiguous, in the machine's own byte order, of the types named here. The
// Python side (library.py) has the same struct; strop_job_bytes and the digest of these sources (build.py) guard both.
#pragma once

#include <stdint.h>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the kernels lay codes in little-endian words; elsewhere the PyTorch reference does the work"
#endif

enum NumberType { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT32 = 3 };
enum Mode { SYMMETRIC = 0, FULL_RANGE = 1, ASYMMETRIC = 2 };
enum Level { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AMX = 3, NEON = 4, LEVELS = 5 };
enum Status { DONE = 0, REFUSED = 1 };  // REFUSED (NaN, infinities, an overflow): the reference has the message

// Values lie in `rows` rows of `columns`, cut into groups of `size` that share a scale. A codebook's blocks are cut
// from the flattened rows, and the last may be short.
typedef struct {
    const void *x;             // values in, x_type
    void *y;                   // values out, y_type
    uint8_t *codes;            // packed codes, rows of row_bytes
    void *scale;               // scale_type, one a group, or one for all where `shared`
    const float *value_scale;  // what values are made with where that is not `scale`; codebooks only, else null
    uint8_t *zero;             // stored zero points, laid like scale, or null
    uint8_t *mask;             // a bit for each value, a group's from a whole byte on: 1 where the grid does not clip
    const float *levels;       // codebooks: 16 values, ascending where values are rounded, by code where they are read
    const float *midpoints;    // codebooks: what lies between the ascending levels, 15, the unused ones infinite
    const uint8_t *order;      // codebooks: the codes of the ascending levels, 16
    const void *bias;          // products: x_type, one a row, or null
    float *inputs, *sums;      // products: what prepare_product makes of x, tokens * input_room and tokens * sums_room
    uint16_t *laid;            // products of many tokens: x as lay_tiles lays it, tokens and columns filled up with zeros
    int64_t rows, columns, size, row_bytes, tokens;
    int32_t x_type, y_type, scale_type, bits, qmin, mode;
    int32_t given;             // whether scales (and zero points) are read, not written
    int32_t shared;
} Job;

// Room for a token's inputs, in whole blocks of vectors; behind them for what sums of 4-bit codes begin with, one number
// for eight inputs; and for the sums of their groups. All end in zeros.
static inline int64_t first_place(int64_t columns) { return (columns + 16 + 127) / 128 * 128; }
static inline int64_t input_room(int64_t columns) { return first_place(columns) / 8 * 9; }
static inline int64_t sums_room(int64_t groups) { return groups + 16; }

typedef int (*Kernel)(const Job *job, int64_t begin, int64_t end);

// One per level; each works on a range of its units and returns a Status.
typedef struct {
    Kernel round_affine;        // units: groups. y = the values nearest to x; mask where asked
    Kernel quantize_affine;     // units: rows. codes (and scales, zero points) of x
    Kernel dequantize_affine;   // units: rows. y of codes
    Kernel round_codebook;      // units: blocks
    Kernel quantize_codebook;   // units: blocks
    Kernel dequantize_codebook; // units: blocks
    Kernel mask_gradient;       // units: groups. y = x where the mask is set, else a zero of its sign
    Kernel prepare_product;     // units: tokens
    Kernel product;             // units: rows of the weight. y[t, row] = x[t] . row + bias, summed in float32
} Table;

extern const Table portable_table, avx2_table, avx512_table, neon_table;

// Products of bfloat16 inputs with weights decoded into bfloat16, a tile at a time (tiles.h), for up to MOST_TILED
// tokens. AMX has these alone: for all else it is AVX512.
const int64_t MOST_TILED = 64;

typedef struct {
    Kernel lay;      // units: tokens. x into laid
    Kernel product;  // units: rows of the weight, as Table's
} Tiles;

extern const Tiles amx_tiles;

// What a part of a decoder's block is asked to do (block.h). `stride` is the distance of two tokens in x; heads of
// queries share keys in groups of heads / kv_heads, and lie as [rows, kv_heads, length, group, columns].
typedef struct {
    const void *x, *grad, *add;  // values in: x_type or y_type, as each kernel says
    void *y, *sum;               // values out
    void *q, *k, *v;             // heads
    const float *gain;           // of a norm, [columns]
    const float *cos, *sin;      // [length or tokens, turned]
    float *reciprocal, *sums;    // one a row, as each kernel says
    const int32_t *first, *last; // the keys that a token sees, [rows, length]
    const int64_t *labels;
    int64_t rows, columns, stride, heads, kv_heads, length, turned;
    int64_t tokens, token, key;  // of a part of the scores: its tokens, the first of them, the first key
    float eps, scaling;
    int32_t x_type, y_type;      // of the residual stream, and of what products take and give
    int32_t shared;              // whether all rows have the same positions
} BlockJob;

typedef int (*BlockKernel)(const BlockJob *job, int64_t begin, int64_t end);

typedef struct {
    BlockKernel norm, norm_backward;                  // units: rows
    BlockKernel norm_gain;                            // units: columns
    BlockKernel split_heads, split_heads_backward;    // units: tokens
    BlockKernel merge_heads, merge_heads_backward;    // units: tokens
    BlockKernel softmax, softmax_backward;            // units: rows of scores
    BlockKernel swiglu, swiglu_backward;              // units: rows
    BlockKernel cross_entropy;                        // units: rows
} BlockTable;

extern const BlockTable portable_block, avx2_block, avx512_block, neon_block;

// A search of superblocks: x [rows, columns], columns in whole superblocks of 256; see search.h.
typedef struct {
    const float *x;
    const float *weights;  // of the columns' squared errors, [columns], not negative; null for 1
    uint8_t *codes;        // Q6_K's, 256 a superblock, signed; else null
    uint16_t *d, *dmin;    // float16, one a superblock; dmin of Q4_K alone
    uint8_t *sub_scale;    // one a group: signed in Q6_K
    uint8_t *sub_minimum;  // one a group, of Q4_K alone
    int64_t rows, columns;
} SearchJob;

typedef int (*SearchKernel)(const SearchJob *job, int64_t begin, int64_t end);

typedef struct {
    SearchKernel search_four_bit, search_six_bit;  // units: superblocks
} SearchTable;

extern const SearchTable portable_search, avx2_search, avx512_search, neon_search;

// A decoder's block while each of some texts gets one token (step.h): what comes in and goes out is x.
typedef struct {
    void *x;                    // the stream, [tokens, hidden]
    const Job *products[7];     // of queries, keys, values, the output, gate, up, down: weights, scales and biases
    const float *gains[4];      // of the norms before attention, before the feed-forward part, of queries, of keys
    const float *cos, *sin;     // [tokens, turned]
    void *keys, *values;        // the cache, [slots, columns, kv_heads, size]
    const int64_t *index;       // where each token goes in it: slot * columns + column
    void *q, *k, *v, *gate, *up, *between, *given, *normed;  // room, by strop_step
    float *scores;              // [tokens, heads, columns], the same
    int64_t tokens, hidden, inner, heads, kv_heads, size, turned, columns;
    float eps[4];
    float scaling;
    int32_t type;               // of everything that is no gain, position or score
    int32_t tiled;              // bit i: product i goes through tiles
} StepJob;

typedef int (*StepKernel)(const StepJob *job, int64_t begin, int64_t end);

typedef struct {
    StepKernel turn;           // units: tokens
    StepKernel attend;         // units: tokens * kv_heads
    StepKernel swiglu, add;    // units: tokens
    int64_t most_queries;      // values of the queries that share keys
} StepTable;

extern const StepTable portable_step, avx2_step, avx512_step, neon_step;

// What int8 products are asked to do (int8.h): rows of x rounded, and multiplied by a weight [out, in] of int8.
typedef struct {
    const void *x;         // values in, x_type, rows of x_stride
    const float *factor;   // what x's columns are multiplied by before they are rounded, or null
    int8_t *codes;         // of x, rows of `stride`, zeros behind the columns
    float *scales;         // of x, one a row
    const int8_t *weight;  // rows of weight_stride
    const float *channel;  // of y's columns, or null
    void *y;               // values out, x_type, rows of y_stride
    int64_t rows, columns, outputs;  // of x; columns of y
    int64_t x_stride, stride, weight_stride, y_stride;
    int32_t x_type, back;  // back: y = x W, else x W^T
} Int8Job;

typedef int (*Int8Kernel)(const Int8Job *job, int64_t begin, int64_t end);

typedef struct {
    Int8Kernel round_rows;    // units: rows
    Int8Kernel int8_product;  // units: panels of 32 columns of y; refused without tiles
} Int8Table;

extern const Int8Table portable_int8, avx2_int8, avx512_int8, neon_int8;

// A moment of AdamW in 8 bits: codes and a scale for each 256; what the codes mean, and where a number's code is found,
// by its upper 16 bits: the code below them, and the midpoint that they hold (numerics/dynamic8.py).
typedef struct {
    uint8_t *codes;
    float *scales;
    const float *levels;   // 256
    const uint8_t *below;  // 65536
    const float *edges;    // 65536
} Moment;

// A step of AdamW (adam.h): m += (g - m) new_first, v = v old_second + g g new_second,
// w = w decay + m / (sqrt(v) root_scale + eps) rate.
typedef struct {
    float *weight;
    const void *gradient;  // gradient_type
    Moment first, second;
    int64_t rows, columns;  // how many numbers, and 1
    float new_first, old_second, new_second, root_scale, eps, decay, rate;
    int32_t gradient_type;
} AdamJob;

typedef int (*AdamKernel)(const AdamJob *job, int64_t begin, int64_t end);

typedef struct {
    AdamKernel adam_step;  // units: blocks of 256
} AdamTable;

extern const AdamTable portable_adam, avx2_adam, avx512_adam, neon_adam;

// Scales of an integer grid by HQQ (hqq.h): groups in rows.
typedef struct {
    const float *x;        // finite
    float *scales;         // one a group, values of scale_type, not 0; the best that were met, at the end
    const float *zero;     // stored zero points, one a group, or null
    int64_t rows, columns;
    float low, high;       // the ends of the grid, in stored codes where there are zero points
    float power, log2_beta, log2_kappa, stride, gain;
    int32_t iterations, scale_type;
} HqqJob;

typedef int (*HqqKernel)(const HqqJob *job, int64_t begin, int64_t end);

typedef struct {
    HqqKernel hqq_scales;  // units: groups
} HqqTable;

extern const HqqTable portable_hqq, avx2_hqq, avx512_hqq, neon_hqq;
