"""Bits under a budget: `--budget 3.5bits | 300MB | kl<0.02`, a format for each layer by what it does to its block.

    3.5bits    average over the layers, a head of its own among them; scales and zero points counted
    300MB      of the whole model: norms count with what they take
    kl<0.02    the smallest model whose KL stays below it, on rows that neither calibrate nor judge

Every layer's error at every format is measured (`strop.calibrate.sensitivity`, `ends`), the sum is made least within
the bytes (`strop.planner.allocation`), and what comes out is measured against the best uniform format of that size on
rows of their own: where uniform is better, it is taken. The receipt is then measured on rows that chose nothing.

The embedding, with a head that is tied to it, takes part where a size or a KL is asked for: files hold it in 8 bits or
in its dtype, so that an average of few bits could not count it. What stays in its dtype is named, with its share.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from strop.calibrate.ends import measure_ends
from strop.calibrate.quantizing import BlockWork
from strop.calibrate.sensitivity import measure_sensitivity
from strop.config.settings import size_in_bytes
from strop.errors import ConfigError, GateError, UsageError
from strop.files.folders import write_json
from strop.layers.base import linear_shape, weight_shape
from strop.layers.quant_embedding import Ends, find_ends
from strop.layers.surgery import linear_modules
from strop.methods import Method, search
from strop.numerics.scheme import Scheme
from strop.planner.allocation import allocate
from strop.progress import SILENT, Reporter
from strop.recipes.calibrated import DISK_BYTES, Bench, calibrate_model
from strop.scratch import Scratch

FORMATS: Final = ("int2-g32-full", "int3-g32-full", "int4-g32-full", "int6-g32", "int8-g32")
"""What layers may become where no formats are named."""

TRIALS: Final = 6
"""Sizes that are tried for a limit on the KL."""

Option = Scheme | None
"""A format; None for the model's own dtype, which the embedding and the head may keep."""

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
        kept: The embedding and the head, where they stay in their dtype, to what is to be known of it.
    """

    schemes: Mapping[str, Scheme]
    formats: Sequence[str]
    sensitivity: Mapping[str, Mapping[str, float]]
    nbytes: int
    weights: int
    verdict: str
    trials: Sequence[Mapping[str, Any]]
    kept: Mapping[str, str]

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
        kept = [f"{name}: {text}" for name, text in self.kept.items()]
        return [f"{self.bits:.3f} bits per weight over {len(self.schemes)} layers: {shown}", self.verdict, *kept]

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
                "kept": dict(self.kept),
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
    end_method: Method = search,
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
        end_method: As for `calibrate_model`.
        reporter: Told what happens.

    Raises:
        UsageError: the budget is below the least possible, or a layer can have none of the formats.
        GateError: no choice reaches the KL that was asked for.
    """
    choosing = bench.choosing()
    model, ends = bench.model.model, find_ends(bench.model.model)
    inside = {name: linear_shape(module) for name, module in linear_modules(model).items()}
    outside = _outside(ends, model, counts_embedding=budget.bits is None)
    shapes = inside | outside
    options: dict[str, list[Option]] = {layer: [s for s in formats.values() if fits(layer, s)] for layer in shapes}
    none = [layer for layer in inside if not options[layer]]
    if none:
        raise UsageError(
            f"budget: {len(none)} layer(s) can have none of {', '.join(formats)} ({', '.join(none[:3])}); name others "
            "with --formats"
        )
    with Scratch(DISK_BYTES) as scratch:
        stream = choosing.stream(scratch)
        measured_options = {name: [s for s in able if s is not None] for name, able in options.items()}
        errors = measure_sensitivity(stream, {name: measured_options[name] for name in inside}, reporter=reporter)
        errors |= measure_ends(stream, {name: measured_options[name] for name in outside})
    for name in outside:
        options[name].append(None)
        errors[name].append(0.0)
    dtype = bench.model.dtype

    def size(name: str, option: Option) -> int:
        return _bytes(option, shapes[name], dtype, twice=ends.tied and name == ends.embedding)

    def total(schemes: Mapping[str, Scheme]) -> int:
        return sum(size(name, schemes.get(name)) for name in shapes)

    sizes = {layer: [size(layer, option) for option in options[layer]] for layer in shapes}
    weights = sum(math.prod(shape) for shape in shapes.values())
    trials: list[dict[str, Any]] = []

    def within(limit: int) -> dict[str, Scheme]:
        chosen = allocate([errors[layer] for layer in shapes], [sizes[layer] for layer in shapes], limit)
        found = {layer: options[layer][option] for layer, option in zip(shapes, chosen, strict=True)}
        return {layer: scheme for layer, scheme in found.items() if scheme is not None}

    def measured(schemes: Mapping[str, Scheme], name: str) -> float:
        made = calibrate_model(
            choosing, schemes, work, plan=plan, folder=folder, end_method=end_method, reporter=reporter
        )
        made.results.remove()
        kl = made.held_out["kl"]
        trials.append({"name": name, "bits_per_weight": 8 * total(schemes) / weights, "kl": kl})
        return kl

    def made_of(schemes: Mapping[str, Scheme], verdict: str) -> Allocation:
        return Allocation(
            schemes,
            list(formats),
            {
                layer: {s.name: error for s, error in zip(measured_options[layer], errors[layer], strict=False)}
                for layer in shapes
            },
            total(schemes),
            weights,
            verdict,
            trials,
            _kept(ends, bench, schemes, fits, formats.values(), counted=budget.bits is None),
        )

    if budget.kl is not None:
        return _smallest(budget.kl, sizes, within, measured, made_of)
    limit = _limit(budget, bench, shapes, weights)
    least = sum(min(options) for options in sizes.values())
    if budget.total_bytes is not None and least > limit:
        raise UsageError(
            f"budget: {budget.total_bytes:,} bytes, and the smallest choice of formats needs "
            f"{least + budget.total_bytes - limit:,}, what is not quantized among them"
        )
    mixed = within(limit)
    uniform: list[tuple[int, str, dict[str, Scheme]]] = []
    for scheme in formats.values():
        if not all(scheme in options[layer] for layer in inside):
            continue
        for around in itertools.product(*(options[name] for name in outside)):
            chosen = {name: own for name, own in zip(outside, around, strict=True) if own is not None}
            schemes = dict.fromkeys(inside, scheme) | chosen
            named = "".join(f", {name} as {own}" for name, own in chosen.items() if own != scheme)
            uniform.append((total(schemes), f"{scheme} everywhere{named}", schemes))
    affordable = [each for each in sorted(uniform, key=lambda each: each[0]) if each[0] <= limit]
    if not affordable or any(mixed == schemes for _, _, schemes in uniform):
        return made_of(mixed, "no uniform format of that size is another choice")
    _, best_name, best = affordable[-1]
    ours, theirs = measured(mixed, "by sensitivity"), measured(best, best_name)
    said = f"KL {ours:.4g} nats per token on the choosing rows, {best_name} {theirs:.4g}"
    if theirs < ours:
        return made_of(best, f"uniform: the choice by sensitivity is worse ({said})")
    return made_of(mixed, f"by sensitivity: {said}")


def _outside(ends: Ends, model: nn.Module, *, counts_embedding: bool) -> dict[str, tuple[int, int]]:
    """Shapes of the embedding and of a head that is not tied to it, where they may be quantized."""
    names = [ends.embedding if counts_embedding else None, None if ends.tied else ends.head]
    return {name: weight_shape(model.get_submodule(name)) for name in names if name is not None}


def _kept(
    ends: Ends,
    bench: Bench,
    schemes: Mapping[str, Scheme],
    fits: Callable[[str, Scheme], bool],
    formats: Iterable[Scheme],
    *,
    counted: bool,
) -> dict[str, str]:
    """Why the embedding and the head stay in their dtype, where they do, and what share of the weights they are."""
    whole = sum(parameter.numel() for parameter in bench.model.model.parameters())
    dtype, formats = str(bench.model.dtype).removeprefix("torch."), list(formats)
    found: dict[str, str] = {}
    for name in (ends.embedding, None if ends.tied else ends.head):
        if name is None or name in schemes:
            continue
        share = math.prod(weight_shape(bench.model.model.get_submodule(name))) / whole
        if not any(fits(name, scheme) for scheme in formats):
            why = "none of the formats is one that files hold it in (an embedding: int8 or int8-g32)"
        elif name == ends.embedding and not counted:
            why = "an average of bits does not count it; a size (300MB) or a limit (kl<0.02) does"
        else:
            why = "other layers need the bytes less"
        tied = f", tied to {ends.head}," if ends.tied else ""
        found[name] = f"{share:.0%} of the weights{tied} stay in {dtype}: {why}"
    return found


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
        raise UsageError(f"budget: {budget.total_bytes:,} bytes, and what is not quantized takes {kept:,}")
    return budget.total_bytes - kept


def _bytes(option: Option, shape: tuple[int, int], dtype: torch.dtype, *, twice: bool) -> int:
    """What a weight takes; `twice` where its scales are written again for a tied head."""
    if option is None:
        return math.prod(shape) * dtype.itemsize
    again = math.prod(option.scale_shape(shape)) * option.scale_dtype.itemsize if twice else 0
    return round(option.bits_per_weight(shape) * math.prod(shape) / 8) + again
