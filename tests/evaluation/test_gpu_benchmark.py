"""The benchmark for GPUs where there is none: its message, its comparisons, and all cases at a tiny size on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import gpu

from strop import kernels
from strop.numerics import QuantizedTensor

pytestmark = pytest.mark.filterwarnings("ignore")  # the rivals' own


@pytest.fixture
def no_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their imports alone would take most of the time."""
    for name in ("bitsandbytes_linear", "by_peft"):
        monkeypatch.setattr(gpu, name, lambda *_, **__: None)
    monkeypatch.setattr(gpu, "bitsandbytes_nf4", lambda _: (None, None))


def test_without_a_gpu_it_ends_and_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--results", str(tmp_path / "gpu.jsonl")]) == 2
    said = capsys.readouterr()
    assert "finds no CUDA device here" in said.err
    assert "--device cpu --size tiny" in said.err
    assert not said.out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("no_rivals")
def test_every_case_runs_and_replaces_what_this_machine_said_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results" / "gpu.jsonl"
    path.parent.mkdir()
    other = json.dumps({"machine": "another", "size": "full", "case": "dequantize nf4"})
    path.write_text(f"{other}\n")
    for _ in range(2):
        assert gpu.main(["--device", "cpu", "--size", "tiny", "--results", str(path)]) == 0
    lines = path.read_text().splitlines()
    assert lines[0] == other
    found: list[dict[str, Any]] = [json.loads(line) for line in lines[1:]]
    names = [line["case"] for line in found]
    assert len(set(names)) == len(names)
    for begins in ("quantize", "dequantize", "linear nf4, 1 ", "step of lora", "step of qlora nf4", "writing int4-g32"):
        assert any(name.startswith(begins) for name in names), begins
    assert all(0 < line["ms"][0] <= line["ms"][1] <= line["ms"][2] for line in found[1:])
    assert f"all {found[0]['held']} comparisons with the reference on the CPU hold" in capsys.readouterr().out


def test_no_case_begins_when_the_time_is_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "all_checks", lambda _: [])
    monkeypatch.setattr(gpu, "step_cases", lambda *_: [])
    monkeypatch.setattr(gpu, "writing_cases", lambda *_: [])
    arguments = ["--device", "cpu", "--size", "tiny", "--minutes", "0", "--results", str(tmp_path / "gpu.jsonl")]
    assert gpu.main(arguments) == 0
    assert "| dequantize nf4 | not measured: 0 minutes are over" in capsys.readouterr().out


@pytest.mark.skipif(not kernels.in_use().runnable, reason="no native kernels: both sides are the reference")
def test_values_that_differ_from_the_reference_end_the_run_before_anything_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that makes every value a thousandth too large."""
    right = QuantizedTensor.dequantize

    def dequantize(self: QuantizedTensor, *arguments: Any, **named: Any) -> torch.Tensor:
        values = right(self, *arguments, **named)
        return values if kernels.in_use().name == "reference" else values * 1.001

    monkeypatch.setattr(QuantizedTensor, "dequantize", dequantize)
    assert gpu.main(["--device", "cpu", "--size", "tiny", "--results", str(tmp_path / "gpu.jsonl")]) == 1
    said = capsys.readouterr().out
    assert "values int4-g32 float32: off by" in said
    assert "gradient nf4 float32 32 tokens: off by 0.001" in said
    assert "nothing is timed" in said
    assert "| case |" not in said
    assert not list(tmp_path.iterdir())
