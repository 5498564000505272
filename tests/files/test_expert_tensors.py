"""Experts in files: one by one under their checkpoint's names; transformers opens them alone, strop bit for bit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from strop.errors import FormatError, ModelError, StropError
from strop.files import compressed_tensors
from strop.files.expert_tensors import Place, inexpressible, places
from strop.files.saving import save_model
from strop.files.shards import iter_tensors
from strop.layers.quant_experts import expert_names, expert_weights, quant_experts
from strop.layers.surgery import experts, linear_modules
from strop.models import load
from strop.numerics.qtensor import quantize_tensor
from strop.numerics.scheme import parse_scheme
from tests.layers.test_quant_experts import gpt_oss
from tests.models.common import edit_weights, logits, same_weights
from tests.tiny import tiny_folder, tiny_model

NAMES = {
    "mixtral": ["block_sparse_moe.experts.2.w1", "block_sparse_moe.experts.2.w3", "block_sparse_moe.experts.2.w2"],
    "qwen3_moe": ["mlp.experts.2.gate_proj", "mlp.experts.2.up_proj", "mlp.experts.2.down_proj"],
}
FAMILIES = list(NAMES)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


def saved(folder: Path, family: str, grid: str, **options: Any) -> tuple[Any, Path]:
    opened = load(tiny_folder(folder, family, **options), grid)
    return opened.model, save_model(opened.model, opened.tokenizer, folder / "out")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rows_of_an_expert_stand_under_the_names_of_its_checkpoint(family: str) -> None:
    model = tiny_model(family)
    found: dict[str, Place] = {}
    for weights in expert_weights(model).values():
        found |= places(model, weights)
    half = 128 if family == "mixtral" else 64
    gate, up, down = (f"model.layers.1.{name}" for name in NAMES[family])
    assert (found[gate], found[up]) == (Place(2, 0, half), Place(2, half, 2 * half))
    assert found[down] == Place(2, 0, 64)
    assert len(found) == 2 * 4 * 3


@pytest.mark.parametrize("grid", ["int4-g32", "int4-g32-full", "int3", "int8-tensor", "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_opens_the_experts_alone_and_exactly(tmp_path: Path, family: str, grid: str) -> None:
    model, folder = saved(tmp_path, family, grid)
    names = {name for name, _ in iter_tensors(folder)}
    ending = "weight" if grid == "fp8" else "weight_packed"
    assert {f"model.layers.0.{name}.{ending}" for name in NAMES[family]} <= names
    assert not any(name.endswith(("gate_up_proj", "experts.down_proj")) for name in names)
    theirs, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert {name: keys for name, keys in info.items() if keys} == {}
    for name, held in quant_experts(model).items():
        assert torch.equal(theirs.get_parameter(name), held.dense_parameter()), name
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", ["int4-g32", "int3", "int8-tensor", "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_strop_opens_them_bit_for_bit_and_writes_the_same_file(
    tmp_path: Path, family: str, grid: str, dtype: torch.dtype
) -> None:
    model, folder = saved(tmp_path, family, grid, dtype=dtype)
    again = load(folder)
    assert again.format == grid
    assert same_weights(again.model, model)
    assert logits(again.model).equal(logits(model))
    save_model(again.model, again.tokenizer, tmp_path / "twice")
    assert (tmp_path / "twice" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_asymmetric_experts_of_another_tool_are_read(tmp_path: Path, family: str) -> None:
    """strop writes none: transformers would not read their zero points, as the second half shows."""
    scheme, model, folder = parse_scheme("int4-g32-asym"), tiny_model(family), tiny_folder(tmp_path, family)
    expected: dict[str, list[Tensor]] = {}

    def edit(tensors: dict[str, Tensor]) -> None:
        for weights in expert_weights(model).values():
            expected[weights.name] = [torch.zeros(weights.shape) for _ in range(weights.count)]
            for layer, place in places(model, weights).items():
                made = quantize_tensor(tensors.pop(f"{layer}.weight"), scheme)
                expected[weights.name][place.expert][place.start : place.stop] = made.dequantize()
                tensors.update(compressed_tensors.encode(made, layer, packed=False))

    edit_weights(folder, edit)
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"] = compressed_tensors.config_for(scheme, ["lm_head"])
    (folder / "config.json").write_text(json.dumps(fields))
    opened = load(folder).model
    assert len(quant_experts(opened)) == 4
    for name, held in quant_experts(opened).items():
        assert torch.equal(held.dense_parameter(), torch.stack(expected[name]))
    with pytest.raises(RuntimeError, match="conversion"):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("family", "grid", "words"),
    [
        ("mixtral", "nf4", "bitsandbytes.*int4-g32"),
        ("qwen3_moe", "int4-g32-asym", "zero points.*int4-g32$"),
        ("mixtral", "fp8-g32", "without groups.*fp8"),
        ("gpt_oss", "int4-g32", "keep in one tensor"),
    ],
)
def test_what_no_reader_would_open_rightly_is_refused_by_name(family: str, grid: str, words: str) -> None:
    plain = gpt_oss() if family == "gpt_oss" else tiny_model(family)
    for weights in expert_weights(plain).values():
        reason = inexpressible(parse_scheme(grid), weights, plain)
        assert reason is not None
        assert re.search(words, reason)


def test_a_refused_model_leaves_nothing(tmp_path: Path) -> None:
    opened = load(tiny_folder(tmp_path, "mixtral"), "int4-g32-asym")
    with pytest.raises(FormatError, match=r"4 tensor\(s\) of experts.*\n.*layers\.0\.mlp\.experts"):
        save_model(opened.model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_format_beside_quantized_experts(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "mixtral")
    model = tiny_model("mixtral")
    mixed = dict.fromkeys(linear_modules(model), parse_scheme("int8"))
    mixed |= dict.fromkeys(expert_names(model), parse_scheme("int4-g32"))
    with pytest.raises(FormatError, match="cannot mix"):
        save_model(load(folder, mixed).model, None, tmp_path / "out")
    alone = load(folder, dict.fromkeys(expert_names(model), parse_scheme("int4-g32"))).model
    save_model(alone, None, tmp_path / "alone")
    assert same_weights(load(tmp_path / "alone", tokenizer=False).model, alone)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "alone", dtype=torch.float32, attn_implementation="eager")
    torch.testing.assert_close(logits(theirs), logits(alone), rtol=0, atol=1e-5)
    del mixed[expert_names(model)[3]]
    with pytest.raises(FormatError, match="all of its experts need one format"):
        load(folder, mixed)


def test_some_experts_kept_dense_are_opened_by_both(tmp_path: Path) -> None:
    kept = [name for name in experts(tiny_model("mixtral")) if name.endswith("layers.1.mlp.experts.down_proj")]
    model = load(tiny_folder(tmp_path, "mixtral"), "int4-g32", keep=kept).model
    assert len(quant_experts(model)) == 3
    save_model(model, None, tmp_path / "out")
    assert same_weights(load(tmp_path / "out", tokenizer=False).model, model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("part", "words"), [("weight_packed", r"w2.*weight_packed"), ("weight_scale", r"w2.*weight_scale"), (None, "rows")]
)
def test_an_expert_that_is_not_whole_is_named(tmp_path: Path, part: str | None, words: str) -> None:
    _, folder = saved(tmp_path, "mixtral", "int4-g32")
    layer = "model.layers.1.block_sparse_moe.experts.3.w2"

    def edit(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{layer}.")]:
            if part is None or name.endswith(part):
                del tensors[name]

    edit_weights(folder, edit)
    with pytest.raises(ModelError if part is None else StropError, match=rf"experts.*{words}"):
        load(folder)
