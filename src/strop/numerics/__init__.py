"""Tensors in, tensors out: number formats, grids, codes, bytes. No modules, no models. A map of the room:

formats.py    what a number can be: IntFormat, FloatFormat, CodebookFormat, and FORMATS by name
scheme.py     how a weight is quantized: Scheme, and the parser of `--format`
groups.py     a weight cut into the groups that share a scale, and put together again
scales.py     scale and zero point of a range
affine.py     quantize, dequantize, and fake_quantize, which is both with a gradient
codebook.py   NF4, FP4: nearest level, double quantization
grid.py       the same three questions to any format: codes, values, rounded
packing.py    codes of 2 to 8 bits to bytes
superblock.py GGUF's Q4_K: scales and minimums of 6 bits under a float16 of their superblock
laid.py       a scheme's grid laid over one weight: what rounding, real and fake, goes through
observers.py  which range a grid should cover
activations.py, activation_observers.py, int8_matmul.py   inputs of a layer in 8 bits, their range, exact products
grouped.py    codes in groups with an offset, as a cache of keys and values holds them
qtensor.py    QuantizedTensor: codes, scales, zero points; quantize_tensor makes one
"""

from strop.numerics.affine import choose_scale, dequantize, fake_quantize, quantize
from strop.numerics.codebook import NestedScale
from strop.numerics.formats import FORMATS, CodebookFormat, FloatBits, FloatFormat, Format, IntFormat
from strop.numerics.groups import plan_shape
from strop.numerics.observers import OBSERVERS, Observer
from strop.numerics.packing import pack, packed_size, unpack
from strop.numerics.qtensor import QuantizedTensor, quantize_tensor
from strop.numerics.scheme import FormatSpec, Granularity, Mode, Scheme, parse_format, parse_scheme
from strop.numerics.superblock import SuperScale

__all__ = [
    "FORMATS",
    "OBSERVERS",
    "CodebookFormat",
    "FloatBits",
    "FloatFormat",
    "Format",
    "FormatSpec",
    "Granularity",
    "IntFormat",
    "Mode",
    "NestedScale",
    "Observer",
    "QuantizedTensor",
    "Scheme",
    "SuperScale",
    "choose_scale",
    "dequantize",
    "fake_quantize",
    "pack",
    "packed_size",
    "parse_format",
    "parse_scheme",
    "plan_shape",
    "quantize",
    "quantize_tensor",
    "unpack",
]
