"""The page of a run in stages: what each stage gained on its own held-out rows, and what it forgot on earlier ones.

Self-contained like the comparison's page (`page.py`), in its style: no script, no request, light and dark, wide and
narrow. Input is what stands in stages.json; every figure shown is in it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from strop.pages.atomic import write_whole
from strop.pages.charts import interval_track, mark, number, shortened, ticks
from strop.pages.rendering import render

_KINDS = {"gained": "better", "forgot": "worse", "undecided": "undecided"}
_SHAPES = ("circle", "square", "diamond", "cross")


def write_stages_page(report: Mapping[str, Any], path: str | os.PathLike[str], *, title: str) -> Path:
    """Write the account of a run in stages as one HTML file, whole or not at all.

    Args:
        report: what stands in stages.json, with two measured models at least.
        path: the file.
        title: the page's title.
    """
    return write_whole(path, [render_stages_page(report, title=title)])


def render_stages_page(report: Mapping[str, Any], *, title: str) -> str:
    """The page's HTML text; see `write_stages_page`."""
    names = set_labels(report)
    effects, matrix = report["effects"], report["matrix"]
    return render(
        "stages",
        title=title,
        headline=_headline(effects, report["overall"]),
        rows=[f"{entry['rows']:,} of {entry['label']}" for entry in _sets(report)],
        level=100 * effects[0]["difference"]["level"],
        legend=[(mark(0, 0, kind), word) for word, kind in _LEGEND],
        stages=_stages(report),
        overall=_tracks(report["overall"], _labels(report)),
        charts={"wide": _lines(matrix, names, width=960), "narrow": _lines(matrix, names, width=360)},
        names=names,
        table=[_cells(number, model) for number, model in enumerate(matrix)],
        notes=report["notes"],
        unfinished=not report["finished"],
    )


_LEGEND = (
    ("gained: the loss fell, and the interval leaves zero out", "better"),
    ("undecided: the interval holds zero", "undecided"),
    ("forgot: the loss rose, and the interval leaves zero out", "worse"),
)


def _sets(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The held-out sets; stages that hold out the very same rows share one."""
    return [entry for entry in report["held_out"] if not entry["same_as"]]


def set_labels(report: Mapping[str, Any]) -> list[str]:
    """What each held-out set is called: the stages whose rows it holds."""
    return [entry["label"] for entry in _sets(report)]


def _labels(report: Mapping[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["label"] for entry in _sets(report)}


def _headline(effects: Sequence[Mapping[str, Any]], overall: Sequence[Mapping[str, Any]]) -> str:
    own = [effect for effect in effects if effect["own"]]
    others = [effect for effect in effects if not effect["own"]]
    gained = sum(effect["word"] == "gained" for effect in own)
    parts = [f"{gained} of {len(own)} stages gained on their own rows"]
    if others:
        forgot = [effect for effect in others if effect["word"] == "forgot"]
        if forgot:
            worst = max(forgot, key=lambda effect: effect["difference"]["estimate"])
            parts.append(
                f"{len(forgot)} of {len(others)} times a stage forgot something of an earlier one, the most "
                f"{worst['difference']['estimate']:.3g} nats per token ({worst['stage']} on {worst['set']})"
            )
        else:
            parts.append("no stage is shown to have forgotten anything of an earlier one")
    kept = sum(effect["word"] == "gained" for effect in overall)
    return "; ".join(parts) + f". At the end {kept} of {len(overall)} sets are better than with the base."


def _stages(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for stage in report["stages"]:
        effects = [effect for effect in report["effects"] if effect["stage"] == stage["name"]]
        if not effects:
            continue
        result = stage["result"]
        what = f" in {stage['format']}" if stage["format"] else ""
        found.append(
            {
                "heading": f"{stage['number']}. {stage['name']}",
                "start": f"{stage['start']}{what}: {result['steps']:,} steps, {result['tokens']:,} tokens, "
                f"{stage['parameters']['trained']:,} parameters trained.",
                "tracks": _tracks(effects, _labels(report)),
            }
        )
    return found


def _tracks(effects: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> dict[str, Any]:
    """Rows of intervals on one scale around zero; to the left the loss fell."""
    ends = [
        abs(value)
        for effect in effects
        for value in (effect["difference"][key] for key in ("estimate", "low", "high"))
        if value is not None
    ]
    reach = max(ends, default=0.0) * 1.1 or 1.0
    rows = [
        {
            "name": labels[effect["set"]] + (" (its own)" if effect["own"] else ""),
            "kind": _KINDS[effect["word"]],
            "word": effect["word"],
            "figures": _figures(effect["difference"]),
            "track": interval_track(
                effect["difference"]["estimate"],
                effect["difference"]["low"],
                effect["difference"]["high"],
                _KINDS[effect["word"]],
                start=-reach,
                end=reach,
                zero=0.0,
            ),
        }
        for effect in effects
    ]
    return {"rows": rows, "left": f"{-reach:+.2g}", "right": f"{reach:+.2g}"}


def _figures(difference: Mapping[str, Any]) -> str:
    if difference["low"] is None:
        return f"{difference['estimate']:+.4f} ({difference['rows']} rows: too few)"
    return f"{difference['estimate']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]"


def _cells(number: int, model: Mapping[str, Any]) -> dict[str, Any]:
    cells = []
    for loss in model["loss"]:
        spread = "" if loss["low"] is None else f"{loss['low']:.4f} to {loss['high']:.4f}"
        cells.append({"value": f"{loss['estimate']:.4f}", "spread": spread})
    return {"name": f"after {model['model']}" if number else f"{model['model']} (before any stage)", "cells": cells}


# --- the drawing ------------------------------------------------------------------------------------------------------


def _lines(matrix: Sequence[Mapping[str, Any]], names: Sequence[str], *, width: int) -> Markup:
    """Loss on every held-out set (a line each, named at its end) over the models: base, then after each stage."""
    height, left, top, bottom = 340, 52.0, 14.0, 46.0
    right = 24 + 7.0 * max(len(shortened(name)) for name in names)
    values = [
        value
        for model in matrix
        for loss in model["loss"]
        for value in (loss["estimate"], loss["low"], loss["high"])
        if value is not None
    ]
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or 0.1
    low, high = max(0.0, low - pad), high + pad
    across, down = width - left - right, height - top - bottom

    def at_x(index: int) -> float:
        return left + across * (index + 0.5) / len(matrix)

    def at_y(value: float) -> float:
        return top + down * (1 - (value - low) / (high - low))

    parts = []
    for tick in ticks(low, high):
        parts.append(
            Markup(
                '<line class="grid" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text class="tick" text-anchor="end" x="{:.1f}" y="{:.1f}">{}</text>'
            ).format(left, left + across, at_y(tick), at_y(tick), left - 6, at_y(tick) + 4, number(tick))
        )
    for index, model in enumerate(matrix):
        room = max(3, int(across / len(matrix) / 7))
        name = model["model"] if len(model["model"]) <= room else model["model"][: room - 1] + "…"
        parts.append(
            Markup('<text class="tick" text-anchor="middle" x="{:.1f}" y="{:.1f}">{}</text>').format(
                at_x(index), top + down + 18, name
            )
        )
    parts.append(
        Markup(
            '<text class="name" text-anchor="middle" x="{:.1f}" y="{}">model: the base, then after each stage</text>'
            '<text class="name" text-anchor="middle" transform="translate(13 {:.1f}) rotate(-90)">nats per token</text>'
        ).format(left + across / 2, height - 6, top + down / 2)
    )
    label_heights = _apart([at_y(matrix[-1]["loss"][place]["estimate"]) for place in range(len(names))], 15.0)
    for place, name in enumerate(names):
        losses = [model["loss"][place] for model in matrix]
        points = " ".join(f"{at_x(index):.1f},{at_y(loss['estimate']):.1f}" for index, loss in enumerate(losses))
        parts.append(Markup('<polyline class="run s{}" points="{}"/>').format(place % 4, points))
        for index, loss in enumerate(losses):
            x, y = at_x(index), at_y(loss["estimate"])
            if loss["low"] is not None:
                parts.append(
                    Markup('<path class="bar s{}" d="M{:.1f} {:.1f}V{:.1f}"/>').format(
                        place % 4, x, at_y(loss["low"]), at_y(loss["high"])
                    )
                )
            title = f"{name}, {matrix[index]['model']}: {loss['estimate']:.4f}"
            parts.append(_shape(_SHAPES[place % 4], x, y, f"spot s{place % 4}", title))
        parts.append(
            Markup('<text class="label" x="{:.1f}" y="{:.1f}">{}</text>').format(
                at_x(len(matrix) - 1) + 12, label_heights[place] + 4, shortened(name)
            )
        )
    description = "nats per token on the held-out rows of " + ", ".join(names)
    return Markup('<svg viewBox="0 0 {} {}" width="{}" height="{}" role="img" aria-label="{}">{}</svg>').format(
        width, height, width, height, description, Markup("").join(parts)
    )


def _apart(heights: Sequence[float], least: float) -> list[float]:
    """Heights moved down as little as needed so that labels do not cover each other."""
    placed = list(heights)
    order = sorted(range(len(placed)), key=lambda index: placed[index])
    for above, below in itertools.pairwise(order):
        placed[below] = max(placed[below], placed[above] + least)
    return placed


def _shape(kind: str, x: float, y: float, css: str, title: str) -> Markup:
    paths = {
        "circle": f"M{x - 5:.1f} {y:.1f}a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
        "square": f"M{x - 4.5:.1f} {y - 4.5:.1f}h9v9h-9z",
        "cross": f"M{x - 2:.1f} {y - 6:.1f}h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
        "diamond": f"M{x:.1f} {y - 6.5:.1f}l6.5 6.5l-6.5 6.5l-6.5 -6.5z",
    }
    return Markup('<path class="{}" d="{}"><title>{}</title></path>').format(css, paths[kind], title)
