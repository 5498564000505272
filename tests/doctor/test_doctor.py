"""The examination as a whole: nothing is changed by it, what it shows is the rows, `tune` begins with it."""

from __future__ import annotations

import doctest
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import strop
from strop.app.cli import main
from strop.data.templates import IGNORED
from strop.errors import DataError, MissingInputError
from strop.recipes import tune as tuning
from strop.recipes.checks import finding, words
from strop.recipes.checks.learning import check_learning
from strop.recipes.doctor import doctor, pieces
from strop.training.trial import trial
from tests.doctor.rows import chat_file, examined, seen_of, session_of
from tests.doctor.test_planted import collate_with
from tests.recipes.helpers import Notes, same, short, tensors
from tests.tiny import tiny_folder, tiny_tokenizer

METHODS: dict[str, dict[str, Any]] = {
    "full": {}, "lora": {"dropout": 0.3}, "qlora": {}, "qat": {"format": "int3-g32"}
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base"), "llama", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_file(tmp_path_factory.mktemp("data") / "chats.jsonl")


# --- nothing is changed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_trial_leaves_every_bit_as_it_was(base, data, method):
    session = session_of(base, data, method=method, checkpointing=True, **METHODS[method])
    session.model.train()
    session.stream.next_step()
    before = {name: value.clone() for name, value in session.model.state_dict().items()}
    place, generator = session.stream.state_dict(), torch.get_rng_state()
    check_learning(session, seen_of(session), steps=True)
    assert session.model.training
    assert session.stream.state_dict() == place
    assert torch.equal(torch.get_rng_state(), generator)
    assert same(dict(session.model.state_dict()), before)
    assert all(parameter.grad is None for parameter in session.model.parameters())


def test_a_trial_that_fails_is_undone_too(base, data):
    session = session_of(base, data)
    before = {name: value.clone() for name, value in session.model.state_dict().items()}
    place = session.stream.state_dict()

    def fails() -> None:
        with trial(session.model, session.stream, session.train_settings()) as one:
            one.take_steps([0, 1])
            assert not same(dict(session.model.state_dict()), before)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert same(dict(session.model.state_dict()), before)
    assert session.stream.state_dict() == place


def test_ctrl_c_in_a_trial_is_not_lost(base, data):
    session = session_of(base, data)
    before = {name: value.clone() for name, value in session.model.state_dict().items()}

    def pressed() -> None:
        with trial(session.model, session.stream, session.train_settings()) as one:
            one.take_steps([0])
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        pressed()
    assert same(dict(session.model.state_dict()), before)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_the_same_bits_with_and_without_the_checks(base, data, tmp_path, monkeypatch, method):
    settings = {"method": method, "packing": True, "max_length": 96, "accumulation": 2, **METHODS[method]}
    checked = short(base, data, tmp_path / "checked", **settings)
    monkeypatch.setattr(tuning, "check_start", lambda *args, **options: [])
    bare = short(base, data, tmp_path / "bare", **settings)
    assert same(tensors(checked.last_path), tensors(bare.last_path))
    assert [row["loss"] for row in checked.metrics] == [row["loss"] for row in bare.metrics]


# --- tune -------------------------------------------------------------------------------------------------------------


def test_a_run_keeps_its_findings(base, data, tmp_path):
    run = short(base, data, tmp_path / "run")
    checks = {check["name"]: check for check in run.report["checks"]}
    assert {check["level"] for check in checks.values()} == {"fine"}
    assert {"loss mask", "stop tokens", "template", "accumulation", "movement", "disk"} <= checks.keys()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["checks"] == run.report["checks"]


def test_a_run_that_would_not_learn_to_stop_is_not_begun(base, data, tmp_path, monkeypatch):
    collate_with(monkeypatch, lambda ids, labels: labels.masked_fill(ids == 4, IGNORED))
    with pytest.raises(DataError, match=r"(?s)not begun.*stop tokens: .* carries no loss"):
        short(base, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_warning_is_noted_and_the_run_goes_on(base, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    chat_file(folder / "train.jsonl", rows=8)
    chat_file(folder / "valid.jsonl", rows=3)
    notes = Notes()
    assert short(base, folder, tmp_path / "run", reporter=notes).report["finished"]
    assert notes.said("warning, valid rows: 3 of 3 rows (100%) are trained on as well")


def test_large_models_are_not_tried_at_the_start(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr("strop.recipes.doctor.QUICK_FLOPS", 1)
    names = {check["name"] for check in short(base, data, tmp_path / "run").report["checks"]}
    assert "movement" not in names
    assert {"loss mask", "template", "disk"} <= names


def test_only_the_first_rows_are_read_back_at_the_start_and_it_is_said(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr("strop.recipes.doctor.QUICK_TOKENS", 100)
    checks = {check["name"]: check for check in short(base, data, tmp_path / "run").report["checks"]}
    assert "the first 1 step of the epoch" in checks["loss mask"]["message"]
    assert checks["loss mask"]["figures"]["complete"] is False


@pytest.mark.parametrize("module", [words, finding])
def test_figures_are_written_as_their_examples_say(module):
    assert doctest.testmod(module).failed == 0


# --- what is shown ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
def test_rows_are_shown_as_they_are_collated(base, data, packing):
    found = examined(base, data, packing=packing, batch_size=1 if packing else 4)
    for row in found.rows:
        assert len(row.documents) > 1 if packing else len(row.documents) == 1
        for document in row.documents:
            learned = [piece.text for piece in document.pieces if piece.learned]
            assert all(text.endswith("<|im_end|>") for text in learned)
            assert all("<|im_start|>" not in text for text in learned)
            assert "".join(piece.text for piece in document.pieces).startswith("<|im_start|>user\nsay ")
            assert document.learned == sum(len(tiny_tokenizer()(text)["input_ids"]) for text in learned)


def test_pieces_together_are_the_text_even_where_the_mask_cuts_a_character():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a€b ü")["input_ids"]
    for cut in range(len(ids) + 1):
        made = pieces(tokenizer, ids, [place >= cut for place in range(len(ids))])
        assert "".join(piece.text for piece in made).replace("\ufffd", "").endswith("b ü"[-1])
        assert [piece.learned for piece in made] == sorted(piece.learned for piece in made)
    assert "".join(piece.text for piece in pieces(tokenizer, ids, [False, *[True] * (len(ids) - 1)])) == "a€b ü"


def test_looking_at_nothing_but_the_data_takes_no_step(base, data, monkeypatch):
    monkeypatch.setattr("strop.recipes.doctor.check_learning", None)
    found = doctor(base, data, trial=False, rows=0)
    assert not found.rows
    assert "movement" not in {one.name for one in found.findings}


# --- the command line -------------------------------------------------------------------------------------------------


def run_cli(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_the_verb_prints_rows_findings_and_a_verdict(base, data, capsys):
    assert run_cli("doctor", base, "--data", data, "--set", "dtype=float32", "--rows", 2) == 0
    printed = capsys.readouterr().out
    assert "<|im_start|>assistant\n⟦" in printed
    assert "<|im_end|>⟧" in printed
    assert "tokens are learned" in " ".join(printed.split())
    assert printed.rstrip().endswith("Ready to train: 16 checks, all fine.")


def test_a_configuration_is_all_it_takes_and_options_beat_it(base, data, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {base}\ndata: {data}\nmethod: full\ndtype: float32\n")
    assert run_cli("doctor", file, "--method", "qlora", "--packing", "--set", "rank=4", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["method"] == "qlora"
    assert {"level", "name", "message", "remedy", "figures"} == printed["findings"][0].keys()
    assert any(one["name"] == "packing" for one in printed["findings"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]


def test_a_refusal_ends_with_one_and_stands_on_top(base, data, capsys, monkeypatch):
    collate_with(monkeypatch, lambda ids, labels: torch.full_like(labels, IGNORED))
    assert run_cli("doctor", base, "--data", data) == 1
    printed = capsys.readouterr().out
    assert "none of" in printed
    assert "Not ready to train" in printed
    assert printed.index("refuse ") < printed.index("fine ")


@pytest.mark.parametrize("setting", ["rank", "=3", "rank=[1"])
def test_a_setting_without_a_value_is_misuse(base, data, capsys, setting):
    assert run_cli("doctor", base, "--data", data, "--set", setting) == 2
    assert "--set" in capsys.readouterr().err


def test_misuse_is_told_as_tune_tells_it(base, data, tmp_path):
    with pytest.raises(MissingInputError, match="no such file"):
        doctor(base, tmp_path / "none.jsonl")
    with pytest.raises(strop.errors.ConfigError, match="did you mean 'rank'"):
        doctor(base, data, rnak=3)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_stands_alone_and_escapes_what_data_say(base, tmp_path):
    rows = [
        {"messages": [
            {"role": "user", "content": f"<script>alert({row})</script>"},
            {"role": "assistant", "content": f"<b>{row}</b> &amp;"},
        ]}
        for row in range(8)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    doctor(base, tmp_path / "rows.jsonl", page=tmp_path / "page.html", packing=True, max_length=200, batch_size=2)
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "<ins>&lt;b&gt;" in text
    assert "documents, which do not see each other" in text
    assert "http://" not in text
    assert "https://" not in text
    assert str(tmp_path) not in text


def test_control_characters_in_rows_do_not_steer_the_terminal(base, tmp_path, capsys):
    rows = [
        {"messages": [{"role": "user", "content": f"\u001b[2J {row}"}, {"role": "assistant", "content": "[red]x[/]"}]}
        for row in range(4)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run_cli("doctor", base, "--data", tmp_path / "rows.jsonl", "--no-trial") == 0
    printed = capsys.readouterr().out
    assert "\u001b[2J" not in printed
    assert "[red]x[/]" in printed


def test_a_base_that_does_not_open_is_a_finding(data, tmp_path):
    base = tiny_folder(tmp_path, "llama", tokenizer=tiny_tokenizer(chat_template=False))
    found = doctor(base, data, page=tmp_path / "page.html")
    assert [one.name for one in found.findings] == ["opening"]
    assert "Not ready to train: 1 thing must be mended" in (tmp_path / "page.html").read_text()
