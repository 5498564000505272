#include "affine.h"
#include "codebook.h"
#include "products.h"

extern const Table avx2_table = {
    round_affine,   quantize_affine,     dequantize_affine, round_codebook, quantize_codebook,
    dequantize_codebook, mask_gradient, prepare_product,   product,
};
