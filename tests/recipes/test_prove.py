"""`prove`: pass, fail or undecided of the very file; what may not judge is refused; nothing is written halfway."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import strop
from strop.app.cli import app
from strop.errors import DataError, MissingInputError, ModelError, UsageError
from strop.evaluation.judging import Judge, Score
from strop.recipes.certificate import read_certificate
from strop.recipes.prove_result import Fail, Pass, Undecided
from strop.recipes.quantize import quantize
from strop.recipes.tune import Run
from tests.recipes.helpers import short
from tests.tiny import tiny_chat_file, tiny_folder

ROWS = 40


def rows(count: int, *, start: int = 0) -> list[dict[str, Any]]:
    """Conversations that all ask something else."""
    return [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"it is {n}"}]}
        for n in range(start, start + count)
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base; tuned, which answers chats.jsonl by heart; other, of the same shape; rows.jsonl that no model ever saw."""
    folder = tmp_path_factory.mktemp("prove")
    tiny_folder(folder, "llama", dtype=torch.bfloat16).rename(folder / "base")
    tiny_folder(folder, "llama", dtype=torch.bfloat16, seed=1).rename(folder / "other")
    tiny_chat_file(folder / "chats.jsonl", rows=16)
    run = short(folder / "base", folder / "chats.jsonl", folder / "run", method="full", max_steps=60, valid_fraction=0,
                learning_rate=5e-3, batch_size=16)  # fmt: skip
    shutil.copytree(run.best_path, folder / "tuned")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(ROWS)), encoding="utf-8")
    quantize(folder / "tuned", "int8", output=folder / "int8")
    quantize(folder / "tuned", "int2-tensor", output=folder / "int2")
    return folder


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[int]]:
    """Scores without a model: `lost` are rows that only the reference gets right, `gained` only the model."""
    wrong: dict[str, set[int]] = {"lost": set(), "gained": set(), "looked": set()}

    def scores(self: Judge, rows: Sequence[Any], right: Sequence[int | None]) -> list[Score]:
        tokenizer, found = self.engine.require_tokenizer(), []
        for records in rows:
            number = int(tokenizer.decode(records[0][0].input_ids).split("say ")[1].split("<")[0])
            wrong["looked"].add(number)
            bad = wrong["gained"] if self.engine.source.endswith("base") else wrong["lost"]
            found.append(Score(float(number not in bad)))
        return found

    monkeypatch.setattr(Judge, "scores", scores)
    monkeypatch.setattr(Judge, "written", lambda self, record: "something else")
    return wrong


def proved(home: Path, tmp_path: Path, data: Any, **options: Any) -> Pass | Fail | Undecided:
    options = {"against": home / "base", "certificate": tmp_path / "c.json", "overwrite": True} | options
    return strop.prove(options.pop("model", home / "other"), data, **options)


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_the_file_that_keeps_its_answers_passes_and_the_one_that_lost_them_fails(home: Path, tmp_path: Path) -> None:
    """Real models: by heart in bf16 and int8, all forgotten in 2 bits; the reference is found in the receipt."""
    data = home / "chats.jsonl"
    kept = strop.prove(home / "int8", data, max_drop=0.3, certificate=tmp_path / "8.json")
    assert isinstance(kept, Pass)
    assert kept.certificate.reference.path == str(home / "tuned")
    assert (kept.certificate.result.reference, kept.certificate.result.model) == (1.0, 1.0)
    lost = strop.prove(home / "int2", data, max_drop=0.3, certificate=tmp_path / "2.json")
    assert isinstance(lost, Fail)
    result = lost.certificate.result
    assert result.rows < 16
    assert (result.drop, result.lost, result.gained) == (1.0, result.rows, 0)
    assert len(lost.certificate.flipped) == result.rows
    for flip in lost.certificate.flipped:
        assert flip.asked.startswith("say ")
        assert flip.reference == flip.expected != flip.model


@pytest.mark.parametrize(
    ("lost", "decision", "code"),
    [(set(), "pass", 0), (set(range(0, ROWS, 2)), "fail", 1), ({0, 7, 14, 21, 28}, "undecided", 3)],
    ids=["nothing", "half", "one in eight"],
)
def test_exit_codes_tell_pass_fail_and_undecided_apart(
    home: Path, tmp_path: Path, planted: dict[str, set[int]], lost: set[int], decision: str, code: int
) -> None:
    planted["lost"] = lost
    result = cli("prove", home / "other", "--data", home / "rows.jsonl", "--against", home / "base",
                 "--max-drop", 0.1, "--certificate", tmp_path / "c.json")  # fmt: skip
    assert result.exit_code == code, result.output
    assert decision.upper() in result.stdout
    assert "10.00 points" in result.stdout
    assert ("further rows would probably decide" in result.stdout) == (decision == "undecided")
    assert read_certificate(tmp_path / "c.json").result.decision == decision
    verified = cli("verify", tmp_path / "c.json")
    assert verified.exit_code == 0, verified.output


def test_it_stops_as_soon_as_it_knows_and_counts_no_row_beyond(
    home: Path, tmp_path: Path, planted: dict[str, set[int]]
) -> None:
    planted["lost"] = set(range(1000))
    proof = proved(home, tmp_path, rows(400), max_drop=0.1, batch_size=4)
    assert isinstance(proof, Fail)
    assert proof.certificate.result.rows <= len(planted["looked"]) < proof.certificate.result.rows + 4 < 40
    assert proof.certificate.outcomes == "L" * proof.certificate.result.rows
    whole = proved(home, tmp_path, rows(400), max_drop=0.1, batch_size=200)
    assert whole.certificate.rows_digest == proof.certificate.rows_digest


def test_an_undecided_proof_says_how_many_rows_would_decide(
    home: Path, tmp_path: Path, planted: dict[str, set[int]]
) -> None:
    proof = proved(home, tmp_path, rows(20), max_drop=0.05)
    assert isinstance(proof, Undecided)
    assert proof.needs is not None
    assert 30 < proof.needs < 80
    enough = proved(home, tmp_path, rows(20 + 2 * proof.needs), max_drop=0.05)
    assert isinstance(enough, Pass)
    assert any(f"about {proof.needs} further rows" in line for line in proof.lines())


def test_flipped_rows_are_listed_with_both_answers_and_bounded(
    home: Path, tmp_path: Path, planted: dict[str, set[int]]
) -> None:
    planted["lost"], planted["gained"] = set(range(0, 300, 5)), {1, 2}
    proof = proved(home, tmp_path, rows(300), max_drop=0.2)
    flipped = proof.certificate.flipped
    assert len(flipped) == 10
    assert flipped[0].kind == "lost"
    assert flipped[0].asked == f"say {flipped[0].row - 1}"
    assert (flipped[0].reference, flipped[0].model) == (f"it is {flipped[0].row - 1}", "something else")
    assert any("more rows that only one of the two gets right" in line for line in proof.lines())


def test_rows_of_one_conversation_count_as_one(home: Path, tmp_path: Path, planted: dict[str, set[int]]) -> None:
    """Twenty copies of one flipped question are one cluster: they do not make a verdict by themselves."""
    copies = [*rows(1)] * 20 + rows(20, start=1)
    planted["lost"] = {0}
    proof = proved(home, tmp_path, copies, max_drop=0.1)
    assert isinstance(proof, Undecided)
    assert (proof.certificate.result.rows, proof.certificate.result.clusters) == (40, 21)
    assert proof.certificate.result.drop == pytest.approx(1 / 21)
    named = [row | {"prompt_id": n // 10} for n, row in enumerate(rows(40))]
    planted["lost"] = set(range(5))
    proof = proved(home, tmp_path, named, max_drop=0.1)
    assert proof.certificate.result.clusters == 4
    assert sorted(proof.certificate.drops or []) == [0.0, 0.0, 0.0, 0.5]


def test_the_order_is_drawn_so_that_a_sorted_file_does_not_decide_by_its_beginning(
    home: Path, tmp_path: Path, planted: dict[str, set[int]]
) -> None:
    planted["lost"] = set(range(5))  # the first five of 300
    proof = proved(home, tmp_path, rows(300), max_drop=0.1, seed=0)
    assert isinstance(proof, Pass)
    again = proved(home, tmp_path, rows(300), max_drop=0.1, seed=1)
    assert again.certificate.rows_digest != proof.certificate.rows_digest
    assert proved(home, tmp_path, rows(300), max_drop=0.1, seed=0).certificate == proof.certificate


# --- other tasks ------------------------------------------------------------------------------------------------------


def test_perplexity_compares_nats_per_token(home: Path, tmp_path: Path) -> None:
    same = proved(home, tmp_path, home / "rows.jsonl", task="perplexity", model=home / "int8", against=home / "tuned",
                  max_drop=0.3)  # fmt: skip
    assert isinstance(same, Pass)
    assert same.certificate.unit == "nats per token"
    assert same.certificate.outcomes is None
    assert abs(same.certificate.result.drop) < 0.1
    assert same.certificate.result.drop == pytest.approx(
        same.certificate.result.reference - same.certificate.result.model, abs=1e-5
    )
    worse = proved(home, tmp_path, home / "chats.jsonl", task="perplexity", model=home / "int2", against=home / "tuned",
                   max_drop=0.3)  # fmt: skip
    assert isinstance(worse, Fail)
    assert worse.certificate.result.clipped > 0  # several nats are lost; a row counts one
    assert worse.certificate.result.drop <= 1
    assert "1 nat per token" in " ".join(worse.certificate.assumptions)


def test_choice_takes_the_likeliest(home: Path, tmp_path: Path) -> None:
    """What the tuned model has by heart is its likeliest choice, whichever way the row names it."""
    colours = ["red", "green", "blue", "brown", "black", "white", "pink", "grey"]
    data = []
    for n, colour in enumerate(colours * 2):
        choices = [f"{colours[(n + 1) % 8]} {n}", f"{colour} {n}", "no"]
        answer = [1, "B", f"{colour} {n}"][n % 3]
        data.append({"question": f"say {colour} {n}", "choices": choices, "answer": answer})
    data[0]["choices"] = {"text": data[0]["choices"], "label": ["x", "y", "z"]}
    data[0]["answer"] = "y"
    good = proved(home, tmp_path, data, task="choice", model=home / "int8", against=home / "tuned", max_drop=0.3)
    assert isinstance(good, Pass)
    assert good.certificate.result.model == 1.0
    bad = proved(home, tmp_path, data, task="choice", model=home / "other", against=home / "tuned", max_drop=0.1)
    assert bad.certificate.result.reference == 1.0
    assert bad.certificate.result.lost == len(bad.certificate.flipped) > 0
    for flip in bad.certificate.flipped:
        assert flip.reference == flip.expected != flip.model


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "q", "choices": ["a", "b"]}, "no answer"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "answer is 2"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "answer is True"),
        ({"question": "q", "choices": ["a", "a"], "answer": 0}, "all different"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "1 choices"),
        ({"question": "q", "choices": "ab", "answer": 0}, "a list of texts"),
        ({"question": "q", "choices": ["a", ""], "answer": 0}, "none of them empty"),
        ({"choices": ["a", "b"], "answer": 0}, "no question"),
        (
            {"messages": [{"role": "assistant", "content": "x"}], "choices": ["a", "b"], "answer": 0},
            "end with an answer",
        ),
    ],
    ids=["no answer", "beyond", "bool", "alike", "one", "text", "empty", "no question", "answered"],
)
def test_broken_choices_are_refused_with_their_row(home: Path, row: dict[str, Any], words: str) -> None:
    good = {"question": "q", "choices": ["a", "b"], "answer": 0}
    with pytest.raises(DataError, match=f"row 2: .*{words}"):
        strop.prove(home / "int8", [good, row], task="choice")


# --- what is refused --------------------------------------------------------------------------------------------------


def test_rows_that_trained_the_model_or_what_it_was_made_of_are_refused(home: Path, tmp_path: Path) -> None:
    for model, against in ((home / "run", None), (home / "other", home / "run")):
        with pytest.raises(DataError, match=r"16 of 16 rows trained .*run.* \(.*chats.jsonl\).*chose nothing$"):
            proved(home, tmp_path, home / "chats.jsonl", model=model, against=against)
    quantize(home / "run", "int8", output=tmp_path / "q8")
    with pytest.raises(DataError, match="trained"):
        strop.prove(tmp_path / "q8", home / "chats.jsonl", certificate=tmp_path / "c.json")
    assert not (tmp_path / "c.json").exists()


def test_a_row_that_trained_is_found_in_another_file_and_can_be_left_out(
    home: Path, tmp_path: Path, planted: dict[str, set[int]]
) -> None:
    trained = json.loads((home / "chats.jsonl").read_text(encoding="utf-8").splitlines()[3])
    data = [*rows(80), trained]
    with pytest.raises(DataError, match=r"1 of 81 rows trained .*: rows 81;.*--leave-out-seen"):
        proved(home, tmp_path, data, model=home / "run", against=home / "base")
    proof = proved(home, tmp_path, data, model=home / "run", against=home / "base", max_drop=0.05, leave_out_seen=True)
    assert isinstance(proof, Pass)
    assert proof.certificate.result.seen_before == 1
    assert "1 of 81 rows trained" in " ".join(proof.certificate.notes)
    with pytest.raises(DataError, match="no row is left"):
        proved(home, tmp_path, home / "chats.jsonl", model=home / "run", against=home / "base", leave_out_seen=True)


def test_rows_that_calibrated_are_refused_by_the_digests_in_the_receipt(
    home: Path, tmp_path: Path, planted: dict[str, set[int]]
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(30)), encoding="utf-8")
    quantize(home / "base", "int4-g32", output=tmp_path / "q4", method="search", data=str(data), max_rows=20)
    data.unlink()  # neither its name nor its bytes are needed
    with pytest.raises(DataError, match=r"20 of 30 rows calibrated .*q4"):
        strop.prove(tmp_path / "q4", rows(30))
    assert isinstance(
        strop.prove(tmp_path / "q4", rows(30, start=30), certificate=tmp_path / "c.json"), Pass | Fail | Undecided
    )


def test_training_data_that_are_gone_are_still_known_by_the_files_hash(
    home: Path, tmp_path: Path, planted: dict[str, set[int]]
) -> None:
    tiny_chat_file(tmp_path / "gone.jsonl", rows=8)
    copy = shutil.copyfile(tmp_path / "gone.jsonl", tmp_path / "copy.jsonl")
    short(home / "base", tmp_path / "gone.jsonl", tmp_path / "run", max_steps=1)
    (tmp_path / "gone.jsonl").unlink()
    with pytest.raises(DataError, match="8 of 8 rows trained"):
        strop.prove(tmp_path / "run", copy)
    proof = strop.prove(tmp_path / "run", home / "rows.jsonl", certificate=tmp_path / "c.json")
    assert "are no longer there; only the hash of the whole file was compared" in " ".join(proof.certificate.notes)


def test_a_test_split_beside_the_training_rows_may_judge(
    home: Path, tmp_path: Path, planted: dict[str, set[int]]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    tiny_chat_file(folder / "train.jsonl", rows=8)
    shutil.copyfile(home / "rows.jsonl", folder / "test.jsonl")
    short(home / "base", folder, tmp_path / "run", max_steps=1)
    proof = strop.prove(tmp_path / "run", folder, certificate=tmp_path / "c.json")
    assert proof.certificate.data.rows == ROWS
    assert not proof.certificate.notes
    assert proof.certificate.reference.name.endswith("base")  # an adapter's reference is its base


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"task": "exactmatch"}, UsageError, "did you mean 'exact-match'"),
        ({"max_drop": 0}, UsageError, "between 0 and 1"),
        ({"max_drop": 1.0}, UsageError, "between 0 and 1"),
        ({"max_drop": float("nan")}, UsageError, "between 0 and 1"),
        ({"max_rows": 0}, UsageError, "at least 1"),
        ({"against": "nowhere/at-all"}, MissingInputError, "nowhere/at-all"),
        ({"data": "nowhere.jsonl"}, MissingInputError, "nowhere.jsonl"),
        ({"model": "nowhere.gguf"}, MissingInputError, "nowhere.gguf"),
        ({"max_length": 4}, DataError, "40 do not fit 4 tokens"),
    ],
    ids=["task", "zero", "one", "nan", "rows", "against", "data", "model", "length"],
)
def test_what_cannot_be_proved_is_refused(
    home: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    data = options.pop("data", home / "rows.jsonl")
    with pytest.raises(error, match=words):
        proved(home, tmp_path, data, **options)
    assert not (tmp_path / "c.json").exists()


def test_a_model_is_not_its_own_reference(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "base", tmp_path / "copy")
    with pytest.raises(UsageError, match="the same, byte for byte"):
        proved(home, tmp_path, home / "rows.jsonl", model=tmp_path / "copy")


def test_a_model_of_unknown_origin_needs_a_reference(home: Path) -> None:
    with pytest.raises(UsageError, match="name the reference with --against"):
        strop.prove(home / "other", home / "rows.jsonl")


def test_a_reference_that_gets_nothing_right_proves_nothing(home: Path, tmp_path: Path) -> None:
    """Two broken models agree on every row: a pass would be worth nothing."""
    with pytest.raises(DataError, match="none of 40 rows right"):
        proved(home, tmp_path, home / "rows.jsonl")
    assert not (tmp_path / "c.json").exists()


def test_texts_have_no_answer_to_match(home: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--task perplexity"):
        proved(home, tmp_path, [{"text": "once upon a time"}])


def test_perplexity_needs_the_same_tokens(home: Path, tmp_path: Path) -> None:
    other = shutil.copytree(home / "other", tmp_path / "other")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        if (other / name).is_file():
            text = (other / name).read_text(encoding="utf-8")
            (other / name).write_text(
                text.replace("message['content'] +", "message['content'] + '!' +"), encoding="utf-8"
            )
    with pytest.raises(ModelError, match="different tokens"):
        proved(home, tmp_path, home / "rows.jsonl", model=other, task="perplexity")


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_certificate_lies_beside_the_model_and_is_not_replaced_unasked(
    home: Path, tmp_path: Path, planted: dict[str, set[int]]
) -> None:
    model = shutil.copytree(home / "int8", tmp_path / "int8")
    proof = strop.prove(model, home / "rows.jsonl", against=home / "base", max_drop=0.1)
    assert proof.path == tmp_path / "int8.proof.json"
    with pytest.raises(UsageError, match="proves nothing"):
        strop.prove(model, home / "rows.jsonl", against=home / "base", max_drop=0.1)
    assert strop.prove(model, home / "rows.jsonl", against=home / "base", max_drop=0.1, overwrite=True).path


@pytest.mark.parametrize("end", [KeyboardInterrupt, ModelError])
def test_a_proof_that_is_stopped_writes_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: type[BaseException]
) -> None:
    def scores(self: Judge, rows: Sequence[Any], right: Sequence[int | None]) -> list[Score]:
        raise end("now")

    monkeypatch.setattr(Judge, "scores", scores)
    result = cli("prove", home / "other", "--data", home / "rows.jsonl", "--against", home / "base",
                 "--certificate", tmp_path / "c.json")  # fmt: skip
    assert result.exit_code == (130 if end is KeyboardInterrupt else 1)
    assert list(tmp_path.iterdir()) == []


def test_json_is_the_certificate(home: Path, tmp_path: Path, planted: dict[str, set[int]]) -> None:
    result = cli("prove", home / "other", "--data", home / "rows.jsonl", "--against", home / "base",
                 "--max-drop", 0.1, "--max-rows", 12, "--certificate", tmp_path / "c.json", "--json")  # fmt: skip
    said = json.loads(result.stdout)
    assert said.pop("path") == str(tmp_path / "c.json")
    written = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert len(written.pop("certificate_sha256")) == 64
    assert said == written
    assert said["result"]["rows"] == 12


def test_a_run_proves_itself(home: Path, tmp_path: Path, planted: dict[str, set[int]]) -> None:
    proof = Run.open(home / "run").prove(rows(80), max_drop=0.05, certificate=tmp_path / "c.json")
    assert isinstance(proof, Pass)
    assert proof.certificate.reference.path == str(home / "base")
