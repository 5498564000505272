"""Bits under a budget: `--budget 3.5bits | 300MB | kl<0.02`, a format for each layer by what it does to its block.

    3.5bits    average over the quantized layers, scales and zero points counted
    300MB      of the whole model: embeddings, head and norms count with what they take
    kl<0.02    the smallest model whose KL stays below it, on rows that neither calibrate nor judge

Every layer's error at every format is measured (`strop.calibrate.sensitivity`), the sum is made least within the bytes
(`strop.planner.allocation`), and what comes out is measured against the best uniform format of that size on rows of
their own: where uniform is better, it is taken. The receipt is then measured on rows that chose nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from strop.calibrate.quantizing import BlockWork
from strop.calibrate.sensitivity import measure_sensitivity
from strop.config.settings import size_in_bytes
from strop.errors import ConfigError, GateError, UsageError
from strop.files.folders import write_json
from strop.layers.base import linear_shape
from strop.layers.surgery import linear_modules
from strop.numerics.scheme import Scheme
from strop.planner.allocation import allocate
from strop.progress import SILENT, Reporter
from strop.recipes.calibrated import DISK_BYTES, Bench, calibrate_model
from strop.scratch import Scratch

FORMATS: Final = ("int2-g32-full", "int3-g32-full", "int4-g32-full", "int6-g32", "int8-g32")
"""What layers may become where no formats are named."""

TRIALS: Final = 6
"""Sizes that are tried for a limit on the KL."""

FILE: Final = "budget.json"
PICTURE: Final = "budget.png"


@dataclass(frozen=True)
class Budget:
    """What was asked for: one of the three.

    Attributes:
        bits: Average bits per weight of the quantized layers.
        total_bytes: Of the whole model's tensors.
        kl: Most nats per token.
    """

    bits: float | None = None
    total_bytes: int | None = None
    kl: float | None = None


def parse_budget(text: str) -> Budget:
    """Read a budget.

    Raises:
        ConfigError: it is none of the three kinds.

    >>> parse_budget("3.5bits").bits, parse_budget("300MB").total_bytes, parse_budget("kl<0.02").kl
    (3.5, 300000000, 0.02)
    """
    words = text.strip().lower().replace(" ", "")
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)(?:bits|bit|bpw)", words):
        return Budget(bits=float(found[1]))
    if found := re.fullmatch(r"kl<=?(\d*\.?\d+(?:e-?\d+)?)", words):
        return Budget(kl=float(found[1]))
    try:
        return Budget(total_bytes=size_in_bytes(words))
    except ValueError:
        raise ConfigError(
            f"budget {text!r}: needs bits per weight (3.5bits), a size (300MB) or a limit (kl<0.02)"
        ) from None


@dataclass(frozen=True)
class Allocation:
    """The formats by layer, and what they rest on.

    Attributes:
        schemes: Layer to its format.
        formats: Those that could be chosen.
        sensitivity: Layer to its block's relative output error under each of them, where the layer can have it.
        nbytes: Of all layers.
        weights: Of all layers.
        verdict: Why these and not others, in a sentence.
        trials: What was measured on the way: name, bits per weight and KL on the choosing rows.
    """

    schemes: Mapping[str, Scheme]
    formats: Sequence[str]
    sensitivity: Mapping[str, Mapping[str, float]]
    nbytes: int
    weights: int
    verdict: str
    trials: Sequence[Mapping[str, Any]]

    @property
    def bits(self) -> float:
        """Average bits per weight."""
        return 8 * self.nbytes / self.weights

    def lines(self) -> list[str]:
        """The choice in sentences."""
        counts: dict[str, int] = {}
        for scheme in self.schemes.values():
            counts[scheme.name] = counts.get(scheme.name, 0) + 1
        shown = ", ".join(f"{name} on {count}" for name, count in sorted(counts.items()))
        return [f"{self.bits:.3f} bits per weight over {len(self.schemes)} layers: {shown}", self.verdict]

    def write(self, folder: Path) -> None:
        """Write `budget.json` and `budget.png`."""
        from strop.recipes.budget_picture import draw

        write_json(
            folder / FILE,
            {
                "bits_per_weight": self.bits,
                "formats": list(self.formats),
                "verdict": self.verdict,
                "trials": list(self.trials),
                "layers": {
                    name: {"format": scheme.name, "error": dict(self.sensitivity[name])}
                    for name, scheme in self.schemes.items()
                },
            },
        )
        draw(self, folder / PICTURE)


def choose_formats(
    bench: Bench,
    budget: Budget,
    formats: Mapping[str, Scheme],
    fits: Callable[[str, Scheme], bool],
    work: BlockWork,
    *,
    plan: Mapping[str, Any],
    folder: Path,
    reporter: Reporter = SILENT,
) -> Allocation:
    """Choose a format for every layer.

    Args:
        bench: The model and its rows; of the calibrating ones a quarter is set aside to choose by.
        budget: What is allowed.
        formats: Those that may be chosen, by name.
        fits: Whether a layer can have a format, and the model's files hold it there.
        work: The method that will quantize.
        plan: What `work` is, as for `calibrate_model`.
        folder: Where trials keep their blocks.
        reporter: Told what happens.

    Raises:
        UsageError: the budget is below the least possible, or a layer can have none of the formats.
        GateError: no choice reaches the KL that was asked for.
    """
    choosing = bench.choosing()
    shapes = {name: linear_shape(module) for name, module in linear_modules(bench.model.model).items()}
    options = {layer: [s for s in formats.values() if fits(layer, s)] for layer in shapes}
    none = [layer for layer, able in options.items() if not able]
    if none:
        raise UsageError(
            f"budget: {len(none)} layer(s) can have none of {', '.join(formats)} ({', '.join(none[:3])}); name others "
            "with --formats"
        )
    with Scratch(DISK_BYTES) as scratch:
        errors = measure_sensitivity(choosing.stream(scratch), options, reporter=reporter)
    sizes = {layer: [_bytes(scheme, shapes[layer]) for scheme in options[layer]] for layer in shapes}
    weights = sum(math.prod(shape) for shape in shapes.values())
    trials: list[dict[str, Any]] = []

    def within(limit: int) -> dict[str, Scheme]:
        chosen = allocate([errors[layer] for layer in shapes], [sizes[layer] for layer in shapes], limit)
        return {layer: options[layer][option] for layer, option in zip(shapes, chosen, strict=True)}

    def measured(schemes: Mapping[str, Scheme], name: str) -> float:
        made = calibrate_model(choosing, schemes, work, plan=plan, folder=folder, reporter=reporter)
        made.results.remove()
        kl = made.held_out["kl"]
        taken = sum(_bytes(scheme, shapes[layer]) for layer, scheme in schemes.items())
        trials.append({"name": name, "bits_per_weight": 8 * taken / weights, "kl": kl})
        return kl

    def made_of(schemes: Mapping[str, Scheme], verdict: str) -> Allocation:
        return Allocation(
            schemes,
            list(formats),
            {
                layer: {scheme.name: error for scheme, error in zip(options[layer], errors[layer], strict=True)}
                for layer in shapes
            },
            sum(_bytes(scheme, shapes[layer]) for layer, scheme in schemes.items()),
            weights,
            verdict,
            trials,
        )

    if budget.kl is not None:
        return _smallest(budget.kl, sizes, within, measured, made_of)
    limit = _limit(budget, bench, shapes, weights)
    mixed = within(limit)
    uniform = [
        (scheme, sum(_bytes(scheme, shape) for shape in shapes.values()))
        for scheme in formats.values()
        if all(scheme in able for able in options.values())
    ]
    affordable = [scheme for scheme, taken in sorted(uniform, key=lambda each: each[1]) if taken <= limit]
    if not affordable or len(set(mixed.values())) == 1:
        return made_of(mixed, "no uniform format of that size is another choice")
    best = affordable[-1]
    ours, theirs = measured(mixed, "by sensitivity"), measured(dict.fromkeys(shapes, best), f"{best} everywhere")
    said = f"KL {ours:.4g} nats per token on the choosing rows, {best} everywhere {theirs:.4g}"
    if theirs < ours:
        return made_of(dict.fromkeys(shapes, best), f"uniform: the choice by sensitivity is worse ({said})")
    return made_of(mixed, f"by sensitivity: {said}")


def _smallest(
    kl: float,
    sizes: Mapping[str, Sequence[int]],
    within: Callable[[int], dict[str, Scheme]],
    measured: Callable[[Mapping[str, Scheme], str], float],
    made_of: Callable[[Mapping[str, Scheme], str], Allocation],
) -> Allocation:
    """The smallest size that keeps the KL, by halving between the least and the most bytes."""
    low, high = (sum(pick(options) for options in sizes.values()) for pick in (min, max))
    largest = within(high)
    reached = measured(largest, "largest")
    if reached > kl:
        raise GateError(
            f"budget kl<{kl:g}: with the largest formats everywhere it is {reached:.4g} nats per token on the choosing "
            "rows; allow more, name finer formats (--formats), or calibrate on more rows"
        )
    best = largest
    for trial in range(TRIALS):
        middle = (low + high) // 2
        schemes = within(middle)
        found = measured(schemes, f"trial {trial + 1}")
        if found <= kl:
            best, high, reached = schemes, middle, found
        else:
            low = middle
    return made_of(best, f"the smallest of {TRIALS + 1} sizes tried with a KL of at most {kl:g}: {reached:.4g}")


def _limit(budget: Budget, bench: Bench, shapes: Mapping[str, tuple[int, int]], weights: int) -> int:
    """Bytes for the layers together."""
    if budget.bits is not None:
        return int(budget.bits * weights / 8)
    assert budget.total_bytes is not None
    inside = {f"{layer}.weight" for layer in shapes}
    beside = sum(p.numel() for name, p in bench.model.model.named_parameters() if name not in inside)
    kept = beside * bench.model.dtype.itemsize
    if budget.total_bytes <= kept:
        raise UsageError(
            f"budget: {budget.total_bytes:,} bytes, and embeddings, norms and what else is not quantized take {kept:,}"
        )
    return budget.total_bytes - kept


def _bytes(scheme: Scheme, shape: tuple[int, int]) -> int:
    return round(scheme.bits_per_weight(shape) * math.prod(shape) / 8)
