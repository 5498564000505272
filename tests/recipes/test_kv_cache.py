"""`--kv-cache` in compare, chat and predict, as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from strop.app.cli import app
from strop.errors import UsageError
from strop.evaluation.comparison import Comparison
from strop.recipes.compare import compare
from strop.recipes.generate import kv_cache_line, predict
from tests.tiny import tiny_chat_file, tiny_folder


def rows(path: Path) -> Path:
    """Questions longer than what the 4-bit cache leaves unrounded."""
    data = tiny_chat_file(path)
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for line in lines:
        line["messages"][0]["content"] = (
            "wake me up on weekdays and set the alarm " * 3 + line["messages"][0]["content"]
        )
    data.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return data


def test_compare_rounds_the_cache_of_all_but_the_first(tmp_path: Path) -> None:
    folder, data = str(tiny_folder(tmp_path, "llama")), str(rows(tmp_path / "rows.jsonl"))
    found: dict[str, Comparison] = {
        kind: compare([folder], data, kv_cache=kind, speed=False) for kind in ("int8", "int4")
    }
    for kind, comparison in found.items():
        first, second = comparison.models
        assert (first.format, second.format) == ("float32", f"float32 + kv {kind}")
        assert second.kl is not None
        assert second.kl.estimate > 0
        assert comparison.headers()[4] == "KV bytes/token"
    eight, four = (found[kind].models[1] for kind in ("int8", "int4"))
    assert eight.kl is not None
    assert four.kl is not None
    assert eight.kl.estimate < 0.1 * four.kl.estimate
    assert [model.kv_bytes_per_token for model in (*found["int8"].models, four)] == [512, 160, 88]
    assert [row[4] for row in found["int4"].rows()] == ["512", "88"]
    assert found["int8"].to_dict()["models"][1]["kv_bytes_per_token"] == 160
    plain = compare([folder, folder], data, speed=False)
    assert "KV bytes/token" not in plain.headers()
    assert plain.models[1].kl is not None
    assert plain.models[1].kl.estimate == 0


def test_predict_answers_with_a_rounded_cache(tmp_path: Path) -> None:
    folder, data = tiny_folder(tmp_path, "llama"), str(rows(tmp_path / "rows.jsonl"))
    told = {}
    for kind in (None, "int8", "int4"):
        path = predict(folder, data, tmp_path / f"{kind}.jsonl", kv_cache=kind, max_new_tokens=24)
        told[kind] = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    assert len(told["int8"]) == len(told[None]) == 8
    assert sum(one == other for one, other in zip(told[None], told["int8"], strict=True)) >= 4
    assert told["int4"] != told[None]


def test_a_wrong_name_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    for attempt in (
        lambda: compare(["nowhere"], "nothing", kv_cache="int3"),
        lambda: predict("nowhere", "nothing", tmp_path / "out", kv_cache="int3"),
        lambda: kv_cache_line("int3"),
    ):
        with pytest.raises(UsageError, match=r"int3.*there are int8 and int4"):
            attempt()


def test_chat_tells_the_bytes_of_a_token(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama")
    asked = ["chat", str(folder), "--prompt", "hello", "--max-new-tokens", "4", "--kv-cache", "int4"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert "88 bytes a token past the last 32 to 63, 512 in full precision" in " ".join(result.stderr.split())
    wrong = CliRunner().invoke(app, [*asked[:-1], "int5"])
    assert wrong.exit_code == 2
