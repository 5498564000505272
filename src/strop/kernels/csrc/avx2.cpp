#include "adam.h"
#include "affine.h"
#include "block.h"
#include "codebook.h"
#include "hqq.h"
#include "int8.h"
#include "products.h"
#include "search.h"
#include "step.h"

extern const Table avx2_table = {
    round_affine,   quantize_affine,     dequantize_affine, round_codebook, quantize_codebook,
    dequantize_codebook, mask_gradient, prepare_product,   product,
};

extern const BlockTable avx2_block = {
    norm,       norm_backward,        norm_gain, split_heads,      split_heads_backward, merge_heads,
    merge_heads_backward, softmax, softmax_backward, swiglu, swiglu_backward,      cross_entropy,
};

extern const SearchTable avx2_search = {superblocks::search_four_bit, superblocks::search_six_bit};
extern const StepTable avx2_step = {step_turn, step_attend, step_swiglu, step_add, MOST_QUERIES};
extern const Int8Table avx2_int8 = {round_rows, int8_product};
extern const AdamTable avx2_adam = {adam_step};
extern const HqqTable avx2_hqq = {hqq_scales};
