"""A folder with a quantized embedding goes on to what other verbs make of it: GGUF, a merge, a comparison."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from strop.files.gguf.reader import GgufFile
from strop.layers.quant_embedding import QuantEmbedding
from strop.layers.surgery import lora_modules
from strop.models import load
from strop.recipes.compare import compare
from strop.recipes.export import export
from strop.recipes.merge import merge
from strop.recipes.quantize import quantize
from strop.recipes.tune import tune
from tests.tiny import tiny_chat_file, tiny_folder, tiny_input


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_chat_file(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows=24))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    """A tied model whose embedding is int8-g32."""
    base = tmp_path_factory.mktemp("model")
    source = tiny_folder(base, "llama", tied=True)
    formats = ("int4-g32-full", "int8-g32")
    result = quantize(source, output=base / "out", budget="70KB", formats=formats, data=data, method="search")
    assert isinstance(load(result.path).model.get_input_embeddings(), QuantEmbedding)
    return result.path


def test_a_gguf_file_takes_the_embedding_over_and_has_no_head_beside_it(tmp_path: Path, folder: Path) -> None:
    result = export(folder, tmp_path / "m.gguf", format="gguf:q8_0", verify=True)
    assert any("llama.cpp" in line for line in result.proof)
    file = GgufFile.open(tmp_path / "m.gguf")
    assert "output.weight" not in file.tensors
    held = load(folder).model.get_input_embeddings().weight
    (record,) = [record for record in result.tensors if record.name == "token_embd.weight"]
    assert record.sources == ("model.embed_tokens.weight",)
    assert record.loss < 1e-4
    torch.testing.assert_close(file.tensor("token_embd.weight"), held, rtol=0, atol=float(held.abs().max()) / 100)


def test_an_adapter_over_it_is_trained_and_merged(tmp_path: Path, folder: Path, data: str) -> None:
    run = tune(folder, data, method="qlora", output=tmp_path / "run", dtype="float32", batch_size=4, max_steps=3)
    opened = load(run.path)
    assert lora_modules(opened.model)
    assert isinstance(opened.model.get_input_embeddings(), QuantEmbedding)
    merged = merge(run.path, tmp_path / "merged", force=True)
    dense = load(merged.path).model
    assert type(dense.get_input_embeddings()) is torch.nn.Embedding
    assert dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    assert torch.equal(dense.get_input_embeddings().weight, opened.model.get_input_embeddings().weight)


def test_it_generates_and_is_compared_with_its_source(tmp_path: Path, folder: Path, data: str) -> None:
    with torch.no_grad():
        answer = load(folder).model.generate(tiny_input(rows=1), max_new_tokens=4, do_sample=False)
    assert 12 < answer.shape[1] <= 16
    result = compare([folder.parent / "llama", folder], data, speed=False)
    assert [model.format for model in result.models] == ["float32", "mixed: int4-g32-full, int8-g32"]
