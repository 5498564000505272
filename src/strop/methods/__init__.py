"""Methods: (weight, scheme, statistics of its inputs) to a `QuantizedTensor`. One file each, one table of names.

base.py     Statistics, and what every method is called with
rtn.py      rounding to nearest, over the range that an observer chooses
search.py   rounding to nearest, with the scale searched for the least weighted squared error
gptq.py     column after column, the error of each made up for by the columns still to come; needs second moments
hqq.py      scales of least |error|^0.7, by half-quadratic splitting; needs no data
hadamard.py randomized Hadamard rotations, which spread outliers before rounding; not a method by itself
"""

from collections.abc import Mapping
from types import MappingProxyType

from strop.methods.base import Method, Statistics, weighted_error
from strop.methods.gptq import gptq
from strop.methods.hqq import hqq
from strop.methods.rtn import rtn
from strop.methods.search import search

METHODS: Mapping[str, Method] = MappingProxyType({"rtn": rtn, "search": search, "gptq": gptq, "hqq": hqq})
"""Every method by name."""

__all__ = ["METHODS", "Method", "Statistics", "gptq", "hqq", "rtn", "search", "weighted_error"]
