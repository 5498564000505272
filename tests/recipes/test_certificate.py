"""Certificates: sound ones verify, every change of what they speak of is found, and broken ones are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import strop
from strop.app.cli import app
from strop.errors import FileFormatError, MissingInputError, UsageError
from strop.evaluation.judging import Judge, Score
from strop.files.folders import sha256_file
from strop.recipes import certificate as certificates
from strop.recipes.certificate import check_certificate, encoded, read_certificate
from strop.recipes.quantize import quantize
from tests.recipes.helpers import short
from tests.tiny import tiny_chat_file, tiny_folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, int8 made of it, rows, and the certificates of a proof in answers and of one in nats."""
    folder = tmp_path_factory.mktemp("certificate")
    tiny_folder(folder, "llama", dtype=torch.bfloat16).rename(folder / "base")
    tiny_chat_file(folder / "rows.jsonl", rows=24)
    quantize(folder / "base", "int8", output=folder / "int8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Judge, "scores", all_right)
        strop.prove(folder / "int8", folder / "rows.jsonl", max_drop=0.2, certificate=folder / "exact-match.json")
    strop.prove(folder / "int8", folder / "rows.jsonl", max_drop=0.2, task="perplexity",
                certificate=folder / "perplexity.json")  # fmt: skip
    return folder


def all_right(self: Judge, rows: Sequence[Any], right: Sequence[int | None]) -> list[Score]:
    return [Score(1.0) for _ in rows]


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    """A copy to change, with certificates that speak of the copy."""
    folder = shutil.copytree(made, tmp_path / "copy")
    for file in folder.glob("*.json"):
        rewritten(file, lambda content: None, moved=(str(made), str(folder)))
    return folder


def rewritten(file: Path, change: Callable[[dict[str, Any]], object], *, moved: tuple[str, str] = ("", "")) -> None:
    """Change a certificate and make its own hash right again, as somebody who forges would."""
    text = file.read_text(encoding="utf-8")
    content = json.loads(text.replace(*moved) if moved[0] else text)
    del content["certificate_sha256"]
    change(content)
    content["certificate_sha256"] = certificates._own_hash(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def found(file: Path) -> list[tuple[str, str]]:
    return [(finding.what, finding.name.rpartition("/")[2]) for finding in check_certificate(file).findings]


@pytest.mark.parametrize("task", ["exact-match", "perplexity"])
def test_a_sound_certificate_verifies(made: Path, task: str) -> None:
    result = CliRunner().invoke(app, ["verify", str(made / f"{task}.json")])
    assert result.exit_code == 0, result.output
    assert "sound" in result.stdout
    assert "its rows say: pass" in result.stdout
    said = CliRunner().invoke(app, ["verify", str(made / f"{task}.json"), "--json"])
    assert json.loads(said.stdout)["ok"] is True


def test_it_holds_the_hashes_of_what_was_proved(made: Path) -> None:
    proof = read_certificate(made / "exact-match.json")
    assert proof.model.files["model.safetensors"] == sha256_file(made / "int8" / "model.safetensors")
    assert proof.reference.files["tokenizer.json"] == sha256_file(made / "base" / "tokenizer.json")
    assert "receipt.json" not in proof.model.files
    assert proof.data.sha256 == sha256_file(made / "rows.jsonl")
    assert proof.model.format == "int8"
    assert proof.versions["torch"] == torch.__version__
    assert (made / "exact-match.json").stat().st_size < 8000


def test_the_same_proof_gives_the_same_bytes(made: Path, tmp_path: Path) -> None:
    again = strop.prove(made / "int8", made / "rows.jsonl", max_drop=0.2, task="perplexity", certificate=tmp_path / "c")
    assert again.path is not None
    assert again.path.read_bytes() == (made / "perplexity.json").read_bytes()


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        ("int8/model.safetensors", "int8: model.safetensors"),
        ("int8/chat_template.jinja", "int8: chat_template.jinja"),
        ("base/config.json", "base: config.json"),
        ("rows.jsonl", "rows.jsonl"),
    ],
)
def test_changed_and_missing_files_are_named(home: Path, file: str, wanted: str) -> None:
    proof = home / "exact-match.json"
    assert found(proof) == []
    (home / file).write_bytes((home / file).read_bytes() + b" ")
    assert found(proof) == [("changed", wanted)]
    (home / file).unlink()
    assert ("missing", wanted.partition(":")[0]) in [(what, name.partition(":")[0]) for what, name in found(proof)]
    result = CliRunner().invoke(app, ["verify", str(proof)])
    assert result.exit_code == 1
    assert "NOT to be relied on" in result.stdout


def test_a_file_that_came_along_later_is_named(home: Path) -> None:
    (home / "int8" / "generation.jinja").write_text("x", encoding="utf-8")
    assert found(home / "exact-match.json") == [("added", "int8: generation.jinja")]


def test_an_adapters_base_belongs_to_it(home: Path) -> None:
    short(home / "base", home / "rows.jsonl", home / "run", max_steps=1)
    other = tiny_chat_file(home / "other.jsonl", rows=3)
    other.write_text(other.read_text(encoding="utf-8").replace("say", "tell"), encoding="utf-8")
    proof = strop.prove(home / "run", other, task="perplexity", max_drop=0.9, certificate=home / "run.json")
    assert "base: model.safetensors" in proof.certificate.model.files
    weights = home / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert ("changed", "run: base: model.safetensors") in found(home / "run.json")


def set_at(*keys: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        place: Any = content
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_at("result", "decision", value="fail"), "it says fail"),
        (set_at("max_drop", value=0.02), "its drops say undecided"),
        (set_at("result", "drop", value=-0.5), "its drop is -0.5"),
        (set_at("result", "high", value=0.01), "its high is 0.01"),
        (set_at("result", "e_pass", value=1e9), "its e_pass is"),
        (set_at("error", value=0.5), "at an error of 0.5"),
        (lambda content: content.update(outcomes=content["outcomes"].replace("=", "L", 9)), "its drops say"),
        (set_at("outcomes", value=""), "0 drops"),
    ],
    ids=["verdict", "limit", "drop", "interval", "wealth", "error", "outcomes", "empty"],
)
def test_a_verdict_that_its_own_rows_do_not_give_is_found(
    home: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    rewritten(home / "exact-match.json", change)
    findings = check_certificate(home / "exact-match.json").findings
    assert any(finding.name == "verdict" and words in finding.text for finding in findings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_at("format", value=2), "this version reads 1"),
        (set_at("kind", value="run"), "no certificate"),
        (set_at("task", value="glue"), "task"),
        (set_at("max_drop", value="0.01"), "max_drop"),
        (set_at("max_drop", value=1.5), "max_drop"),
        (set_at("result", "rows", value=1.5), "result.rows"),
        (set_at("outcomes", value="L=?"), "needs outcomes"),
        (set_at("drops", value=[0.0]), "needs outcomes"),
        (set_at("more", value=1), "more"),
        (lambda content: content.pop("result"), "result"),
        (lambda content: content.update(outcomes=None, drops=[0.5, 1.5]), "outside -1 to 1"),
    ],
    ids=["format", "kind", "task", "text", "range", "fraction", "letters", "both", "extra", "missing", "bounds"],
)
def test_malformed_certificates_are_refused(home: Path, change: Callable[[dict[str, Any]], object], words: str) -> None:
    rewritten(home / "exact-match.json", change)
    with pytest.raises(FileFormatError, match=words):
        read_certificate(home / "exact-match.json")
    assert not check_certificate(home / "exact-match.json").ok


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b'{"kind": "proof"}'], ids=repr
)
def test_what_is_no_json_or_no_certificate_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"c\.json"):
        read_certificate(tmp_path / "c.json")
    assert CliRunner().invoke(app, ["verify", str(tmp_path / "c.json")]).exit_code == 1


def test_every_changed_byte_is_found(made: Path, tmp_path: Path) -> None:
    """One letter after another: either it is no certificate any more, or its own hash tells."""
    text = (made / "exact-match.json").read_text(encoding="utf-8")
    file = tmp_path / "c.json"
    for place in range(0, len(text), 41):
        if text[place].isspace():
            continue
        file.write_text(text[:place] + ("0" if text[place] != "0" else "1") + text[place + 1 :], encoding="utf-8")
        with pytest.raises(FileFormatError):
            read_certificate(file)


def test_a_huge_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "MOST_BYTES", 10)
    (tmp_path / "c.json").write_text("{" + " " * 20 + "}", encoding="utf-8")
    with pytest.raises(FileFormatError, match="more than any certificate has"):
        read_certificate(tmp_path / "c.json")


def test_a_missing_certificate_is_misuse(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no such file"):
        check_certificate(tmp_path / "none.json")


def test_a_model_in_its_place_is_told_where_its_certificate_is(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is a model; name the certificate of its proof \(.*m\.gguf\.proof\.json\)"):
        check_certificate(tmp_path / "m.gguf")


def test_answers_take_a_letter_a_row_and_fractions_numbers() -> None:
    assert encoded([1.0, 0.0, -1.0]) == {"outcomes": "L=G", "drops": None}
    assert encoded([1.0, 0.5]) == {"outcomes": None, "drops": [1.0, 0.5]}
