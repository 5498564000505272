"""`tune --method auto`: rounding first, training only where the gate asks for it, each way's cost and gain told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import strop
from strop.app.cli import app
from strop.config import AutoConfig, load_auto, load_config
from strop.errors import ConfigError, DataError, FormatError, MissingInputError, UsageError
from strop.files.gguf.reader import GgufFile
from strop.recipes import auto, auto_ways
from strop.recipes.auto_result import AutoRun
from strop.recipes.auto_ways import plan_ways
from strop.recipes.verify import verify
from tests.recipes.helpers import Killed, Notes, same, short, tensors
from tests.tiny import tiny_chat_file, tiny_folder

GRID = "int3-tensor"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base; run, which answers the rows by heart; half, which is still learning them; data, rows to train and gate."""
    folder = tmp_path_factory.mktemp("auto")
    tiny_folder(folder, "llama", dtype=torch.bfloat16).rename(folder / "base")
    (folder / "data").mkdir()
    tiny_chat_file(folder / "data" / "train.jsonl", rows=16)
    tiny_chat_file(folder / "data" / "valid.jsonl", rows=12)
    for name, steps in (("run", 60), ("half", 20)):
        short(folder / "base", folder / "data" / "train.jsonl", folder / name, method="full", max_steps=steps,
              valid_fraction=0, learning_rate=5e-3, batch_size=16)  # fmt: skip
    return folder


@pytest.fixture(autouse=True)
def few_scale_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_ways, "SCALE_STEPS", 3)


def chosen(home: Path, output: Path, **settings: Any) -> AutoRun:
    """One step of training at a rate that changes nothing, unless it is said otherwise."""
    defaults: dict[str, Any] = {"format": GRID, "max_steps": 1, "learning_rate": 1e-9, "batch_size": 16}
    defaults |= {"dtype": "float32", "output": output}
    model = settings.pop("model", home / "run")
    data = settings.pop("data", home / "data")
    return strop.tune(model, data, method="auto", **(defaults | settings))


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that quantize and tune were asked for, in order; both do their work."""
    names: list[str] = []

    def remembering(real: Callable[..., Any], where: Callable[..., str]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            names.append(Path(where(*arguments, **options)).name)
            return real(*arguments, **options)

        return call

    monkeypatch.setattr(auto, "quantize", remembering(auto.quantize, lambda *_, output, **__: output))
    monkeypatch.setattr(auto, "tune_from_config", remembering(auto.tune_from_config, lambda config, **_: config.output))
    return names


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_a_gate_that_rounding_meets_trains_nothing(home: Path, tmp_path: Path, made: list[str]) -> None:
    run = chosen(home, tmp_path / "out", format="gguf:q4_0", max_drop=0.05)
    assert (run.met, run.exit_code, made) == (True, 0, ["1-search"])
    assert [(row[3], row[-1]) for row in run.rows()][1:] == [("not needed", "-")] * 4
    assert (run.rows()[0][0], run.rows()[0][-1]) == ("1-search", "yes")
    first = run.report["ways"][0]
    assert (first["drop"]["estimate"], first["drop"]["rows"]) == (0.0, 12)
    assert first["seconds"] > 0
    assert run.report["task"] == "exact-match"
    assert run.report["reference"]["score"]["estimate"] == 1.0
    assert same(tensors(tmp_path / "out" / "best"), tensors(tmp_path / "out" / "1-search"))
    opened = strop.load(tmp_path / "out")
    assert opened.scheme is not None
    assert opened.scheme.name == "int4-g32-full"
    run.export(tmp_path / "m.gguf", verify=False)
    assert GgufFile.open(tmp_path / "m.gguf").tensors["blk.1.ffn_up.weight"].type == "q4_0"
    assert any(line.startswith("taken: 1-search") for line in run.lines())
    assert run.next_command() == f"strop prove {tmp_path / 'out'} --data TEST.jsonl --max-drop 0.05"


def test_a_gate_that_only_training_meets_goes_on_and_says_what_each_cost_and_gained(
    home: Path, tmp_path: Path, made: list[str]
) -> None:
    """The model still learns, so that training through the rounding ends below its loss, and rounding cannot."""
    run = chosen(home, tmp_path / "out", model=home / "half", task="perplexity", max_drop=1e-4, max_steps=30,
                 learning_rate=5e-3)  # fmt: skip
    assert run.met
    assert made[:2] == ["1-search", "2-gptq"]
    assert made[2:] == ["3-scales", "4-qat-lora", "5-qat"][: len(made) - 2]
    assert len(made) > 2
    done = run.report["ways"][: len(made)]
    assert [way["met"] for way in done] == [*[False] * (len(done) - 1), True]
    for way in done:
        assert way["seconds"] > 0
        assert way["peak_bytes"] > 0
        assert way["kl"]["estimate"] > 0
        assert way["drop"]["low"] <= way["drop"]["estimate"] <= way["drop"]["high"]
    best = min(way["drop"]["estimate"] for way in done[:-1])
    assert done[-1]["gained"] == pytest.approx(best - done[-1]["drop"]["estimate"])
    assert done[-1]["drop"]["estimate"] <= 1e-4 < best
    assert run.report["taken"] == done[-1]["folder"]
    assert same(tensors(run.best_path), tensors(tmp_path / "out" / done[-1]["model"]))
    assert json.loads((tmp_path / "out" / "auto.json").read_text()) == run.report


def test_where_nothing_meets_the_best_so_far_is_kept_and_the_exit_says_so(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = cli("tune", home / "run", "--data", home / "data", "--method", "auto", "--format", GRID, "--task",
                 "perplexity", "--max-drop", 1e-9, "--max-steps", 1, "--lr", 1e-9, "--dtype", "float32",
                 "--output", out)  # fmt: skip
    assert result.exit_code == 1, result.output
    assert "no way keeps within" in result.stdout
    assert "--max-drop" in result.stdout
    run = AutoRun.open(out)
    assert (run.met, run.report["taken"]) == (False, None)
    drops = {way["model"]: way["drop"]["estimate"] for way in run.report["ways"]}
    assert len(drops) == 5
    assert run.report["best"] == min(drops, key=lambda model: drops[model])
    assert same(tensors(run.best_path), tensors(out / run.report["best"]))
    assert [row[-1] for row in run.rows()] == ["no"] * 5
    assert strop.load(out).scheme is not None
    assert verify(out).intact


def test_a_way_that_fails_is_told_and_the_others_go_on(home: Path, tmp_path: Path, made: list[str]) -> None:
    """Two rows are too few to calibrate with; what begins from the best codes begins from those of the search."""
    rows = tmp_path / "rows"
    rows.mkdir()
    lines = (home / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    (rows / "train.jsonl").write_text("".join(lines[:2]))
    (rows / "valid.jsonl").write_text("".join(lines[8:]))
    run = chosen(home, tmp_path / "out", data=rows, task="perplexity", max_drop=1e-9)
    assert made == ["1-search", "2-gptq", "3-scales", "4-qat-lora", "5-qat"]
    assert run.rows()[1][3] == "failed"
    assert any(line.startswith("2-gptq: failed: ") and "at least 64 are needed" in line for line in run.lines())
    assert load_config(tmp_path / "out" / "3-scales" / "config.yaml").flat()["start"] == str(
        tmp_path / "out" / "1-search"
    )
    resumed = chosen(home, tmp_path / "out", data=rows, task="perplexity", max_drop=1e-9, resume=True)
    assert resumed.report == run.report


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_that_gated_are_refused_by_prove_and_others_are_not(home: Path, tmp_path: Path) -> None:
    """The model itself was trained on other rows here, so that the choice alone can have seen these."""
    rows = tmp_path / "rows"
    rows.mkdir()
    tiny_chat_file(rows / "test.jsonl", rows=2)
    lines = (home / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    (rows / "train.jsonl").write_text("".join(lines[:8]))
    (rows / "valid.jsonl").write_text("".join(lines[8:]))
    shutil.copytree(home / "run" / "last", tmp_path / "model")  # without the run's account of its own rows
    run = chosen(home, tmp_path / "out", model=tmp_path / "model", data=rows, format="int8", max_drop=0.2)
    assert run.report["taken"] == "1-search"
    assert f"--data {rows} " in run.next_command()
    for place in (tmp_path / "out", tmp_path / "out" / "1-search"):
        with pytest.raises(DataError, match=r"8 of 8 rows chose .*gate\.jsonl"):
            strop.prove(place, rows / "valid.jsonl", max_drop=0.2, certificate=tmp_path / "c.json")
    proof = run.prove(rows / "train.jsonl", certificate=tmp_path / "c.json")
    assert proof.certificate.reference.path == str(tmp_path / "model")
    assert (proof.certificate.max_drop, proof.certificate.task) == (0.2, "exact-match")


def test_texts_are_judged_by_perplexity(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(
        "".join(json.dumps({"text": f"the quick brown fox jumps over {n} lazy dogs"}) + "\n" for n in range(40))
    )
    run = chosen(
        home, tmp_path / "out", model=home / "base", data=file, format="int8", max_drop=0.5, valid_fraction=0.25
    )
    assert run.report["task"] == "perplexity"
    assert run.report["reference"]["score"] is None
    assert run.headers()[3] == "nats lost"
    with pytest.raises(DataError, match=r"holds no answer to match.*--task perplexity"):
        chosen(home, tmp_path / "other", data=file, task="exact-match", valid_fraction=0.25)


# --- going on ---------------------------------------------------------------------------------------------------------


def test_finished_ways_are_not_done_again_when_a_killed_choice_is_resumed(
    home: Path, tmp_path: Path, made: list[str]
) -> None:
    settings: dict[str, Any] = {"task": "perplexity", "max_drop": 1e-9, "max_steps": 4, "save_steps": 1}
    whole = chosen(home, tmp_path / "whole", **settings)
    made.clear()

    def interrupt(_: int) -> None:
        if made[-1:] == ["2-gptq"]:
            raise KeyboardInterrupt

    listener = Notes(interrupt)
    with pytest.raises(KeyboardInterrupt):
        chosen(home, tmp_path / "out", reporter=listener, **settings)
    assert listener.said("--resume goes on at the unfinished way")
    assert made == ["1-search", "2-gptq"]
    made.clear()

    def kill(_: int) -> None:
        if made[-1:] == ["4-qat-lora"] and (tmp_path / "out" / "4-qat-lora" / "checkpoints" / "step-000002").is_dir():
            raise Killed

    with pytest.raises(Killed):
        chosen(home, tmp_path / "out", reporter=Notes(kill), resume=True, **settings)
    assert made == ["2-gptq", "3-scales", "4-qat-lora"]
    before = json.loads((tmp_path / "out" / "auto.json").read_text())
    assert (before["finished"], before["ways"][3]["model"]) == (False, None)
    made.clear()
    run = chosen(home, tmp_path / "out", resume=True, **settings)
    assert made == ["4-qat-lora", "5-qat"]
    assert [way["drop"] for way in run.report["ways"]] == [way["drop"] for way in whole.report["ways"]]
    assert run.report["ways"][:3] == before["ways"][:3]
    assert run.report["ways"][3]["seconds"] > before["ways"][3]["seconds"]
    made.clear()
    again = chosen(home, tmp_path / "out", resume=True, **settings)
    assert (again.report, made) == (run.report, [])


def test_a_choice_is_resumed_from_its_own_configuration_and_only_as_it_was(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    chosen(home, out, format="int8", max_drop=0.05)
    result = cli("tune", out / "config.yaml", "-o", out, "--resume")
    assert result.exit_code == 0, result.output
    with pytest.raises(ConfigError, match=r"max_drop was 0\.05 and is 0\.2"):
        chosen(home, out, format="int8", max_drop=0.2, resume=True)
    with pytest.raises(UsageError, match="already holds files"):
        chosen(home, out, format="int8", max_drop=0.05)
    with pytest.raises(MissingInputError, match="no choice of --method auto to resume"):
        chosen(home, tmp_path / "none", resume=True)
    valid = home / "data" / "valid.jsonl"
    kept = valid.read_text()
    try:
        valid.write_text("".join(kept.splitlines(keepends=True)[:-1]))
        with pytest.raises(UsageError, match="its validation rows changed"):
            chosen(home, out, format="int8", max_drop=0.05, resume=True)
    finally:
        valid.write_text(kept)


# --- ways and settings ------------------------------------------------------------------------------------------------


def config(**settings: Any) -> AutoConfig:
    found = load_auto(None, {"model": "m", "data": "d.jsonl", "method": "auto", "format": GRID} | settings)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("format", "names", "passed_over"),
    [
        ("gguf:q4_0", ["search", "gptq", "scales", "qat-lora", "qat"], set()),
        ("int2-g32", ["search", "blockwise", "scales", "qat-lora", "qat"], set()),
        ("mxfp4", ["search", "gptq", "scales", "qat-lora", "qat"], {"scales"}),
        ("int8-a8", ["search", "gptq", "scales", "qat-lora", "qat"], {"scales", "qat-lora", "qat"}),
        ("nf4-dq", ["search", "gptq", "scales", "qat-lora", "qat"], {"scales"}),
    ],
)
def test_the_ways_are_those_that_the_format_allows(format: str, names: list[str], passed_over: set[str]) -> None:
    ways = plan_ways(config(format=format))
    assert [way.name for way in ways] == names
    assert {way.name for way in ways if way.passed_over} == passed_over
    for way in ways:
        assert (way.passed_over is None) or format in way.line()


def test_a_rate_is_that_of_whole_weights_and_an_adapter_takes_ten_times_it() -> None:
    given = config(learning_rate=1e-4, rank=4, max_steps=7)
    rates = {way.name: way.run(given, output="o", start="s", resume=False) for way in plan_ways(given) if way.trains}
    assert {name: run.optimization.learning_rate for name, run in rates.items()} == pytest.approx(
        {"scales": 1e-4, "qat-lora": 1e-3, "qat": 1e-4}
    )
    assert rates["qat-lora"].flat()["alpha"] == 8.0
    assert {run.flat()["max_steps"] for run in rates.values()} == {7}
    assert [rates[name].flat().get("start") for name in ("scales", "qat-lora", "qat")] == ["s", None, "s"]


def test_a_dry_run_prints_the_settings_and_the_ways_and_the_settings_read_back(tmp_path: Path) -> None:
    result = cli("tune", "m", "--data", "d.jsonl", "--method", "auto", "--format", "mxfp4", "--dry-run")
    assert result.exit_code == 0, result.output
    (tmp_path / "config.yaml").write_text(result.stdout)
    assert load_auto(tmp_path / "config.yaml") == config(format="mxfp4")
    assert "# 3-scales: " in result.stdout
    assert "passed over: the scales of mxfp4 are codes themselves" in result.stdout


def test_all_wrong_settings_are_told_at_once() -> None:
    result = cli("tune", "m", "--data", "d", "--method", "auto", "--max-drop", 3, "--task", "choice", "--hold", "int8")
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    for words in (
        "4 settings are wrong",
        "format: missing",
        "max_drop: got 3.0",
        "task: got 'choice'",
        "hold: a setting",
    ):
        assert words in said
    with pytest.raises(ConfigError, match="max_drop: a setting of auto, and the method is qat"):
        strop.tune("m", "d", method="qat", format=GRID, max_drop=0.1)
    with pytest.raises(ConfigError, match=r"stage 1 .*method: auto is a choice among several runs"):
        strop.tune_stages({"model": "m", "stages": [{"data": "d", "method": "auto", "format": GRID}]})


@pytest.mark.parametrize("drop", [0, 1, -0.1])
def test_a_drop_out_of_range_is_refused(drop: float) -> None:
    with pytest.raises(ConfigError, match="max_drop"):
        config(max_drop=drop)


def test_what_cannot_be_quantized_is_refused_before_anything_is_written(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    short(home / "base", home / "data", tmp_path / "adapter", method="lora", max_steps=1)
    with pytest.raises(UsageError, match="is an adapter; merge it first"):
        chosen(home, out, model=tmp_path / "adapter")
    strop.quantize(home / "base", "int8", output=tmp_path / "quantized")
    with pytest.raises(FormatError, match="is quantized already"):
        chosen(home, out, model=tmp_path / "quantized")
    with pytest.raises(FormatError, match="q4_k: is a grid of GGUF files, which no model folder holds"):
        chosen(home, out, format="gguf:q4_k")
    with pytest.raises(FormatError, match="do not fit int4-g24"):
        chosen(home, out, format="int4-g24")
    with pytest.raises(DataError, match=r"1 rows to choose by, and at least 6 are needed"):
        chosen(home, out, data=home / "data" / "train.jsonl")
    with pytest.raises(DataError, match=r"0 rows to choose by"):
        chosen(home, out, data=home / "data" / "train.jsonl", valid_fraction=0)
    assert not out.exists()


def test_a_model_that_answers_nothing_can_lose_nothing_and_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="answers none of 12 validation rows exactly"):
        chosen(home, tmp_path / "out", model=home / "base")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    assert chosen(home, tmp_path / "out", format="int8", max_drop=0.05).met
