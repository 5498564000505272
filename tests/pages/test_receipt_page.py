"""The page of a receipt: self-contained, escaped, the verdict on top in words that the figures bear out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from strop.files.receipts import Receipt, TensorReceipt
from strop.pages.receipt import MOST_LAYERS, render_receipt_page
from tests.pages.test_page import HOSTILE, Page

HELD_OUT = {
    "rows": 40, "rows_compared": 40, "tokens": 1234, "level": 0.95, "kl": 0.0123, "kl_interval": [0.01, 0.015],
    "kl_99th": 0.2, "top1_agreement": 0.981, "top1_agreement_interval": [0.975, 0.987],
    "perplexity": 5.5, "perplexity_interval": [5.0, 6.0], "source_perplexity": 5.4,
    "source_perplexity_interval": [4.9, 5.9],
}  # fmt: skip
CALIBRATION = {"data": "/home/me/secret/rows.jsonl", "built_in": False, "rows": 96, "tokens": 9000, "held_out_rows": 40}


def receipt(**changes: Any) -> dict[str, Any]:
    layer = TensorReceipt("layers.0.up", (64, 32), "int4-g32", "int4-g32", None, 0.01, 0.2, 1152, 0.002, True)
    made = Receipt("/home/me/models/base", "int4-g32", {"method": "gptq", "observer": None}, [layer])
    made.settings["calibration"] = {**CALIBRATION, "sha256": "ab" * 32}
    made.held_out, made.parameters = dict(HELD_OUT), 4096
    made.weights_bytes, made.source_weights_bytes = 1 << 20, 4 << 20
    made.blocks = [
        {"name": f"layers.{n}", "calibration_error": 0.01 * (n + 1), "held_out_error": 0.02 * (n + 1), "notes": []}
        for n in range(3)
    ]
    made.made_by = {"strop": "0.1.0", "torch": "2", "transformers": "5", "python": "3.11", "seed": 7, "seconds": 12.5,
                    "peak_bytes": 50 << 20}  # fmt: skip
    for name, value in changes.items():
        setattr(made, name, value)
    return made.to_dict()


def words(found: dict[str, Any]) -> str:
    page = Page(render_receipt_page(found))
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base"})
    assert all({"src", "href", "srcset"}.isdisjoint(attributes) for _, attributes in page.elements)
    text = " ".join(" ".join(page.words).split())
    assert "None" not in text
    assert "nan" not in text.lower().replace("finance", "")
    return text


def test_every_figure_of_the_receipt_is_told_in_words() -> None:
    text = words(receipt())
    assert "base as int4-g32, by gptq" in text
    assert "/home/me" not in text
    assert "on 40 held-out rows the model is 0.0123 nats per token from its source (0.0100 to 0.0150)" in text
    assert "the same token 98.1% of the time (97.5% to 98.7%)" in text
    assert (
        "4.500 bits per weight over 1 linear layers; the weight files take 1.00 MiB, 25% of the source's 4.00" in text
    )
    assert "50.0% of 4,096 parameters are rounded" in text
    assert "Most clipped: layers.0.up, 0.20%" in text
    assert "Rows of rows.jsonl calibrated." in text
    assert "96 rows with 9,000 tokens calibrated, 40 others were held out" in text
    assert "strop 0.1.0, torch 2, transformers 5, Python 3.11; seed 7." in text
    assert "12.5 seconds and at most 50.0 MiB" in text


@pytest.mark.parametrize(
    ("limit", "mark", "said"),
    [(0.02, "better", "Gate: KL at most 0.02, measured 0.01230."), (0.013, "undecided", "reaches past it, to 0.01500")],
)
def test_a_gate_that_the_interval_reaches_past_is_not_called_settled(limit: float, mark: str, said: str) -> None:
    found = receipt(gate={"max_kl": limit, "min_agreement": 0.9, "passed": True, "repairs": 2})
    text, page = words(found), render_receipt_page(found)
    assert "The gate is passed" in text
    assert said in text
    assert "Gate: agreement at least 0.9, measured 0.9810." in text
    assert "Repaired 2 times" in text
    first = page[page.index('<ul class="verdicts">') :]
    assert f'class="mark {mark}"' in first[: first.index("Gate: KL")]


def test_what_was_not_measured_is_not_claimed() -> None:
    bare = receipt(held_out={}, blocks=[], settings={"method": "rtn", "observer": "minmax"}, made_by={})
    text = words(bare)
    assert "What rounding cost was not measured" in text
    assert "Nothing calibrated" in text
    assert "Error by block" not in text
    few = dict(HELD_OUT, kl_interval=[None, None], top1_agreement_interval=[None, None], perplexity=None,
               perplexity_interval=[None, None])  # fmt: skip
    text = words(receipt(held_out=few, gate={"max_kl": 0.1, "min_agreement": None, "passed": True, "repairs": 0}))
    assert "the rows are too few for an interval" in text


def test_built_in_paragraphs_are_called_worse_than_data() -> None:
    built_in = {**CALIBRATION, "data": "paragraphs", "built_in": True, "sha256": "ab" * 32}
    text = words(receipt(settings={"method": "gptq", "calibration": built_in}))
    assert "Built-in paragraphs calibrated" in text
    assert "calibrate better (--data)" in text


def test_fallbacks_have_their_share_and_their_reason() -> None:
    layer = TensorReceipt("layers.0.up", (64, 32), "int4-g32", "int4-g32", None, 0.01, 0.2, 1152, 0.0, True)
    kept = TensorReceipt("layers.0.down", (32, 30), "int4-g32", "bfloat16", "30 is not divisible", 0.0, 0.0, 1920)
    text = words(receipt(tensors=[layer, kept], left_alone=["layers.0.experts"]))
    assert "1 layer did not get the format: 31.9% of the linear layers' parameters" in text
    assert "int4-g32 → bfloat16" in text
    assert "30 is not divisible" in text
    assert "layers.0.experts" in text
    many = [replace(kept, name=f"layers.{n}.down") for n in range(20)]
    text = words(receipt(tensors=[layer, *many]))
    assert "layers.7.down and 12 more" in text  # those alike share a row
    assert text.count("30 is not divisible") == 1


def test_names_and_notes_are_escaped() -> None:
    layer = TensorReceipt(HOSTILE, (4, 4), HOSTILE, HOSTILE, HOSTILE, 0.1, 0.1, 8)
    rounded = TensorReceipt(HOSTILE, (4, 4), HOSTILE, "int4", None, 0.1, 0.1, 8, 0.5, True)
    block = {"name": HOSTILE, "calibration_error": 0.1, "held_out_error": 0.1, "notes": [HOSTILE]}
    hostile = receipt(source=HOSTILE, requested=HOSTILE, tensors=[layer, rounded], blocks=[block], left_alone=[HOSTILE])
    hostile["settings"] = {"method": HOSTILE, "calibration": {**CALIBRATION, "data": HOSTILE, "sha256": HOSTILE}}
    page = Page(render_receipt_page(hostile))
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "img"})
    assert all(not name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "".join(page.words).count("<script>alert(1)</script>") >= 8


def test_a_mixture_of_thousands_of_experts_stays_a_small_page() -> None:
    layers = [
        TensorReceipt(f"experts.up.{n}", (64, 32), "int4-g32", "int4-g32", None, n / 9000, 0.2, 1152, 0.0, True)
        for n in range(3000)
    ]
    page = render_receipt_page(receipt(tensors=layers))
    assert len(page) < 300_000
    assert f"{3000 - MOST_LAYERS:,} layers of smaller error are left out" in page
    assert "experts.up.2999<" in page
    assert "experts.up.7<" not in page
