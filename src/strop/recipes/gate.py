"""The gate of `quantize`: how far the result may be from its source, which layers are to blame where it is further, and
what a repair gives them.

A layer's blame is what its rounded weights alone do to its block's output, relative squared error over held-out rows:
everything else, inputs too, in full precision. Only a result past the gate is examined so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from strop.calibrate.block import CalibrationBlock
from strop.calibrate.stream import BlockStream
from strop.data.batches import eval_batches
from strop.errors import GateError, UsageError
from strop.methods import BlockResult
from strop.numerics.loss import fold_scales
from strop.numerics.scheme import Scheme
from strop.progress import Reporter
from strop.recipes.calibrated import DISK_BYTES, Bench, Calibrated
from strop.scratch import Scratch

BATCHES: Final = 4
"""Held-out batches, at most, that blame is measured on."""

NAMED: Final = 5
"""Layers to blame that a message names."""


@dataclass(frozen=True)
class Gate:
    """How far the result may be from its source on held-out rows.

    Attributes:
        max_kl: Most nats per token; None: any.
        min_agreement: Least share of tokens on which both choose the same; None: any.
    """

    max_kl: float | None
    min_agreement: float | None

    @property
    def asked(self) -> bool:
        """Whether there is a gate."""
        return self.max_kl is not None or self.min_agreement is not None

    def problems(self, held_out: Mapping[str, Any]) -> list[str]:
        """What lies past the gate; a figure that is no number does.

        Raises:
            UsageError: there are no held-out figures.
        """
        if not self.asked:
            return []
        if not held_out:
            raise UsageError("a gate needs rows to judge by, and all of them calibrate; give more rows")
        problems: list[str] = []
        if self.max_kl is not None and not held_out["kl"] <= self.max_kl:
            problems.append(f"KL {held_out['kl']:.4g} nats per token, at most {self.max_kl:g} is allowed")
        if self.min_agreement is not None and not held_out["top1_agreement"] >= self.min_agreement:
            problems.append(
                f"top-1 agreement {held_out['top1_agreement']:.4f}, at least {self.min_agreement:g} is needed"
            )
        return problems

    def error(self, problems: Sequence[str], calibrated: Calibrated, blamed: Mapping[str, float]) -> GateError:
        """What to tell of a result that lies past the gate."""
        return GateError(
            f"past the gate on {calibrated.held_out['rows']} held-out rows: {'; '.join(problems)}. {_named(blamed)} "
            "Nothing was written; use more bits, smaller groups, another method or more rows, or let --repair give "
            "bits to the layers to blame. A run that differs in the gate alone goes on from "
            f"{calibrated.results.folder}"
        )

    def passed(self, repairs: int) -> dict[str, Any]:
        """What a receipt says of a gate that was passed; empty where there was none."""
        if not self.asked:
            return {}
        return {"max_kl": self.max_kl, "min_agreement": self.min_agreement, "passed": True, "repairs": repairs}


def layers_to_blame(bench: Bench, calibrated: Calibrated) -> dict[str, float]:
    """What each layer, as it was made, does to its block's output, from the most to the least.

    Where a method may have folded scales into other layers they are undone (`fold_scales`), so that the rest of the
    block fits, if that brings the output nearer.

    Args:
        bench: The model and its rows.
        calibrated: What was made of it.

    Returns:
        Layer to sum |block(x; layer rounded) - block(x)|^2 / sum |block(x)|^2, x the full-precision hidden states.
    """
    blame: dict[str, float] = {}
    batches = list(eval_batches(bench.rows.held_out, bench.memory.batch_size))
    batches = batches[:: -(-len(batches) // BATCHES)]
    with Scratch(DISK_BYTES) as scratch:
        stream = BlockStream(
            bench.model, batches, len(batches), memory_bytes=bench.memory.hidden_bytes, scratch=scratch
        )
        for index, name in enumerate(bench.model.blocks):
            made, _ = calibrated.results.get(index)

            def work(block: CalibrationBlock, made: BlockResult = made) -> Mapping[str, Tensor]:
                for layer in made.weights:
                    blame[layer] = _blame(block, made, layer, folds=calibrated.receipts[layer].folded)
                return {}

            stream.through(name, list(made.weights), work)
    return dict(sorted(blame.items(), key=lambda item: -item[1]))


@torch.no_grad()
def _blame(block: CalibrationBlock, made: BlockResult, layer: str, *, folds: bool) -> float:
    quantized = made.weights[layer]
    weight = quantized.dequantize()
    found = _error(block, layer, weight)
    scales = fold_scales(block.weights[layer], quantized) if folds else None
    if scales is None:
        return found
    return min(found, _error(block, layer, weight.div_(scales[0]).div_(scales[1])))


def _error(block: CalibrationBlock, layer: str, weight: Tensor) -> float:
    lost = whole = 0.0
    for number in range(block.batches):
        wanted = block.target(number).double()
        lost += float((block.run(number, {layer: weight}).double() - wanted).square_().sum())
        whole += float(wanted.square_().sum())
    return lost / whole if whole else 0.0


def _named(blamed: Mapping[str, float]) -> str:
    shown = [f"{layer} ({error:.2e} of its block's output)" for layer, error in list(blamed.items())[:NAMED]]
    return f"To blame most: {', '.join(shown)}."


def more_bits(
    calibrated: Calibrated,
    schemes: Mapping[str, Scheme],
    known: Sequence[Scheme],
    fits: Callable[[str, Scheme], bool],
    blamed: Mapping[str, float],
    reporter: Reporter,
) -> dict[str, Scheme]:
    """The next format with more bits for the quarter of the layers that are to blame most.

    Raises:
        GateError: all of them have the most bits that there are.
    """
    larger: dict[str, Scheme] = {}
    for layer, own in schemes.items():
        above = sorted((s for s in known if s.bits > own.bits and fits(layer, s)), key=lambda s: s.bits)
        if above and layer in blamed:  # the embedding and the head belong to no block
            larger[layer] = above[0]
    if not larger:
        raise GateError(
            "repair: every layer has the most bits that --formats allows, and the gate does not pass "
            f"(KL {calibrated.held_out['kl']:.4g}). {_named(blamed)} Nothing was written; name formats of more bits "
            "(--formats), or allow more"
        )
    chosen = [layer for layer in blamed if layer in larger][: max(1, len(schemes) // 4)]
    reporter.note(
        f"repair: KL {calibrated.held_out['kl']:.4g}, agreement {calibrated.held_out['top1_agreement']:.4f}; more bits "
        f"for {len(chosen)} layers, {chosen[0]} first"
    )
    return {**schemes, **{layer: larger[layer] for layer in chosen}}
