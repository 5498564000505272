"""The page: self-contained, well-formed, everything from outside escaped, labels apart, figures as compared."""

from __future__ import annotations

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from strop.errors import UsageError
from strop.evaluation.comparison import Comparison, Flip, Flips, ModelResult
from strop.evaluation.speed import Rate, Speed
from strop.evaluation.statistics import Difference, Interval, compare_proportions, wilson_interval
from strop.pages.atomic import write_whole
from strop.pages.charts import Box, Point, marked_difference, place_labels, scatter, ticks
from strop.pages.page import Section, render_page, write_page

HOSTILE = '</script><script>alert(1)</script><img src="http://evil.example/x.png" onerror=alert(1)>&amp;'
STAGES = ["full", "base", "lora", "qlora", "int8", "int4-g32", "int3-g32", "int2-g32", "int2", "control", "qat", "nf4"]


def result(name: str, *, mebibytes: float, right: int, loss: float, first: bool, task: bool) -> ModelResult:
    answers = [index < right for index in range(100)]
    reference = [index < 95 for index in range(100)]
    layers = {f"model.layers.{block}.{kind}": 10.0**-block for block in range(4) for kind in ("attn.q", "mlp.up")}
    rate = Rate(1234.0, 1000.0, 1500.0, 128, 3)
    flip = Flip(7, f"asked {HOSTILE}", f"expected {HOSTILE}", f"expected {HOSTILE}", f"given {HOSTILE}", "lost")
    difference = Difference(loss - 0.05, loss - 0.06, loss - 0.04, "worse", None, 100, 0.95, "bootstrap")
    return ModelResult(
        name=name,
        source=f"/models/{name}",
        format="int4-g32",
        weights_bytes=int(mebibytes * (1 << 20)),
        adapter_bytes=None,
        peak_bytes=int(3 * mebibytes * (1 << 20)),
        loss=Interval(loss, 0.9 * loss, 1.1 * loss, 100, 0.95, "bootstrap"),
        speed=Speed(rate, rate),
        kl=None if first else Interval(0.012, 0.011, 0.013, 100, 0.95, "bootstrap"),
        kl_99th=None if first else 0.3,
        kl_rows=None if first else 100,
        top1_agreement=None if first else Interval(0.987, 0.98, 0.99, 100, 0.95, "bootstrap"),
        score=wilson_interval(right, 100) if task else None,
        loss_difference=None if first else difference,
        score_difference=compare_proportions(reference, answers) if task and not first else None,
        layer_errors=None if first else layers,
        flips=Flips(3, 1, (flip,)) if task and not first else None,
    )


def comparison(names: list[str], *, task: bool = True) -> dict:
    generator = random.Random(0)
    models = tuple(
        result(
            name,
            mebibytes=generator.choice([7.5, 7.5, 3.2, 2.4]),
            right=95 if index == 0 else generator.randint(0, 100),
            loss=generator.choice([0.03, 0.031, 0.5, 3.0]),
            first=index == 0,
            task=task,
        )
        for index, name in enumerate(names)
    )
    kind = "exact-match" if task else None
    return Comparison(models, "rows.jsonl", 100, 2345, "ab" * 32, kind, 0, 0.95, ("a note",)).to_dict()


class Page(HTMLParser):
    """Collects the elements, and fails where tags do not close in order."""

    VOID = frozenset({"meta", "link", "img", "br", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]


@pytest.mark.parametrize("count", [1, 2, 5, 12])
@pytest.mark.parametrize("task", [True, False])
def test_the_page_is_well_formed_for_one_to_twelve_models_and_shows_every_name(count: int, task: bool):
    text = render_page(comparison(STAGES[:count], task=task), title="stages")
    words = " ".join(Page(text).words)
    assert all(name in words for name in STAGES[:count])
    assert "NaN" not in text
    assert "None" not in words


def test_the_page_asks_for_nothing_from_elsewhere():
    text = render_page(comparison(STAGES), title="stages")
    page = Page(text)
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base"})
    policy = next(meta["content"] for meta in page.tags("meta") if meta.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    for _, attributes in page.elements:
        assert {"src", "href", "srcset", "data", "action"}.isdisjoint(attributes)
        assert not any(name.startswith("on") for name in attributes)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_text_from_models_data_names_and_sections_is_escaped():
    hostile = comparison(["full", HOSTILE])
    hostile["data"] = hostile["notes"][0] = HOSTILE
    sections = [Section(HOSTILE, [HOSTILE], [HOSTILE], [[HOSTILE]])]
    text = render_page(hostile, title=HOSTILE, sections=sections)
    page = Page(text)
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "img"})
    assert "".join(page.words).count(HOSTILE) >= 12  # it is shown as it is


def test_the_verdict_stands_on_top_then_drawings_table_answers_and_layers():
    shown = comparison(["full", "int4-g32"])
    text = render_page(shown, title="two")
    order = [
        str(shown["headline"]).split(":")[0],
        "Size against score",
        "Score of each model",
        "Difference from full",
        "All figures",
        "Answers that flipped",
        "Weight error by layer",
        "How this was measured",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    without = render_page(comparison(["full", "int4-g32"], task=False), title="two")
    assert "Size against loss" in without
    assert "Answers that flipped" not in without


def test_the_table_shows_the_figures_of_the_comparison_with_units():
    text = render_page(comparison(["full", "int4-g32"]), title="two")
    words = Page(text).words
    for header in ("weights, MiB", "peak memory, MiB", "decode, tokens/s", "KL mean, nats", "exact match, %"):
        assert header in words
    for figure in ("1,234", "1,000 to 1,500", "0.0120", "98.7", "98.0 to 99.0", "95.0"):
        assert figure in words


def test_sections_stand_where_they_are_asked_to():
    sections = [Section("before it all", first=True), Section("after the table", ["text"], ["a"], [["b"]])]
    text = render_page(comparison(["full", "int8"]), title="two", sections=sections)
    places = [text.index(part) for part in ("before it all", "Size against score", "All figures", "after the table")]
    assert places == sorted(places)


def test_what_a_wrong_answer_has_beyond_the_expected_one_is_marked():
    assert str(marked_difference('time "06:03"', 'time "06:30"')).count("<mark>") >= 1
    assert str(marked_difference("same", "same")) == "same"
    assert str(marked_difference("a<b", "a")) == "a<mark>&lt;b</mark>"


def test_the_page_is_written_whole_with_folders_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shown = json.loads(json.dumps(comparison(["full", "int8"]), allow_nan=False))  # as read back from a file
    target = write_page(shown, tmp_path / "new" / "page.html", title="two")
    before = target.read_text(encoding="utf-8")
    assert before.startswith("<!doctype html>")
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_page(shown, target, title="another")
    assert target.read_text(encoding="utf-8") == before
    assert list(target.parent.iterdir()) == [target]
    with pytest.raises(UsageError, match="is a folder"):
        write_whole(tmp_path, ["text"])


def overlaps(boxes: list[Box]) -> int:
    return sum(one.overlap(other) > 0 for index, one in enumerate(boxes) for other in boxes[:index])


@pytest.mark.parametrize(("width", "longest"), [(960, 24), (360, 12)])
def test_labels_stay_apart_and_inside_for_twelve_marks_in_any_arrangement(width: int, longest: int):
    generator = random.Random(width)
    frame = Box(58, 0, width - 58, 356)
    for arrangement in range(60):
        spread = generator.choice([0.0, 0.02, 0.2, 1.0])
        x0, y0 = generator.uniform(0.1, 0.9), generator.uniform(0.05, 0.95)
        anchors = [
            (
                frame.left + frame.width * min(1, max(0, x0 + spread * generator.uniform(-0.5, 0.5))),
                14 + 330 * min(1, max(0, y0 + spread * generator.uniform(-0.5, 0.5))),
            )
            for _ in range(12)
        ]
        widths = [7.0 * generator.randint(3, longest) + 4 for _ in anchors]
        boxes = place_labels(anchors, widths, [Box(x - 9, y - 7, 18, 14) for x, y in anchors], frame)
        assert overlaps(boxes) == 0, arrangement
        assert all(box.inside(frame) for box in boxes)


def test_the_drawing_places_marks_and_bars_in_proportion():
    points = [Point("a", 2.0, 25.0, 20.0, 30.0, "better"), Point("b", 4.0, 75.0, None, None, "reference")]
    svg = str(scatter(points, width=960, height=400, x_label="size", y_label="score", top=100.0))
    frame_top, frame_height, left, across = 14.0, 400 - 58.0, 58.0, 960 - 74.0
    x, high, low = left + across * 2 / (4 * 1.12), *(frame_top + frame_height * (1 - v / 100) for v in (30, 20))
    assert f'class="whisker better" d="M{x - 4:.1f} {high:.1f}h8m-4 0V{low:.1f}' in svg
    assert svg.count('class="whisker') == 1
    assert svg.count('class="mark ') == 2
    assert re.search(r">score<", svg)


def test_where_no_model_answers_a_row_size_is_drawn_against_the_loss():
    nobody = comparison(["full", "int8"])
    for model in nobody["models"]:
        model["score"] = {"estimate": 0.0, "low": 0.0, "high": 0.04}
    text = render_page(nobody, title="two")
    assert "Size against loss" in text
    assert "rows answered exactly, %" not in text


def test_folders_of_somebodys_machine_are_not_shown():
    shown = comparison(["full", "int8"])
    shown["data"] = "/home/somebody/secret/rows.jsonl"
    assert "somebody" not in render_page(shown, title="two")
    shown["data"] = "org/name"
    assert "org/name" in render_page(shown, title="two")


def test_a_loss_that_spans_decades_is_drawn_logarithmically():
    names = ["full", "base"]
    wide = comparison(names)
    wide["models"][1]["loss"] = {"estimate": 5.0, "low": 4.9, "high": 5.1}
    wide["models"][0]["loss"] = {"estimate": 0.01, "low": 0.009, "high": 0.011}
    assert "(logarithmic)" in render_page(wide, title="t")
    wide["models"][0]["loss"] = {"estimate": 4.0, "low": None, "high": None}
    assert "(logarithmic)" not in render_page(wide, title="t")
    wide["models"][0]["loss"] = {
        "estimate": 0.01,
        "low": -0.001,
        "high": 0.02,
    }  # an interval below zero has no logarithm
    assert "(logarithmic)" not in render_page(wide, title="t")


@pytest.mark.parametrize(("low", "high"), [(0, 7.4), (0, 100), (-100, 3), (0, 0.0007), (0, 31000), (5, 5)])
def test_ticks_are_few_and_round_and_inside(low: float, high: float):
    found = ticks(low, high)
    assert 1 <= len(found) <= 9
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
