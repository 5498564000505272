"""Methods: (weight, scheme, statistics of its inputs) to a `QuantizedTensor`. One file each, one table of names.

base.py     Statistics, and what every method is called with
rtn.py      rounding to nearest, over the range that an observer chooses
search.py   rounding to nearest, with the scale searched for the least weighted squared error
clipping.py the same for the least output error of each group, as AWQ clips

Methods over a whole block:

awq.py          input channels scaled by what they matter
smoothquant.py  input channels scaled so that inputs round well too
folding.py      where such scales go, for both
"""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

from strop.methods.awq import awq
from strop.methods.base import Block, BlockMethod, BlockResult, Method, Statistics, weighted_error
from strop.methods.rtn import rtn
from strop.methods.search import search
from strop.methods.smoothquant import smoothquant

METHODS: Mapping[str, Method] = MappingProxyType({"rtn": rtn, "search": search})
"""Every method by name."""

BLOCK_METHODS: Mapping[str, BlockMethod] = MappingProxyType(
    {
        "awq": awq,
        "smooth": smoothquant,
        "smooth-search": partial(smoothquant, alpha=None),
    }
)
"""Every method over a whole block by name."""

__all__ = [
    "BLOCK_METHODS",
    "METHODS",
    "Block",
    "BlockMethod",
    "BlockResult",
    "Method",
    "Statistics",
    "awq",
    "rtn",
    "search",
    "smoothquant",
    "weighted_error",
]
