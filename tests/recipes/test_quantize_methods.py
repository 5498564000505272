"""Every method through the verb: what was calibrated is what is stored, and it opens again."""

from __future__ import annotations

from pathlib import Path

import pytest

from strop.layers.quant_linear import QuantLinear
from strop.layers.surgery import linear_modules
from strop.methods import BLOCK_METHODS, METHODS
from strop.models import load
from strop.recipes.quantize import needs_rows, quantize
from tests.recipes.test_quantize import Listener
from tests.tiny import tiny_chat_file, tiny_folder

QUICK = sorted({*METHODS, *BLOCK_METHODS} - {"autoround", "autoround-best"})  # which differ from -light in steps alone


@pytest.mark.parametrize("method", QUICK)
def test_every_method_makes_a_model_that_opens_with_a_receipt_of_its_held_out_rows(tmp_path: Path, method: str) -> None:
    source, data = tiny_folder(tmp_path, "llama"), str(tiny_chat_file(tmp_path / "rows.jsonl", rows=24))
    scheme = "int8" if method.startswith("smooth") else "int3-g32"
    result = quantize(source, scheme, output=tmp_path / "out", method=method, data=data)
    opened = load(result.path)
    layers = linear_modules(opened.model)
    assert all(isinstance(module, QuantLinear) and module.scheme.name == scheme for module in layers.values())
    assert result.receipt["settings"]["method"] == method
    assert 0 < result.receipt["held_out"]["kl"] < 1
    assert len(result.receipt["blocks"]) == 2


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_method_that_needs_rows_says_which_it_used_where_none_were_given(tmp_path: Path, method: str) -> None:
    assert needs_rows(method)
    listener = Listener()
    result = quantize(
        tiny_folder(tmp_path, "llama"),
        "int4-g32",
        output=tmp_path / "out",
        method=method,
        max_rows=12,
        reporter=listener,
    )
    assert any(note.startswith("no --data: 12 paragraphs") for note in listener.notes)
    assert result.receipt["settings"]["calibration"]["data"] == "paragraphs of strop's own (no --data)"
