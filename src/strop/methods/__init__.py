"""Methods: (weight, scheme, statistics of its inputs) to a `QuantizedTensor`. One file each, one table of names.

base.py         Statistics, and what every method is called with
rtn.py          rounding to nearest, over the range that an observer chooses
search.py       rounding to nearest, with the scale searched for the least weighted squared error
superblocks.py  that search for Q4_K, whose groups have scales and minimums of 6 bits
stochastic.py   rounding to one of the two neighbours by chance, without bias
gptq.py         column after column, the error of each made up for by the columns still to come; needs second moments
hqq.py          scales of least |error|^0.7, by half-quadratic splitting; needs no data
hadamard.py     randomized Hadamard rotations, which spread outliers before rounding; not a method by itself
clipping.py     scales for the least output error of each group, as AWQ clips

Methods over a whole block:

awq.py             input channels scaled by what they matter
smoothquant.py     input channels scaled so that inputs round well too
folding.py         where such scales go, for both
autoround.py       rounding offsets and clips by signed gradient descent
blockwise.py       scales, zero points and weights trained together
rounding.py        rounding with gradients, for both
reconstruction.py  start, error and loop, for both
"""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

from strop.methods.autoround import autoround
from strop.methods.awq import awq
from strop.methods.base import Block, BlockMethod, BlockResult, Method, Statistics, output_error, weighted_error
from strop.methods.blockwise import blockwise
from strop.methods.gptq import gptq
from strop.methods.hqq import hqq
from strop.methods.rtn import rtn
from strop.methods.search import search
from strop.methods.smoothquant import smoothquant
from strop.methods.stochastic import stochastic

METHODS: Mapping[str, Method] = MappingProxyType(
    {"rtn": rtn, "search": search, "stochastic": stochastic, "gptq": gptq, "hqq": hqq}
)
"""Methods of one weight, by name."""

BLOCK_METHODS: Mapping[str, BlockMethod] = MappingProxyType(
    {
        "awq": awq,
        "smooth": smoothquant,
        "smooth-search": partial(smoothquant, alpha=None),
        "autoround": autoround,
        "autoround-light": partial(autoround, iterations=50, rate=2e-3),
        "autoround-best": partial(autoround, iterations=1000),
        "blockwise": blockwise,
    }
)
"""Methods of a whole block, by name; they need calibration rows."""

HESSIAN: frozenset[str] = frozenset({"gptq", "awq", "autoround", "autoround-light", "autoround-best"})
"""Methods that need the second moments of the inputs."""

DRIFT: frozenset[str] = frozenset({"gptq", "autoround", "autoround-light", "autoround-best"})
"""Methods that use how far the inputs are from those of the full-precision model."""

__all__ = [
    "BLOCK_METHODS",
    "DRIFT",
    "HESSIAN",
    "METHODS",
    "Block",
    "BlockMethod",
    "BlockResult",
    "Method",
    "Statistics",
    "autoround",
    "awq",
    "blockwise",
    "gptq",
    "hqq",
    "output_error",
    "rtn",
    "search",
    "smoothquant",
    "stochastic",
    "weighted_error",
]
