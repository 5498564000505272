"""Charts for the page, written as inline SVG and plain HTML: no script, no font, no request.

Colours are CSS classes (`better`, `worse`, `undecided`, `reference`), so that light and dark are the page's part; each
class has a shape of its own too, so that nothing rests on colour alone. Text that comes from outside is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

CHARACTER_WIDTH = 7.0
"""Pixels that one character of a label is taken to need at 12 px: more than the average of common sans-serif fonts."""

LABEL_HEIGHT = 15.0
_MARGIN = {"left": 58.0, "right": 16.0, "top": 14.0, "bottom": 44.0}
_LONGEST_LABEL = 24
# Nearly level places first, to the right before the left, so that a label reads in one line with its mark.
_ANGLES = sorted(
    (index * math.pi / 8 for index in range(16)), key=lambda angle: (round(abs(math.sin(angle)), 6), -math.cos(angle))
)


@dataclass(frozen=True)
class Point:
    """A mark of the scatter: where it stands, its vertical interval, and its kind (a CSS class)."""

    name: str
    x: float
    y: float
    low: float | None
    high: float | None
    kind: str


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    top: float
    width: float
    height: float

    def overlap(self, other: Box) -> float:
        """Area that both cover."""
        across = min(self.left + self.width, other.left + other.width) - max(self.left, other.left)
        down = min(self.top + self.height, other.top + other.height) - max(self.top, other.top)
        return max(0.0, across) * max(0.0, down)

    def inside(self, frame: Box) -> bool:
        """Whether it lies within `frame`."""
        return (
            self.left >= frame.left
            and self.top >= frame.top
            and self.left + self.width <= frame.left + frame.width
            and self.top + self.height <= frame.top + frame.height
        )


def place_labels(
    anchors: Sequence[tuple[float, float]], widths: Sequence[float], obstacles: Sequence[Box], frame: Box
) -> list[Box]:
    """Find a place for each label near its anchor where it covers no other label and no obstacle.

    Places on rings around the anchor are tried, nearest first; the first free one is taken, or the one that covers
    least.

    Args:
        anchors: The point each label belongs to.
        widths: Width of each label.
        obstacles: Areas to keep free (marks, error bars).
        frame: Where labels may stand.

    Returns:
        A box per label, in the order given.
    """
    placed: list[Box] = []
    for (x, y), width in zip(anchors, widths, strict=True):
        best, least = None, math.inf
        for box in _candidates(x, y, width, frame):
            covered = sum(box.overlap(other) for other in placed) * 4 + sum(box.overlap(area) for area in obstacles)
            if covered < least:
                best, least = box, covered
            if covered == 0:
                break
        placed.append(best or Box(frame.left, frame.top, width, LABEL_HEIGHT))
    return placed


def _candidates(x: float, y: float, width: float, frame: Box) -> list[Box]:
    boxes = []
    for ring in range(16):
        radius = 10 + 14 * ring
        for angle in _ANGLES:
            centre_x = x + math.cos(angle) * (radius + width / 2)
            centre_y = y + math.sin(angle) * radius
            box = Box(centre_x - width / 2, centre_y - LABEL_HEIGHT / 2, width, LABEL_HEIGHT)
            if box.inside(frame):
                boxes.append(box)
    return boxes


def scatter(
    points: Sequence[Point],
    *,
    width: int,
    height: int,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    top: float | None = None,
) -> Markup:
    """Draw marks with vertical error bars and labels that stay apart.

    Args:
        points: What is drawn; x from 0, y as `log_y` says.
        width: Of the drawing, in pixels.
        height: Of the drawing, in pixels.
        x_label: Quantity and unit of x.
        y_label: Quantity and unit of y.
        log_y: Whether y is drawn on a logarithmic scale; all values must be positive.
        top: Upper end of y; from the data where it is None.

    Returns:
        An `<svg>` element.
    """
    frame = Box(
        _MARGIN["left"],
        _MARGIN["top"],
        width - _MARGIN["left"] - _MARGIN["right"],
        height - _MARGIN["top"] - _MARGIN["bottom"],
    )
    x_high = max(point.x for point in points) * 1.12 or 1.0
    y_low, y_high, y_ticks = _y_axis(points, log_y=log_y, top=top)

    def at_x(value: float) -> float:
        return frame.left + frame.width * value / x_high

    def at_y(value: float) -> float:
        share = (
            math.log(max(value, y_low) / y_low) / math.log(y_high / y_low)
            if log_y
            else (value - y_low) / (y_high - y_low)
        )
        return frame.top + frame.height * (1 - min(1.0, max(0.0, share)))

    parts = [
        _axes(frame, [(tick, at_x(tick)) for tick in ticks(0.0, x_high)], [(tick, at_y(tick)) for tick in y_ticks])
    ]
    parts.append(_axis_names(frame, height, x_label, y_label))
    obstacles, anchors = [], []
    for point in points:
        x, y = at_x(point.x), at_y(point.y)
        anchors.append((x, y))
        obstacles.append(Box(x - 9, y - 7, 18, 14))
        if point.low is not None and point.high is not None:
            upper, lower = at_y(point.high), at_y(point.low)
            obstacles.append(Box(x - 3, upper, 6, max(0.0, lower - upper)))
            parts.append(_whisker(x, upper, lower, point.kind))
    names = [shortened(point.name) for point in points]
    room = Box(frame.left, 0.0, frame.width + _MARGIN["right"], frame.top + frame.height)
    boxes = place_labels(anchors, [len(name) * CHARACTER_WIDTH + 4 for name in names], obstacles, room)
    for point, name, (x, y), box in zip(points, names, anchors, boxes, strict=True):
        parts.append(_leader(x, y, box))
        parts.append(mark(x, y, point.kind, title=point.name))
        parts.append(
            Markup('<text class="label" text-anchor="middle" x="{:.1f}" y="{:.1f}">{}</text>').format(
                box.left + box.width / 2, box.top + 11.5, name
            )
        )
    description = f"{y_label} over {x_label}: " + ", ".join(point.name for point in points)
    return Markup('<svg viewBox="0 0 {} {}" width="{}" height="{}" role="img" aria-label="{}">{}</svg>').format(
        width, height, width, height, description, Markup("").join(parts)
    )


def _y_axis(points: Sequence[Point], *, log_y: bool, top: float | None) -> tuple[float, float, list[float]]:
    values = [value for point in points for value in (point.y, point.low, point.high) if value is not None]
    if log_y:
        positive = [value for value in values if value > 0]
        low, high = 10 ** math.floor(math.log10(min(positive))), 10 ** math.ceil(math.log10(max(positive)))
        high = max(high, low * 10)
        decades = round(math.log10(high / low))
        steps = (1, 2, 5) if decades <= 2 else (1, 3) if decades <= 3 else (1,)
        marks = [low * 10**decade * step for decade in range(decades) for step in steps] + [high]
        return low, high, marks
    low, high = min(0.0, min(values)), top if top is not None else max(values) * 1.08 or 1.0
    return low, high, ticks(low, high)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, about five of them.

    >>> ticks(0.0, 7.4), ticks(-100.0, 3.0)
    ([0.0, 2.0, 4.0, 6.0], [-100.0, -80.0, -60.0, -40.0, -20.0, 0.0])
    """
    if high <= low:
        return [low]
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 2.5, 5, 10)), key=lambda size: abs(math.log(size / rough)))
    first = math.ceil(low / step - 1e-9)
    return [round(float(step * index), 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def shortened(name: str) -> str:
    """A name that fits a label, its middle left out where it is too long.

    >>> shortened("a-very-long-name-of-a-model-folder")
    'a-very-long…model-folder'
    """
    if len(name) <= _LONGEST_LABEL:
        return name
    keep = (_LONGEST_LABEL - 1) // 2
    return f"{name[:keep]}…{name[-(_LONGEST_LABEL - 1 - keep) :]}"


def number(value: float) -> str:
    """A tick's number, no longer than it must be.

    >>> number(0.0), number(2.5), number(0.001), number(16384.0)
    ('0', '2.5', '0.001', '16,384')
    """
    return f"{value:,.0f}" if value == round(value) else f"{value:.4g}"


def mark(x: float, y: float, kind: str, *, title: str = "") -> Markup:
    """The mark of a kind at a place: triangle up, triangle down, disc, or diamond."""
    paths = {
        "better": f"M{x:.1f} {y - 6:.1f}l6 10.5h-12z",
        "worse": f"M{x:.1f} {y + 6:.1f}l6 -10.5h-12z",
        "reference": f"M{x:.1f} {y - 6.5:.1f}l6.5 6.5l-6.5 6.5l-6.5 -6.5z",
    }
    name = Markup("<title>{}</title>").format(title) if title else Markup("")
    if kind in paths:
        return Markup('<path class="mark {}" d="{}">{}</path>').format(kind, paths[kind], name)
    return Markup('<circle class="mark {}" cx="{:.1f}" cy="{:.1f}" r="5">{}</circle>').format(kind, x, y, name)


def _axes(frame: Box, across: Sequence[tuple[float, float]], up: Sequence[tuple[float, float]]) -> Markup:
    right, bottom = frame.left + frame.width, frame.top + frame.height
    lines = [
        Markup(
            '<line class="grid" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>'
            '<text class="tick" text-anchor="end" x="{:.1f}" y="{:.1f}">{}</text>'
        ).format(frame.left, right, y, y, frame.left - 6, y + 4, number(value))
        for value, y in up
    ]
    lines += [
        Markup(
            '<line class="axis" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>'
            '<text class="tick" text-anchor="middle" x="{:.1f}" y="{:.1f}">{}</text>'
        ).format(x, x, bottom, bottom + 4, x, bottom + 17, number(value))
        for value, x in across
    ]
    base = Markup('<line class="axis" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(
        frame.left, right, bottom, bottom
    )
    return Markup("").join([*lines, base])


def _axis_names(frame: Box, height: int, x_label: str, y_label: str) -> Markup:
    middle = frame.top + frame.height / 2
    return Markup(
        '<text class="name" text-anchor="middle" x="{:.1f}" y="{:.1f}">{}</text>'
        '<text class="name" text-anchor="middle" transform="translate(13 {:.1f}) rotate(-90)">{}</text>'
    ).format(frame.left + frame.width / 2, height - 8, x_label, middle, y_label)


def _whisker(x: float, upper: float, lower: float, kind: str) -> Markup:
    return Markup('<path class="whisker {}" d="M{:.1f} {:.1f}h8m-4 0V{:.1f}m-4 0h8"/>').format(
        kind, x - 4, upper, lower
    )


def _leader(x: float, y: float, box: Box) -> Markup:
    """A thin line from a mark to its label where the two stand apart."""
    near_x = min(max(x, box.left), box.left + box.width)
    near_y = min(max(y, box.top + 2), box.top + box.height - 2)
    if math.hypot(near_x - x, near_y - y) < 16:
        return Markup("")
    return Markup('<line class="leader" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(x, y, near_x, near_y)


def interval_track(
    estimate: float,
    low: float | None,
    high: float | None,
    kind: str,
    *,
    start: float,
    end: float,
    zero: float | None = None,
) -> Markup:
    """A horizontal interval between `start` and `end`, as wide as its container, with a line at `zero` if given."""

    def at(value: float) -> float:
        return 100 * min(1.0, max(0.0, (value - start) / (end - start))) if end > start else 50.0

    parts = [Markup("")]
    if zero is not None:
        parts.append(Markup('<span class="zero" style="left:{:.2f}%"></span>').format(at(zero)))
    if low is not None and high is not None:
        parts.append(
            Markup('<span class="span {}" style="left:{:.2f}%;width:{:.2f}%"></span>').format(
                kind, at(low), max(0.0, at(high) - at(low))
            )
        )
    parts.append(
        Markup(
            '<svg class="dot" style="left:{:.2f}%" viewBox="-8 -8 16 16" width="16" height="16" aria-hidden="true">'
            "{}</svg>"
        ).format(at(estimate), mark(0, 0, kind))
    )
    return Markup('<div class="track">{}</div>').format(Markup("").join(parts))


def heat(value: float, *, lowest: float, highest: float) -> Markup:
    """A cell whose strength is the logarithm of `value` between two powers of ten."""
    if value <= 0:
        return Markup('<i class="cell none"></i>')
    share = (math.log10(value) - math.log10(lowest)) / (math.log10(highest) - math.log10(lowest))
    return Markup('<i class="cell" style="opacity:{:.2f}"></i>').format(0.06 + 0.94 * min(1.0, max(0.0, share)))


def marked_difference(text: str, other: str) -> Markup:
    """`text` escaped, with the parts that `other` does not have in `<mark>`."""
    import difflib

    parts = []
    for tag, start, stop, _, _ in difflib.SequenceMatcher(None, text, other, autojunk=False).get_opcodes():
        piece = escape(text[start:stop])
        parts.append(piece if tag == "equal" or not piece else Markup("<mark>{}</mark>").format(piece))
    return Markup("").join(parts)
