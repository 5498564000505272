"""Calibration: what the layers of a model meet on your own rows, one block in memory at a time.

activations.py  hidden states between two blocks, in memory up to a budget and on the disk above it
block.py        one block over its inputs, as `strop.methods` sees it
stream.py       both models' hidden states flowing from block to block
input_scales.py one scale for all inputs of a layer, where a format has it
results.py      what was made of each block, on the disk until the model is written
memory.py       what it needs, and how to stay within a budget
quantizing.py   a method over every block, its result in place before the next one runs
"""

from strop.calibrate.block import CalibrationBlock
from strop.calibrate.quantizing import BlockReport, quantize_blocks
from strop.calibrate.results import Results
from strop.calibrate.stream import BlockError, BlockStream

__all__ = [
    "BlockError",
    "BlockReport",
    "BlockStream",
    "CalibrationBlock",
    "Results",
    "quantize_blocks",
]
