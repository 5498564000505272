"""What a choice of bits by layer looks like: each layer's bits, and what each format does to its block's output."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from strop.recipes.rank_picture import save_figure

if TYPE_CHECKING:
    from strop.recipes.budget import Allocation

_INK: Final = "#1f2933"
_COLOURS: Final = ("#a3325b", "#b3541e", "#8a6d00", "#1a7f37", "#3b6ea5", "#7a4fa3", "#0f7b7b", "#555555")


def draw(allocation: Allocation, path: Path) -> None:
    """Draw the choice and put the file in place once it is whole."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}
    layers = list(allocation.schemes)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(max(8.0, 0.16 * len(layers)), 6), layout="constrained")
        FigureCanvasAgg(figure)
        above, below = figure.subplots(2, 1, sharex=True)
        figure.suptitle(f"{allocation.bits:.2f} bits per weight over {len(layers)} layers", color=_INK, fontsize=11)
        for name, colour in zip(allocation.formats, _COLOURS, strict=False):
            places = [place for place, layer in enumerate(layers) if allocation.schemes[layer].name == name]
            heights = [allocation.schemes[layers[place]].bits for place in places]
            above.bar(places, heights, width=0.9, color=colour, label=name)
            errors = [allocation.sensitivity[layer].get(name) for layer in layers]
            known = [(place, error) for place, error in enumerate(errors) if error]
            if known:
                below.plot(*zip(*known, strict=True), ".", color=colour, markersize=4)
            for place in places:
                chosen = allocation.sensitivity[layers[place]].get(name)
                if chosen:
                    below.plot(place, chosen, "o", color=colour, markersize=7, fillstyle="none")
        above.set_ylabel("bits of a code")
        above.legend(ncols=4, loc="lower right")
        below.set_yscale("log")
        below.set_ylabel("relative squared error\nof the block's output")
        below.set_xticks(range(len(layers)), [_short(layer) for layer in layers], rotation=90, fontsize=6)
        below.set_title("every format; rings: the one chosen", loc="left")
        save_figure(figure, path)


def _short(layer: str) -> str:
    """The block's number and the layer's own name."""
    parts = layer.split(".")
    number = next((part for part in parts if part.isdecimal()), "")
    return f"{number} {parts[-1]}".strip()
