"""Methods: (weight, scheme, statistics of its inputs) to a `QuantizedTensor`. One file each, one table of names.

base.py     Statistics, and what every method is called with
rtn.py      rounding to nearest, over the range that an observer chooses
search.py   rounding to nearest, with the scale searched for the least weighted squared error
superblocks.py  that search for Q4_K, whose groups have scales and minimums of 6 bits
stochastic.py   rounding to one of the two neighbours by chance, without bias
"""

from collections.abc import Mapping
from types import MappingProxyType

from strop.methods.base import Block, BlockMethod, BlockResult, Method, Statistics, output_error, weighted_error
from strop.methods.rtn import rtn
from strop.methods.search import search
from strop.methods.stochastic import stochastic

METHODS: Mapping[str, Method] = MappingProxyType({"rtn": rtn, "search": search, "stochastic": stochastic})
"""Methods of one weight, by name."""

BLOCK_METHODS: Mapping[str, BlockMethod] = MappingProxyType({})
"""Methods of a whole block, by name; they need calibration rows."""

HESSIAN: frozenset[str] = frozenset()
"""Methods of `METHODS` that need the second moments of the inputs."""

__all__ = [
    "BLOCK_METHODS",
    "HESSIAN",
    "METHODS",
    "Block",
    "BlockMethod",
    "BlockResult",
    "Method",
    "Statistics",
    "output_error",
    "rtn",
    "search",
    "stochastic",
    "weighted_error",
]
