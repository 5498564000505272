"""One self-contained HTML page from a comparison: what may be said on top, then what it rests on.

The page holds everything itself: no script, no font, no picture from elsewhere (a content security policy in it says
so). It follows the reader's light or dark setting and fits a telephone. All text that came from models or data is
escaped.

Input is the dictionary of `Comparison.to_dict()`, or the same read back from JSON; every figure shown is in it.
"""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from strop.evaluation.comparison import mebibytes, signed, significant
from strop.pages.atomic import write_whole
from strop.pages.charts import Point, heat, interval_track, mark, marked_difference, number, scatter, ticks
from strop.pages.rendering import render

_LOWEST_HEAT, _HIGHEST_HEAT = 1e-6, 1.0
_LOG_SPAN = 20  # a loss axis that spans more than this is drawn logarithmically
_BLOCK = re.compile(r"^(.*?)\.(\d+)\.(.*)$")

Model = Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """A part of the page that the comparison does not know of: a plan, a story, answers before and after.

    Attributes:
        heading: Its title.
        text: Paragraphs.
        headers: Columns of its table; empty for none.
        rows: Cells of the table.
        first: Stand above the comparison's own drawings, instead of below its table.
    """

    heading: str
    text: Sequence[str] = ()
    headers: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    first: bool = False


def write_page(
    comparison: Mapping[str, Any], path: str | os.PathLike[str], *, title: str, sections: Sequence[Section] = ()
) -> Path:
    """Write a comparison as one HTML file, whole or not at all.

    Args:
        comparison: What `Comparison.to_dict()` gives.
        path: The file; missing folders are made.
        title: The page's title.
        sections: Further parts.

    Returns:
        The path written.
    """
    return write_whole(path, [render_page(comparison, title=title, sections=sections)])


def render_page(comparison: Mapping[str, Any], *, title: str, sections: Sequence[Section] = ()) -> str:
    """The page's HTML text; see `write_page`."""
    models: Sequence[Model] = comparison["models"]
    reference = comparison["reference"]
    others = models[1:]
    return render(
        "page",
        title=title,
        mark=mark,
        headline=comparison["headline"],
        provenance=_provenance(comparison),
        verdicts=[
            {"kind": model["verdict"], "sentence": sentence}
            for model, sentence in zip(others, comparison["verdicts"], strict=True)
        ],
        sections=sections,
        reference=reference,
        quantity="score" if _answered(models) else "loss",
        legend=_legend(models, reference),
        scatters=_scatters(models),
        intervals=_intervals(comparison),
        headers=_headers(comparison),
        table=[_cells(model, comparison) for model in models],
        notes=comparison["notes"],
        flips=[_flips(model, reference) for model in others if model["flips"] and model["flips"]["examples"]],
        maps=[_map(model) for model in others if model["layer_errors"]],
        heat_key=[
            {"cell": heat(10.0**power, lowest=_LOWEST_HEAT, highest=_HIGHEST_HEAT), "label": label}
            for power, label in ((-6, "0.000001"), (-4, "0.0001"), (-2, "0.01"), (0, "1 (as large as the weights)"))
        ],
        methods=_methods(comparison),
    )


def _provenance(comparison: Mapping[str, Any]) -> str:
    task = f", {comparison['task'].replace('-', ' ')}" if comparison["task"] else ""
    return (
        f"{len(comparison['models'])} models on the same {comparison['rows']:,} rows of {_data_name(comparison)} "
        f"({comparison['supervised_tokens']:,} tokens scored{task}). Intervals hold the truth "
        f"{100 * comparison['level']:.0f} times in a hundred."
    )


def _answered(models: Sequence[Model]) -> bool:
    """Whether there is a task and any model answers a row of it."""
    return any(model["score"] and model["score"]["estimate"] for model in models)


def _data_name(comparison: Mapping[str, Any]) -> str:
    """A file's name without the folders that lead to it on somebody's machine; a hub id whole."""
    path = Path(comparison["data"])
    return path.name if path.suffix or path.is_absolute() else str(comparison["data"])


def _kind(model: Model) -> str:
    return model["verdict"] or "reference"


def _legend(models: Sequence[Model], reference: str) -> list[tuple[str, str]]:
    meanings = {
        "reference": f"{reference}, the reference",
        "better": "better than the reference",
        "undecided": "undecided: the interval of the difference holds zero",
        "worse": "worse than the reference",
    }
    present = {_kind(model) for model in models}
    return [(kind, meaning) for kind, meaning in meanings.items() if kind in present]


# --- drawings ---------------------------------------------------------------------------------------------------------


def _scatters(models: Sequence[Model]) -> list[dict[str, Any]]:
    x_label = "weights on disk, MiB"
    charts = []
    if _answered(models):
        points = _points(models, lambda model: model["score"], scale=100.0)
        charts.append(
            _chart(points, x_label, "rows answered exactly, %", "Higher and further left is better.", top=100.0)
        )
    losses = _points(models, lambda model: model["loss"])
    values = [value for point in losses for value in (point.y, point.low, point.high) if value is not None]
    log = min(values) > 0 and max(values) / min(values) > _LOG_SPAN
    label = "loss, nats per token" + (" (logarithmic)" if log else "")
    charts.append(_chart(losses, x_label, label, "Lower and further left is better.", log_y=log))
    return charts


def _points(
    models: Sequence[Model], interval: Callable[[Model], Mapping[str, Any]], *, scale: float = 1.0
) -> list[Point]:
    points = []
    for model in models:
        found = interval(model)
        low, high = (None if found[end] is None else scale * found[end] for end in ("low", "high"))
        size = model["weights_bytes"] / (1 << 20)
        points.append(Point(model["name"], size, scale * found["estimate"], low, high, _kind(model)))
    return points


def _chart(points: Sequence[Point], x_label: str, y_label: str, advice: str, **axis: Any) -> dict[str, Any]:
    return {
        "wide": scatter(points, width=960, height=400, x_label=x_label, y_label=y_label, **axis),
        "narrow": scatter(points, width=360, height=400, x_label=x_label, y_label=y_label, **axis),
        "caption": f"{advice} Bars are the intervals; where none shows, it is smaller than its mark.",
    }


def _intervals(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    models, task, reference = comparison["models"], comparison["task"], comparison["reference"]
    blocks = []
    if task:
        rows = [
            {
                "name": model["name"],
                "track": _track(model["score"], _kind(model), start=0.0, end=1.0),
                "figures": _share_words(model["score"]),
            }
            for model in models
        ]
        blocks.append(
            {
                "heading": "Score of each model",
                "rows": rows,
                "ticks": ["0%", "25%", "50%", "75%", "100%"],
                "caption": "Share of rows answered exactly, to the last token and the stop, with Wilson's interval.",
            }
        )
    by_score = any(model["judged_by"] == "score" for model in models)
    key = "score_difference" if by_score else "loss_difference"
    differences = [model for model in models if model[key]]
    if differences:
        scale, unit = (100.0, "points") if by_score else (1.0, "nats per token")
        found = [model[key] for model in differences]
        ends = [
            scale * value for one in found for value in (one["estimate"], one["low"], one["high"]) if value is not None
        ]
        low, high = min(0.0, *ends), max(0.0, *ends)
        span = (high - low) or 1.0
        low, high = low - 0.03 * span, high + 0.03 * span
        rows = []
        for model, one in zip(differences, found, strict=True):
            values = {end: None if one[end] is None else scale * one[end] for end in ("estimate", "low", "high")}
            words = _difference_words(values, points=by_score)
            rows.append(
                {
                    "name": model["name"],
                    "track": _track(values, _kind(model), start=low, end=high, zero=0.0),
                    "figures": words,
                }
            )
        shown = [tick for tick in ticks(low, high) if low <= tick <= high]
        better = "to the right is better" if by_score else "to the left is better"
        blocks.append(
            {
                "heading": f"Difference from {reference}",
                "rows": rows,
                "scale": [{"at": 100 * (tick - low) / (high - low), "label": number(tick)} for tick in shown],
                "caption": f"{unit.capitalize()}, paired by row; {better}. An interval that reaches the line at zero "
                "decides nothing.",
            }
        )
    return [{"ticks": [], "scale": [], **block} for block in blocks]


def _track(found: Mapping[str, Any], kind: str, *, start: float, end: float, zero: float | None = None) -> Markup:
    return interval_track(found["estimate"], found["low"], found["high"], kind, start=start, end=end, zero=zero)


def _share_words(found: Mapping[str, Any]) -> str:
    words = f"{100 * found['estimate']:.1f}%"
    return words if found["low"] is None else f"{words} ({100 * found['low']:.1f} to {100 * found['high']:.1f})"


def _difference_words(values: Mapping[str, Any], *, points: bool) -> str:
    def one(value: float) -> str:
        return f"{value:+.1f}" if points else signed(value)

    if values["low"] is None:
        return f"{one(values['estimate'])} (too few rows for an interval)"
    return f"{one(values['estimate'])} ({one(values['low'])} to {one(values['high'])})"


# --- tables -----------------------------------------------------------------------------------------------------------


def _headers(comparison: Mapping[str, Any]) -> list[str]:
    headers = ["model", "verdict", "format", "weights, MiB", "of the reference", "peak memory, MiB"]
    if _has_speed(comparison):
        headers += ["prefill, tokens/s", "decode, tokens/s"]
    headers += ["loss, nats/token", "perplexity", "KL mean, nats", "KL 99%, nats", "top-1 agreement, %"]
    if comparison["task"]:
        headers += ["exact match, %", "difference, points", "McNemar p", "won / lost rows"]
    return [*headers, "loss difference, nats", "rows that would decide"]


def _has_speed(comparison: Mapping[str, Any]) -> bool:
    return any(model["speed"] for model in comparison["models"])


def _cells(model: Model, comparison: Mapping[str, Any]) -> list[Any]:
    size = comparison["models"][0]["weights_bytes"]
    cells: list[Any] = [
        model["name"],
        Markup('<span class="chip {0}">{0}</span>').format(_kind(model)),
        model["format"],
        mebibytes(model["weights_bytes"]),
        f"{100 * model['weights_bytes'] / size:.0f}%",
        mebibytes(model["peak_bytes"]),
    ]
    if _has_speed(comparison):
        cells += [_rate(model["speed"] and model["speed"][part]) for part in ("prefill", "decode")]
    cells += [_interval_cell(model["loss"]), _interval_cell(model["perplexity"])]
    cells += [_interval_cell(model["kl"], 3), significant(model["kl_99th"], 3)]
    cells.append(_interval_cell(model["top1_agreement"], scale=100.0))
    if comparison["task"]:
        difference, flips = model["score_difference"], model["flips"]
        cells.append(_interval_cell(model["score"], scale=100.0))
        cells.append(_difference_cell(difference and _scaled(difference, 100.0), points=True))
        cells.append("-" if not difference else significant(difference["p_value"], 2))
        cells.append("-" if not flips else f"{flips['gained']:,} / {flips['lost']:,}")
    loss = model["loss_difference"]
    cells.append(_difference_cell(loss, points=False))
    judged = model["score_difference" if model["judged_by"] == "score" else "loss_difference"]
    needed = judged and judged["rows_needed"]
    cells.append("-" if needed is None else f"{needed:,}")
    return cells


def _scaled(found: Mapping[str, Any], scale: float) -> dict[str, float | None]:
    return {end: None if found[end] is None else scale * found[end] for end in ("estimate", "low", "high")}


def _interval_cell(found: Mapping[str, Any] | None, digits: int = 4, *, scale: float | None = None) -> str:
    if not found:
        return "-"
    values = found if scale is None else _scaled(found, scale)

    def one(value: float | None) -> str:
        return significant(value, digits) if scale is None or value is None else f"{value:.1f}"

    if values["low"] is None or values["high"] is None:
        return one(values["estimate"])
    return _two_lines(one(values["estimate"]), f"{one(values['low'])} to {one(values['high'])}")


def _rate(rate: Mapping[str, Any] | None) -> str:
    return (
        "-" if not rate else _two_lines(f"{rate['median']:,.0f}", f"{rate['slowest']:,.0f} to {rate['fastest']:,.0f}")
    )


def _two_lines(value: str, spread: str) -> Markup:
    """A figure with its spread below, so that columns stay narrow."""
    return Markup("{}<small>{}</small>").format(value, spread)


def _difference_cell(values: Mapping[str, Any] | None, *, points: bool) -> str:
    if not values:
        return "-"
    value, _, spread = _difference_words(values, points=points).partition(" (")
    return _two_lines(value, spread.rstrip(")"))


# --- answers and layers -----------------------------------------------------------------------------------------------


def _flips(model: Model, reference: str) -> dict[str, Any]:
    flips = model["flips"]
    examples = []
    for flip in flips["examples"]:
        expected = flip["expected"]
        sides = [
            {"name": reference, "right": flip["kind"] == "lost", "answer": flip["reference_answer"]},
            {"name": model["name"], "right": flip["kind"] == "gained", "answer": flip["model_answer"]},
        ]
        for side in sides:
            if not side["right"]:
                side["answer"] = marked_difference(side["answer"], expected) or Markup("<em>(nothing)</em>")
        examples.append({"row": flip["row"], "prompt": flip["prompt"], "expected": expected, "sides": sides})
    shown = f"; {len(examples)} shown" if len(examples) < flips["lost"] + flips["gained"] else ""
    summary = f"{flips['gained']:,} rows won, {flips['lost']:,} lost{shown}"
    return {"name": model["name"], "summary": summary, "examples": examples}


def _map(model: Model) -> dict[str, Any]:
    """Cells by kind of layer (rows) and block (columns), and a sentence with the figures."""
    errors: Mapping[str, float] = model["layer_errors"]
    blocks, kinds = set(), {}
    cells: dict[tuple[str, int], float] = {}
    for name, error in errors.items():
        found = _BLOCK.match(name)
        block, kind = (int(found[2]), found[3]) if found else (0, name)
        short = kind.rpartition(".")[2]
        # Two layers of one block may end alike: then both keep their whole names.
        if kinds.setdefault(short, kind) != kind:
            short = kind
            kinds[short] = kind
        blocks.add(block)
        cells[short, block] = error
    columns = sorted(blocks)
    rows = [
        {
            "kind": short,
            "cells": [
                heat(cells.get((short, block), 0.0), lowest=_LOWEST_HEAT, highest=_HIGHEST_HEAT) for block in columns
            ],
        }
        for short in kinds
    ]
    worst = max(errors, key=lambda name: errors[name])
    if errors[worst] == 0:
        summary = "No weight differs."
    else:
        middle = statistics.median(errors.values())
        summary = f"median {significant(middle, 2)}; largest {significant(errors[worst], 2)} in {worst}"
    return {"name": model["name"], "rows": rows, "columns": len(columns), "summary": summary}


def _methods(comparison: Mapping[str, Any]) -> list[str]:
    level = f"{100 * comparison['level']:.0f}%"
    lines = [
        f"Rows: {comparison['rows']:,} of {_data_name(comparison)}, the same for every model "
        f"(SHA-256 of their tokens {comparison['rows_sha256'][:16]}…, seed {comparison['seed']}).",
        "Loss: negative log-likelihood per supervised token, in nats; perplexity is its exponential. Intervals "
        f"({level}): studentised bootstrap by row, paired for differences.",
        f"KL divergence from {comparison['reference']} per supervised token, mean and 99th percentile over tokens; "
        "top-1 agreement is the share of tokens on which both find the same one likeliest.",
        "Weights: the files a model needs on disk; an adapter's include its base's. Peak memory: anonymous and shared "
        "memory while the model was opened and scored, above what the process held before (on Linux with freed blocks "
        "given back at once).",
    ]
    if comparison["task"]:
        lines.append(
            "Exact match: every token of the answer and its stop, as greedy decoding writes them. Differences: exact "
            "McNemar test and Newcombe's interval on the same rows."
        )
    if _has_speed(comparison):
        lines.append(
            "Speed: one sequence through transformers, median of repeated runs with the slowest and the fastest, on "
            "this machine as it was loaded then."
        )
    lines.append(
        "A difference is called better or worse only where its interval excludes zero; each comparison stands for "
        "itself, uncorrected for their number. Rows that would decide: where a difference of the size measured would "
        "be found four times in five."
    )
    return lines
