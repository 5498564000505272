"""Methods: (weight, scheme, statistics of its inputs) to a `QuantizedTensor`. One file each, one table of names.

base.py     Statistics, and what every method is called with
rtn.py      rounding to nearest, over the range that an observer chooses
search.py   rounding to nearest, with the scale searched for the least weighted squared error
superblocks.py  that search for Q4_K, whose groups have scales and minimums of 6 bits
stochastic.py   rounding to one of the two neighbours by chance, without bias
"""

from collections.abc import Mapping
from types import MappingProxyType

from strop.methods.base import Method, Statistics, weighted_error
from strop.methods.rtn import rtn
from strop.methods.search import search
from strop.methods.stochastic import stochastic

METHODS: Mapping[str, Method] = MappingProxyType({"rtn": rtn, "search": search, "stochastic": stochastic})
"""Every method by name."""

__all__ = ["METHODS", "Method", "Statistics", "rtn", "search", "stochastic", "weighted_error"]
