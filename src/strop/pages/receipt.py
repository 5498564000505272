"""The page of a receipt: what quantizing a model cost, the verdict on top, then the blocks, the layers, and the rows.

Self-contained like the comparison's page (`page.py`), in its style: no script, no request, light and dark, wide and
narrow; all text from models and data is escaped. Input is what stands in receipt.json; every figure shown is in it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from markupsafe import Markup

from strop.evaluation.comparison import mebibytes, significant
from strop.pages.atomic import write_whole
from strop.pages.charts import mark, number
from strop.pages.rendering import render

RECEIPT_PAGE: Final = "receipt.html"

MOST_LAYERS: Final = 400
"""Rows of the table of layers; where there are more (experts), those of the largest error are shown."""

MOST_NAMES: Final = 8
"""Layers that a row of the fallbacks names."""

Values = Mapping[str, Any]


def write_receipt_page(receipt: Values, path: str | os.PathLike[str]) -> Path:
    """Write a receipt as one HTML file, whole or not at all.

    Args:
        receipt: what stands in receipt.json.
        path: the file.
    """
    return write_whole(path, [render_receipt_page(receipt)])


def render_receipt_page(receipt: Values) -> str:
    """The page's HTML text; see `write_receipt_page`."""
    layers = _shown(receipt["tensors"])
    measured = [block for block in receipt["blocks"] if block["calibration_error"] or block["held_out_error"]]
    return render(
        "receipt",
        title=f"{_name(receipt['source'])} as {receipt['requested']}, by {receipt['settings']['method']}",
        mark=mark,
        headline=_headline(receipt),
        verdicts=_verdicts(receipt),
        figures=_figures(receipt["held_out"]),
        charts=measured and {name: _block_chart(measured, width) for name, width in (("wide", 960), ("narrow", 360))},
        layers=[_layer(layer, max(one["relative_error"] for one in layers)) for layer in layers],
        left_out=len(receipt["tensors"]) - len(layers),
        fallbacks=_fallbacks(receipt),
        left_alone=receipt["left_alone"],
        notes=[note for block in receipt["blocks"] for note in block["notes"]],
        rows=_rows(receipt),
        made=_made(receipt),
        level=f"{100 * receipt['held_out'].get('level', 0.95):.0f}%",
    )


# --- words ------------------------------------------------------------------------------------------------------------


def _name(source: str) -> str:
    """A folder's own name, without the folders that lead to it on somebody's machine; a hub id whole."""
    path = Path(source)
    return path.name if path.is_absolute() or len(path.parts) > 2 else source


def _headline(receipt: Values) -> str:
    held, gate = receipt["held_out"], receipt["gate"]
    if not held:
        return "What rounding cost was not measured: no held-out rows (give some with --data)."
    said = (
        f"on {held['rows']:,} held-out rows the model is {significant(held['kl'], 3)} nats per token from its source"
        f"{_interval(held['kl_interval'])} and chooses the same token {_percent(held['top1_agreement'])} of the time"
        f"{_interval(held['top1_agreement_interval'], percent=True)}."
    )
    return f"The gate is passed: {said}" if gate else f"No gate was asked; {said}"


def _verdicts(receipt: Values) -> list[tuple[str, str]]:
    """(kind of mark, sentence)."""
    found: list[tuple[str, str]] = []
    held, gate = receipt["held_out"], receipt["gate"]
    if gate:
        for key, limit, word, worse_end in (
            ("kl", gate["max_kl"], "KL at most", 1),
            ("top1_agreement", gate["min_agreement"], "agreement at least", 0),
        ):
            if limit is None:
                continue
            end = held[f"{key}_interval"][worse_end]
            settled = end is not None and (end <= limit if worse_end else end >= limit)
            sentence = f"Gate: {word} {limit:g}, measured {significant(held[key], 4)}"
            if end is None:
                sentence += "; the rows are too few for an interval"
            elif not settled:
                sentence += f"; the interval reaches past it, to {significant(end)}: more rows could decide otherwise"
            found.append(("better" if settled else "undecided", f"{sentence}."))
        if gate["repairs"]:
            times = "once" if gate["repairs"] == 1 else f"{gate['repairs']} times"
            found.append(("undecided", f"Repaired {times}: the layers to blame have more bits than were asked for."))
    size = f"{receipt['bits_per_weight']:.3f} bits per weight over {receipt['layers']:,} linear layers"
    if receipt["weights_bytes"] is not None:
        size += f"; the weight files take {mebibytes(receipt['weights_bytes'])} MiB"
        if receipt["source_weights_bytes"]:
            share = receipt["weights_bytes"] / receipt["source_weights_bytes"]
            size += f", {share:.0%} of the source's {mebibytes(receipt['source_weights_bytes'])}"
    found.append(("reference", f"{size}."))
    if receipt["rounded_share"] is not None:
        found.append(
            ("reference", f"{receipt['rounded_share']:.1%} of {receipt['parameters']:,} parameters are rounded.")
        )
    if receipt["fallbacks"]:
        count = len(receipt["fallbacks"])
        words = f"{count} layer{'s' if count > 1 else ''} did not get the format"
        found.append(("worse", f"{words}: {receipt['fallback_share']:.1%} of the linear layers' parameters."))
    if receipt["left_alone"]:
        found.append(("worse", f"{len(receipt['left_alone'])} tensors of experts are not rounded."))
    clipped = max(receipt["tensors"], key=lambda tensor: tensor["saturation"])
    if clipped["saturation"] > 0:
        found.append(("reference", f"Most clipped: {clipped['name']}, {_share(clipped['saturation'])} of its weights."))
    return found


def _figures(held: Values) -> list[tuple[str, str, str, str]]:
    """Name, value, interval, what it means."""
    if not held:
        return []
    whole = f"over {held['tokens']:,} tokens of {held['rows_compared']:,} rows"
    return [
        (
            "KL divergence, nats per token",
            significant(held["kl"]),
            _ends(held["kl_interval"]),
            f"how far the predictions are from the source's, {whole}; 0 is the same",
        ),
        ("its 99th percentile", significant(held["kl_99th"]), "-", "99 of 100 tokens stay at or below it"),
        (
            "top-1 agreement",
            _percent(held["top1_agreement"]),
            _ends(held["top1_agreement_interval"], percent=True),
            "tokens on which both find the same one likeliest",
        ),
        (
            "perplexity",
            significant(held["perplexity"]),
            _ends(held["perplexity_interval"]),
            "of the rounded model on the held-out text",
        ),
        (
            "perplexity of the source",
            significant(held["source_perplexity"]),
            _ends(held["source_perplexity_interval"]),
            "the same text, before rounding",
        ),
    ]


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _share(value: float) -> str:
    """A share in percent; one that would round to nothing keeps its digits."""
    return "0" if value == 0 else f"{100 * value:.2f}%" if value >= 5e-5 else f"{100 * value:.1e}%"


def _ends(interval: Sequence[float | None], *, percent: bool = False) -> str:
    low, high = interval
    if low is None or high is None:
        return "too few rows"
    return f"{_percent(low)} to {_percent(high)}" if percent else f"{significant(low, 3)} to {significant(high, 3)}"


def _interval(interval: Sequence[float | None], *, percent: bool = False) -> str:
    return "" if None in interval else f" ({_ends(interval, percent=percent)})"


def _rows(receipt: Values) -> list[str]:
    calibration = receipt["settings"].get("calibration")
    if not calibration:
        return ["Nothing calibrated: each weight was rounded by itself."]
    data = _name(calibration["data"])
    lines: list[str] = []
    if calibration["built_in"]:
        lines.append(
            "Built-in paragraphs calibrated, since no data were given: rows of the kind that the model will see "
            "calibrate better (--data)."
        )
    else:
        lines.append(f"Rows of {data} calibrated.")
    lines.append(
        f"{calibration['rows']:,} rows with {calibration['tokens']:,} tokens calibrated, "
        f"{calibration['held_out_rows']:,} others were held out and chose nothing (SHA-256 of all token ids "
        f"{calibration['sha256'][:16]}…)."
    )
    return lines


def _made(receipt: Values) -> list[str]:
    made, settings = receipt["made_by"], receipt["settings"]
    observer = f", observer {settings['observer']}" if settings.get("observer") else ""
    lines = [f"Method {settings['method']}{observer}, format {receipt['requested']}."]
    if made:
        lines.append(
            f"strop {made['strop']}, torch {made['torch']}, transformers {made['transformers']}, Python "
            f"{made['python']}; seed {made['seed']}."
        )
        lines.append(
            f"It took {made['seconds']:,.1f} seconds and at most {mebibytes(made['peak_bytes'])} MiB of memory "
            "(anonymous and shared, above what was held before)."
        )
    return lines


# --- layers -----------------------------------------------------------------------------------------------------------


def _shown(tensors: Sequence[Values]) -> list[Values]:
    if len(tensors) <= MOST_LAYERS:
        return list(tensors)
    worst = sorted(range(len(tensors)), key=lambda place: -tensors[place]["relative_error"])[:MOST_LAYERS]
    return [tensors[place] for place in sorted(worst)]


def _layer(tensor: Values, largest: float) -> dict[str, Any]:
    error = tensor["relative_error"]
    return {
        "name": tensor["name"],
        "shape": " × ".join(f"{size:,}" for size in tensor["shape"]),
        "requested": tensor["requested"],
        "actual": tensor["actual"],
        "changed": tensor["requested"] != tensor["actual"],
        "bar": f"{100 * error / largest:.1f}" if largest else "0",
        "error": significant(error, 3) if tensor["reason"] is None else "kept",
        "largest": significant(tensor["max_error"], 3) if tensor["reason"] is None else "-",
        "saturation": _share(tensor["saturation"]) if tensor["reason"] is None else "-",
        "bytes": f"{tensor['nbytes']:,}",
    }


def _fallbacks(receipt: Values) -> list[tuple[str, str, str, str]]:
    """Names, what was asked for and what they have, share of the parameters, why; those alike in one row."""
    whole = sum(math.prod(tensor["shape"]) for tensor in receipt["tensors"])
    alike: dict[tuple[str, str], list[Values]] = {}
    for tensor in receipt["tensors"]:
        if tensor["reason"] is not None:
            alike.setdefault((f"{tensor['requested']} → {tensor['actual']}", tensor["reason"]), []).append(tensor)
    found: list[tuple[str, str, str, str]] = []
    for (change, reason), tensors in alike.items():
        names = ", ".join(tensor["name"] for tensor in tensors[:MOST_NAMES])
        if len(tensors) > MOST_NAMES:
            names += f" and {len(tensors) - MOST_NAMES:,} more"
        found.append((names, change, _share(sum(math.prod(tensor["shape"]) for tensor in tensors) / whole), reason))
    return found


# --- drawing ----------------------------------------------------------------------------------------------------------


def _block_chart(blocks: Sequence[Values], width: int) -> Markup:
    """Relative squared error of each block's output, logarithmic, on both kinds of rows."""
    height, left, right, top, bottom = 280, 58.0, 16.0, 14.0, 44.0
    across, down = width - left - right, height - top - bottom
    values = [v for block in blocks for v in (block["calibration_error"], block["held_out_error"]) if v]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)

    def at_x(place: int) -> float:
        return left + across * (place + 0.5) / len(blocks)

    def at_y(value: float) -> float:
        return top + down * (1 - (math.log10(value) - low) / (high - low))

    parts: list[Markup] = []
    steps = (1, 2, 5) if high - low <= 2 else (1,)
    for tick in [10.0**power * step for power in range(low, high) for step in steps] + [10.0**high]:
        parts.append(
            Markup(
                '<line class="grid" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text class="tick" text-anchor="end" x="{:.1f}" y="{:.1f}">{}</text>'
            ).format(left, left + across, at_y(tick), at_y(tick), left - 6, at_y(tick) + 4, number(tick))
        )
    every = max(1, math.ceil(len(blocks) * 26 / across))
    for place in range(0, len(blocks), every):
        parts.append(
            Markup('<text class="tick" text-anchor="middle" x="{:.1f}" y="{:.1f}">{}</text>').format(
                at_x(place), top + down + 18, place
            )
        )
    for key, kind, word in (
        ("calibration_error", "reference", "calibrating rows"),
        ("held_out_error", "undecided", "held-out rows"),
    ):
        known = [(place, block) for place, block in enumerate(blocks) if block[key]]
        points = " ".join(f"{at_x(place):.1f},{at_y(block[key]):.1f}" for place, block in known)
        parts.append(Markup('<polyline class="run {}" points="{}"/>').format(kind, points))
        parts += [
            mark(at_x(place), at_y(block[key]), kind, title=f"{block['name']}, {word}: {significant(block[key], 3)}")
            for place, block in known
        ]
    parts.append(
        Markup(
            '<text class="name" text-anchor="middle" x="{:.1f}" y="{}">block</text>'
            '<text class="name" text-anchor="middle" transform="translate(13 {:.1f}) rotate(-90)">'
            "relative squared error</text>"
        ).format(left + across / 2, height - 6, top + down / 2)
    )
    worst = max(blocks, key=lambda block: block["held_out_error"] or block["calibration_error"])
    description = f"error of the output of {len(blocks)} blocks, the largest in {worst['name']}"
    return Markup('<svg viewBox="0 0 {} {}" width="{}" height="{}" role="img" aria-label="{}">{}</svg>').format(
        width, height, width, height, description, Markup("").join(parts)
    )
