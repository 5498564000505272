"""Methods: (weight, scheme, statistics of its inputs) to a `QuantizedTensor`. One file each, one table of names.

base.py     Statistics, and what every method is called with
rtn.py      rounding to nearest, over the range that an observer chooses
search.py   rounding to nearest, with the scale searched for the least weighted squared error

Methods over a whole block:

autoround.py       rounding offsets and clips by signed gradient descent
blockwise.py       scales, zero points and weights trained together
rounding.py        rounding with gradients, for both
reconstruction.py  start, error and loop, for both
"""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

from strop.methods.autoround import autoround
from strop.methods.base import Block, BlockMethod, BlockResult, Method, Statistics, weighted_error
from strop.methods.blockwise import blockwise
from strop.methods.rtn import rtn
from strop.methods.search import search

METHODS: Mapping[str, Method] = MappingProxyType({"rtn": rtn, "search": search})
"""Every method by name."""

BLOCK_METHODS: Mapping[str, BlockMethod] = MappingProxyType(
    {
        "autoround": autoround,
        "autoround-light": partial(autoround, iterations=50, rate=5e-3),
        "autoround-best": partial(autoround, iterations=1000),
        "blockwise": blockwise,
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
    "autoround",
    "blockwise",
    "rtn",
    "search",
    "weighted_error",
]
