"""`quantize` to int8 weights and activations: static scales from data, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from strop.errors import UsageError
from strop.layers.int8_linear import Int8Linear, OutlierInt8Linear
from strop.layers.surgery import linear_modules
from strop.models import load
from strop.recipes.quantize import quantize
from tests.tiny import tiny_chat_file, tiny_folder, tiny_input


def static_scales(folder: Path) -> dict[str, float]:
    model = load(folder, tokenizer=False).model
    return {name: module.qtensor.activation_scale.item() for name, module in linear_modules(model).items()}  # type: ignore[union-attr]


def test_a_static_scale_is_fixed_from_the_rows_and_saved(tmp_path: Path) -> None:
    source, data = tiny_folder(tmp_path, "llama"), tiny_chat_file(tmp_path / "rows.jsonl", rows=24)
    scales = {}
    for observer in ("minmax", "average", "percentile", "entropy"):
        result = quantize(
            source, "int8-a8-static", output=tmp_path / observer, data=str(data), activation_observer=observer
        )
        assert result.receipt["settings"]["activation_observer"] == observer
        assert 0 < result.receipt["held_out"]["kl"] < 0.05
        scales[observer] = static_scales(tmp_path / observer)
    assert len({tuple(scales[name].values()) for name in ("minmax", "average", "entropy")}) == 3
    assert all(scales["entropy"][name] <= scale * 1.0001 for name, scale in scales["minmax"].items())


@pytest.mark.parametrize(("text", "kind"), [("int8-a8", Int8Linear), ("int8-a8-over6", OutlierInt8Linear)])
def test_dynamic_formats_need_no_data(tmp_path: Path, text: str, kind: type) -> None:
    source = tiny_folder(tmp_path, "qwen3")
    result = quantize(source, text, output=tmp_path / "out")
    opened = load(result.path)
    assert result.receipt["requested"] == text
    assert {type(module) for module in linear_modules(opened.model).values()} == {kind}
    with torch.inference_mode():
        assert opened.model(tiny_input()).logits.equal(load(source, format=text).model(tiny_input()).logits)


def test_a_static_scale_without_data_and_an_observer_without_use_are_refused(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path, "llama")
    with pytest.raises(UsageError, match=r"--data FILE\), or use int8-a8"):
        quantize(source, "int8-a8-static", output=tmp_path / "out")
    with pytest.raises(UsageError, match="int8-a8 fixes no scale"):
        quantize(source, "int8-a8", output=tmp_path / "out", activation_observer="entropy")
    assert not (tmp_path / "out").exists()
