"""`prove` of GGUF files: each side in its own runtime, with its own tokenizer and template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import strop
from strop.errors import DataError
from strop.recipes.certificate import check_certificate
from strop.recipes.prove_result import Pass
from tests.runtime.files import tiny_gguf
from tests.tiny import tiny_chat_file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    folder = tmp_path_factory.mktemp("gguf")
    tiny_gguf(folder)
    tiny_chat_file(folder / "rows.jsonl", rows=24)
    return folder


def test_a_file_is_compared_in_llama_cpp_with_the_folder_that_it_was_made_of(place: Path) -> None:
    file = place / "tiny-f32.gguf"
    (place / "tiny-f32.gguf.json").write_text(json.dumps({"model": str(place / "llama")}), encoding="utf-8")
    proof = strop.prove(file, place / "rows.jsonl", task="perplexity", max_drop=0.2)
    assert isinstance(proof, Pass)
    made = proof.certificate
    assert abs(made.result.drop) < 1e-4
    assert (made.model.format, made.reference.path) == ("gguf:f32", str(place / "llama"))
    assert list(made.model.files) == ["tiny-f32.gguf"]
    assert "llama-cpp-python" in made.versions
    assert proof.path is not None
    assert proof.path == place / "tiny-f32.gguf.proof.json"
    assert check_certificate(proof.path).ok
    file.write_bytes(file.read_bytes() + b"\x00")
    assert [finding.what for finding in check_certificate(proof.path).findings] == ["changed"]


def test_a_16_bit_file_keeps_every_choice(place: Path, tmp_path: Path) -> None:
    choices = [{"question": f"say {n}", "choices": ["red", "blue", "a fox"], "answer": n % 3} for n in range(30)]
    proof = strop.prove(tiny_gguf(place, "bf16"), choices, against=place / "llama", task="choice", max_drop=0.3,
                        certificate=tmp_path / "c.json")  # fmt: skip
    assert isinstance(proof, Pass)
    assert proof.certificate.result.lost + proof.certificate.result.gained == 0
    assert 0 < proof.certificate.result.model < 1


def test_rows_that_weighted_the_columns_of_a_file_are_refused(place: Path) -> None:
    file = tiny_gguf(place, "q8_0")
    receipt = {"model": str(place / "llama"), "importance": {"data": str(place / "rows.jsonl"), "built_in": False}}
    file.with_name(f"{file.name}.json").write_text(json.dumps(receipt), encoding="utf-8")
    with pytest.raises(DataError, match=r"24 of 24 rows calibrated .*tiny-q8_0\.gguf"):
        strop.prove(file, place / "rows.jsonl", task="perplexity")
