"""Bench: figures with their spread, weights counted as a token reads them, shares that are what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import strop
from strop import kernels
from strop.app.cli import app
from strop.errors import MissingInputError, UsageError
from strop.evaluation.engines import open_engine
from strop.evaluation.probes import PRODUCT_DTYPES, memory_rates, product_rates, spread
from strop.evaluation.weights_read import count_weights
from strop.recipes.bench import Bench, bench
from tests.runtime.files import tiny_gguf
from tests.tiny import tiny_folder

QUICK = 0.01


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return bench(tiny_folder(tmp_path_factory.mktemp("bench"), "llama", tied=False), seconds=QUICK)


def test_the_machine_is_told_with_its_spread(measured: Bench) -> None:
    assert tuple(measured.products) == PRODUCT_DTYPES
    for found in (measured.read, measured.copy, *measured.products.values()):
        assert 0 < found.slowest <= found.lower <= found.median <= found.upper <= found.fastest
        assert found.runs >= 5
    assert (measured.read.unit, measured.products["int8"].unit) == ("bytes", "operations")
    assert measured.kernels == kernels.in_use()
    assert [len(row) for row in measured.rows()] == [len(measured.HEADERS)] * 5


def test_shares_are_rates_over_the_limits_that_were_probed(measured: Bench) -> None:
    model = measured.model
    assert model is not None
    held = model.speed.prefill.tokens + model.speed.decode.tokens / 2
    read = model.weights.read_bytes + held * 2 * 2 * 2 * 16 * 4  # both, layers, heads, size, float32
    assert model.write_limit == pytest.approx(model.read.median / read)
    assert model.write_share == pytest.approx(model.speed.decode.median * read / model.read.median)
    assert model.product == "float32"
    operations = 2 * 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)  # two layers: q and o, k and v, three of 128
    assert model.read_limit == pytest.approx(measured.products["float32"].median / operations)
    assert [len(row) for row in model.rows()] == [len(model.HEADERS)] * 2


def test_the_result_is_json_with_units_in_its_names(measured: Bench) -> None:
    found = json.loads(json.dumps(measured.to_dict(), allow_nan=False))
    assert found["read"]["unit"] == "bytes"
    assert measured.model is not None
    assert found["model"]["write_share"] == measured.model.write_share
    assert found["kernels"]["name"] == kernels.in_use().name
    assert {"load_seconds", "peak_bytes", "cache_bytes_per_token"} <= set(found["model"])


def test_a_reference_that_is_in_use_says_why() -> None:
    with kernels.forced("reference"):
        found = bench(seconds=QUICK)
    assert found.model is None
    assert "kernels: reference (asked for)" in found.lines()


@pytest.mark.parametrize("tied", [False, True])
def test_a_token_reads_every_weight_once_but_one_row_of_the_embedding(tmp_path: Path, tied: bool) -> None:
    engine = open_engine(tiny_folder(tmp_path, "llama", tied=tied))
    network = engine.network
    assert network is not None
    whole = sum(parameter.nbytes for parameter in network.parameters())
    buffers = sum(buffer.nbytes for buffer in network.buffers())
    counted = count_weights(engine)
    assert counted.held_bytes == whole + buffers
    table = network.get_input_embeddings().get_parameter("weight")
    assert counted.read_bytes == counted.held_bytes - (0 if tied else table.nbytes - table[0].nbytes)


def test_of_experts_those_count_that_work_on_a_token(tmp_path: Path) -> None:
    engine = open_engine(tiny_folder(tmp_path, "mixtral", tied=True))
    network = engine.network
    assert network is not None
    experts = sum(parameter.nbytes for name, parameter in network.named_parameters() if "experts" in name)
    assert experts
    counted = count_weights(engine)
    assert counted.held_bytes - counted.read_bytes == experts // 2  # 2 of 4
    attention_and_router = 2 * (64 * 64 * 2 + 64 * 32 * 2)
    assert counted.multiplied == pytest.approx(attention_and_router + experts // 4 // 2, abs=2 * 4 * 64)


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_a_file_is_counted_as_its_folder_is(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    file = tiny_gguf(tmp_path, kind)
    folder, counted = count_weights(open_engine(tmp_path / "llama")), count_weights(open_engine(file))
    assert counted.multiplied == folder.multiplied
    if kind == "f32":
        assert counted.read_bytes == pytest.approx(folder.read_bytes, rel=0.01)  # rotary tables are not in the file
    else:
        assert 0.25 < counted.read_bytes / folder.read_bytes < 0.35
    found = bench(file, seconds=QUICK).model
    assert found is not None
    assert (found.runtime, found.format) == ("llama.cpp", f"gguf:{kind}")
    assert found.write_share > 0
    assert found.peak_bytes > 0


def test_rates_are_those_of_each_run() -> None:
    found = spread([4.0, 1.0, 2.0, 3.0, 10.0], "bytes")
    assert (found.slowest, found.lower, found.median, found.upper, found.fastest) == (1, 2, 3, 4, 10)
    assert len(memory_rates("copy", size_bytes=1 << 16, seconds=1e-9)) == 5
    assert len(product_rates("int8", size=32, seconds=1e-9)) == 5


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="seconds is 0; needed a number above 0"):
        bench(seconds=0)
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match=r"device 'cuda'.*there is cpu"):
            bench(device="cuda", seconds=QUICK)
    with pytest.raises(MissingInputError):
        strop.bench(tmp_path / "nothing", seconds=QUICK)


def test_the_command_line_prints_tables_or_json(tmp_path: Path) -> None:
    folder = str(tiny_folder(tmp_path, "gpt2"))
    shown = CliRunner().invoke(app, ["bench", folder, "--seconds", "0.01"])
    assert shown.exit_code == 0, shown.output
    for text in ("memory read", "GB/s", "int8 product", "GOP/s", "kernels: ", "peak memory", "tokens/s", "write"):
        assert text in shown.stdout
    printed = CliRunner().invoke(app, ["bench", "--seconds", "0.01", "--json"])
    assert json.loads(printed.stdout)["model"] is None
