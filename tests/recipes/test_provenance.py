"""What trained, calibrated or chose a model is found along the whole way that it was made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import strop
from strop.data.records import read_records
from strop.errors import MissingInputError, UsageError
from strop.recipes.provenance import provenance
from strop.recipes.quantize import quantize
from strop.recipes.rows import row_digest
from tests.recipes.helpers import short
from tests.tiny import tiny_chat_file, tiny_folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base -> first (an adapter) -> further (the same adapter on other rows) -> merged -> small (calibrated)."""
    folder = tmp_path_factory.mktemp("provenance")
    tiny_folder(folder, "llama", dtype=torch.bfloat16).rename(folder / "base")
    for name in ("one", "two", "three"):
        data = tiny_chat_file(folder / f"{name}.jsonl", rows=24)
        data.write_text(data.read_text(encoding="utf-8").replace("say", name), encoding="utf-8")
    short(folder / "base", folder / "one.jsonl", folder / "first", max_steps=1)
    short(folder / "base", folder / "two.jsonl", folder / "further", max_steps=1, adapter=folder / "first")
    strop.merge(folder / "further", folder / "merged", force=True)
    quantize(folder / "merged", "int4-g32", output=folder / "small", method="search", data=str(folder / "three.jsonl"))
    return folder


def found(model: Path) -> list[tuple[str, str]]:
    return [(one.how, Path(one.name).name) for one in provenance(model).choosers]


def test_every_step_before_is_found(home: Path) -> None:
    assert found(home / "first") == [("trained", "one.jsonl")]
    assert found(home / "further") == [("trained", "two.jsonl"), ("trained", "one.jsonl")]
    steps = [("calibrated", "three.jsonl"), ("trained", "two.jsonl"), ("trained", "one.jsonl")]
    assert found(home / "small") == steps
    assert provenance(home / "small").notes == []


def test_the_nearest_model_before_is_the_reference(home: Path) -> None:
    for model, before in (("first", "base"), ("merged", "further"), ("small", "merged")):
        assert before in provenance(home / model).sources[0]


def test_rows_are_known_by_what_they_say(home: Path) -> None:
    trained, calibrated = provenance(home / "further").choosers[0], provenance(home / "small").choosers[0]
    for chooser, file, other in ((trained, "two.jsonl", "one.jsonl"), (calibrated, "three.jsonl", "two.jsonl")):
        digests = {row_digest(record) for record in read_records(home / file)}
        assert chooser.shared(digests) == digests
        assert chooser.shared({row_digest(record) for record in read_records(home / other)}) == set()


def test_a_digest_is_of_the_words_alone(home: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    marked = [turns[0], turns[1] | {"loss_weight": 0}]
    [one, other, alpaca] = (
        read_records([row])[0]
        for row in ({"messages": turns}, {"messages": marked}, {"instruction": "a", "output": "b"})
    )
    assert row_digest(one) == row_digest(other) == row_digest(alpaca)
    assert row_digest(one) != row_digest(read_records([{"messages": turns[::-1]}])[0])


def test_a_run_from_before_manifests_is_known_by_its_settings(home: Path, tmp_path: Path) -> None:
    old = shutil.copytree(home / "first", tmp_path / "old")
    (old / "manifest.json").unlink()
    assert found(old) == [("trained", "one.jsonl")]


def test_circles_end_and_what_cannot_be_read_is_told(home: Path, tmp_path: Path) -> None:
    circle = shutil.copytree(home / "base", tmp_path / "circle")
    (circle / "receipt.json").write_text(json.dumps({"source": str(circle)}), encoding="utf-8")
    assert provenance(circle).sources == []
    (circle / "receipt.json").write_text("[1]", encoding="utf-8")
    (circle / "manifest.json").write_text('{"files": {}}', encoding="utf-8")
    notes = " ".join(provenance(circle).notes)
    assert "receipt.json" in notes
    assert "manifest.json" in notes
    assert "nothing beside" in notes
    (circle / "receipt.json").write_text(json.dumps({"source": str(tmp_path / "gone")}), encoding="utf-8")
    assert "could not be looked at" in " ".join(provenance(circle).notes)


def test_a_missing_model_is_misuse(tmp_path: Path) -> None:
    for name in ("gone/model", "gone.gguf"):
        with pytest.raises(MissingInputError):
            provenance(tmp_path / name)


def test_an_export_is_followed_from_any_folder_to_the_weights_that_it_was_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_folder(tmp_path, "llama").rename(tmp_path / "model")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    strop.export("model", "m.gguf", format="gguf:q8_0", verify=False)
    assert provenance("m.gguf").sources == ["model"]
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = provenance("../m.gguf")
    assert found.sources == [str(tmp_path / "model")]
    assert not any("SHA-256" in note for note in found.notes)
    tiny_folder(tmp_path / "elsewhere", "llama", seed=7).rename(tmp_path / "elsewhere" / "model")
    assert any("model holds other weights than those that ../m.gguf was made of" in note
               for note in provenance("../m.gguf").notes)  # fmt: skip


def test_a_receipt_that_is_another_files_is_not_believed(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path, "llama")
    strop.export(model, tmp_path / "one.gguf", format="gguf:q8_0", verify=False)
    strop.export(model, tmp_path / "two.gguf", format="gguf:q4_0", verify=False)
    shutil.copy(tmp_path / "one.gguf", tmp_path / "two.gguf")
    found = provenance(tmp_path / "two.gguf")
    assert found.sources == []
    assert any("two.gguf.json is the receipt of another file" in note for note in found.notes)
    with pytest.raises(UsageError, match=r"receipt of another file .*name the reference with --against"):
        strop.prove(tmp_path / "two.gguf", [])
