"""Opens causal language models: a folder or a hub id, in full precision, quantized, or with an adapter.

`load` (`opening.py`) is the way in. `sources.py` finds the folder and says what it is, `hook.py` stands inside
transformers' own loader and turns one weight at a time into a `QuantLinear`. What a model consists of (linear layers,
head, blocks) is found by type and position in `strop.layers.surgery`.
"""

from strop.models.opening import OpenedModel, load

__all__ = ["OpenedModel", "load"]
