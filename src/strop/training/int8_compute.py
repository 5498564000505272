"""Products of the frozen base in int8, where they keep the gradient (`compute: int8`).

The blocks that run as one piece get their frozen weights as int8 codes (`layers.int8_products`), by which they multiply
in training mode; evaluation, and what is saved, keep the base as it is. Whether a block keeps them is measured on the
first row: the gradient of the adapters is computed with the base's own products and again in int8. Where the cosine of
the two is below `LEAST_COSINE`, each block is tried alone, and those that turn the gradient most go back, as few as it
takes. Outliers of activations do that: they take the grid of a token for themselves.

Source: the measure is the one by which 8-bit training is judged, e.g. in Wortsman and others, "Stable and low-precision
training for large-scale vision-language models" (2023), where it diverges as products turn the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from strop.data.batches import BatchStream
from strop.layers.block_products import Operands
from strop.layers.fused_block import FusedBlock
from strop.layers.int8_products import Int8Weight, int8_is_exact
from strop.layers.surgery import block_lists
from strop.precision import autocast
from strop.training.fusing import probe_inputs

LEAST_COSINE: Final = 0.99
"""Between the gradient in int8 and that of the base's own products."""

PROBE_TOKENS: Final = 256
"""Of the row by which blocks are judged."""


@dataclass(frozen=True)
class Int8Compute:
    """What came of it.

    Attributes:
        blocks: Those that multiply in int8, by their place.
        kept: Those that keep the base's products.
        cosine: Of the adapters' gradient in int8 with that of the base's products, over all blocks.
        nbytes: What the codes take.
        reason: Why no block multiplies in int8; empty where some do.
    """

    blocks: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    cosine: float | None = None
    nbytes: int = 0
    reason: str = ""

    def line(self) -> str:
        """In a sentence."""
        if not self.blocks:
            return f"no product is computed in int8: {self.reason}"
        left = f"; blocks {', '.join(map(str, self.kept))} keep the base's products" if self.kept else ""
        return (
            f"{len(self.blocks)} blocks multiply by the frozen base in int8: cosine {self.cosine:.4f} of the gradient "
            f"with the base's own products (least {LEAST_COSINE}), {self.nbytes / 1e6:,.0f} MB of codes{left}"
        )


def use_int8(model: nn.Module, stream: BatchStream, dtype: torch.dtype) -> Int8Compute:
    """Let the blocks multiply by their frozen weights in int8, those that pass.

    Args:
        model: A causal language model whose blocks run as one piece, its adapters in place.
        stream: What it is trained on; where it stands is left as it was.
        dtype: Of the other products.
    """
    blocks = max(([*found] for found in block_lists(model)), key=len, default=[])
    pieces = {at: block.forward for at, block in enumerate(blocks) if isinstance(block.forward, FusedBlock)}
    if not pieces:
        return Int8Compute(reason="no block of this model runs as one piece (strop bench shows the kernels in use)")
    if not int8_is_exact():
        return Int8Compute(reason="this processor's sums of int8 products saturate (it has no VNNI instructions)")
    place = stream.state_dict()
    batch = stream.next_step()[0]
    stream.load_state_dict(place)
    gradient = _Gradient(model, probe_inputs(batch, PROBE_TOKENS), dtype)
    codes = {at: _codes(piece, dtype) for at, piece in pieces.items()}
    own = gradient.with_codes(pieces, {})

    def cosine(those: Sequence[int]) -> float:
        found = gradient.with_codes(pieces, {at: codes[at] for at in those})
        return float(functional.cosine_similarity(own, found, dim=0))

    chosen, reached = list(pieces), cosine(list(pieces))
    if not reached >= LEAST_COSINE:
        alone = {at: cosine([at]) for at in pieces}
        order = sorted(pieces, key=lambda at: alone[at] if alone[at] == alone[at] else -1.0)  # NaN is the worst
        fewest, most = 1, len(order)  # blocks that go back: between them lies the least number that is enough
        while fewest < most:
            middle = (fewest + most) // 2
            fewest, most = (fewest, middle) if cosine(order[middle:]) >= LEAST_COSINE else (middle + 1, most)
        chosen = sorted(order[fewest:])
        reached = cosine(chosen)
    for at in chosen:
        pieces[at].int8 = codes[at]
    kept = tuple(at for at in range(len(blocks)) if at not in chosen)
    nbytes = sum(weight.nbytes for at in chosen for weight in codes[at] if weight is not None)
    reason = "" if chosen else f"it turns the gradient of every block (cosine below {LEAST_COSINE})"
    return Int8Compute(tuple(chosen), kept, reached if chosen else None, nbytes, reason)


def _codes(piece: FusedBlock, dtype: torch.dtype) -> tuple[Int8Weight | None, ...]:
    with torch.no_grad():
        return tuple(Int8Weight.of([Operands.of(part, dtype) for part in group]) for group in piece.parts.groups())


class _Gradient:
    """The gradient of the trained parameters for one row, as one vector; every token is to be foretold."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.inputs = inputs
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def with_codes(self, pieces: dict[int, FusedBlock], codes: dict[int, tuple[Int8Weight | None, ...]]) -> Tensor:
        """With these blocks in int8 and the others not; float32."""
        training, labels = self.model.training, self.inputs["input_ids"][:, 1:]
        self.model.train()
        try:
            for at, piece in pieces.items():
                piece.int8 = codes.get(at)
            with torch.random.fork_rng(devices=[]), torch.enable_grad():  # the same dropout each time
                torch.manual_seed(0)
                with autocast(labels.device, self.dtype):
                    logits = self.model(**self.inputs).logits[:, :-1]
                    loss = functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
                grads = torch.autograd.grad(loss, self.trained, allow_unused=True)
        finally:
            self.model.train(training)
            for piece in pieces.values():
                piece.int8 = None
        return torch.cat([grad.float().flatten() for grad in grads if grad is not None])
