"""Comparing quantized models: what receipts say is told, what they lack too; rows that calibrated are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from strop.recipes.compare import compare
from strop.recipes.quantize import quantize
from tests.tiny import tiny_chat_file, tiny_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, judged (quantized over rows), bare (without a receipt), broken (with one that is not ours)."""
    folder = tmp_path_factory.mktemp("receipts")
    tiny_folder(folder, "llama").rename(folder / "base")
    tiny_chat_file(folder / "rows.jsonl", rows=24)
    quantize(folder / "base", "int4-g32", output=folder / "judged", method="search", data=str(folder / "rows.jsonl"))
    for name in ("bare", "broken"):
        shutil.copytree(folder / "judged", folder / name)
    (folder / "bare" / "receipt.json").unlink()
    (folder / "broken" / "receipt.json").write_text('{"requested": ["int4"], "total": 12}')
    return folder


def test_receipts_are_read_and_what_they_lack_is_said(place: Path, tmp_path: Path) -> None:
    models = [place / name for name in ("base", "judged", "bare", "broken")]
    found = compare(models, place / "rows.jsonl", speed=False, page=tmp_path / "page.html")
    receipt = json.loads((place / "judged" / "receipt.json").read_text())
    assert [model.receipt is None for model in found.models] == [True, False, True, True]
    told = found.to_dict()["models"][1]["receipt"]
    assert (told["requested"], told["method"], told["bits_per_weight"]) == ("int4-g32", "search", 4.5)
    assert (told["kl"], told["rows"]) == (receipt["held_out"]["kl"], receipt["held_out"]["rows"])
    notes = " ".join(found.notes)
    assert "judged, by its receipt: int4-g32 by search, 4.500 bits per weight; KL" in notes
    assert "on 6 held-out rows of its own" in notes
    assert "judged was calibrated on rows of rows.jsonl, which judge here: that flatters it" in notes
    assert "bare is quantized and has no receipt.json" in notes
    assert "broken: its receipt.json cannot be read (requested: input should be a valid string" in notes
    assert "base" not in notes.replace("rows.jsonl", "")
    page = (tmp_path / "page.html").read_text()
    assert "judged, by its receipt" in page


def test_rows_that_calibrated_nothing_are_not_suspected(place: Path) -> None:
    other = tiny_chat_file(place / "other.jsonl", rows=8)
    found = compare([place / "base", place / "judged"], other, speed=False)
    assert "flatters" not in " ".join(found.notes)
