"""Calibration: what the layers of a model meet on your own rows, one block in memory at a time.

statistics.py   one pass of a whole model: mean squares of every layer's inputs
activations.py  hidden states between two blocks, in memory up to a budget and on the disk above it
block.py        one block over its inputs, as `strop.methods` sees it
"""

from strop.calibrate.block import CalibrationBlock
from strop.calibrate.statistics import gather_statistics

__all__ = ["CalibrationBlock", "gather_statistics"]
