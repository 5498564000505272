// Compilers that know the tile instructions make them part of this level; whether they run is asked apart.
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define STROP_TILES
#endif

#include "adam.h"
#include "affine.h"
#include "block.h"
#include "codebook.h"
#include "hqq.h"
#include "int8.h"
#include "products.h"
#include "search.h"
#include "step.h"

extern const Table avx512_table = {
    round_affine,   quantize_affine,     dequantize_affine, round_codebook, quantize_codebook,
    dequantize_codebook, mask_gradient, prepare_product,   product,
};

extern const BlockTable avx512_block = {
    norm,       norm_backward,        norm_gain, split_heads,      split_heads_backward, merge_heads,
    merge_heads_backward, softmax, softmax_backward, swiglu, swiglu_backward,      cross_entropy,
};

extern const SearchTable avx512_search = {superblocks::search_four_bit, superblocks::search_six_bit};
extern const StepTable avx512_step = {step_turn, step_attend, step_swiglu, step_add, MOST_QUERIES};
extern const Int8Table avx512_int8 = {round_rows, int8_product};
extern const AdamTable avx512_adam = {adam_step};
extern const HqqTable avx512_hqq = {hqq_scales};
