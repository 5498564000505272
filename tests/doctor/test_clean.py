"""Runs in which nothing is wrong: every check is made, and none raises an alarm."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from strop.config import TuneConfig
from strop.recipes.doctor import examine
from tests.data.chats import CHATML, LLAMA3, MARKED, MARKED_WIDE, THINKING, TRIMMING
from tests.doctor.rows import chat_file
from tests.tiny import tiny_folder, tiny_tokenizer

FAMILIES = ("llama", "qwen3", "gemma", "gpt2", "mixtral")
METHODS = ("full", "lora", "qlora", "qat")
TEMPLATES = {"chatml": CHATML, "marked": MARKED, "wide": MARKED_WIDE, "llama3": LLAMA3, "thinking": THINKING}
TEMPLATES |= {"trimming": TRIMMING, "plain": "plain"}

# Families times methods, and over them the other choices in turn, so that every one meets every other often.
CASES = [
    (family, method, template, packing, batch, accumulation)
    for (family, method), template, (packing, batch, accumulation), _ in zip(
        itertools.cycle(itertools.product(FAMILIES, METHODS)),
        itertools.cycle(TEMPLATES),
        itertools.cycle([(False, 4, 1), (True, 2, 2), (False, 1, 4)]),
        range(52),
        strict=False,
    )
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: tiny_folder(folder, family, dtype=torch.bfloat16) for family in FAMILIES}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_file(tmp_path_factory.mktemp("data") / "chats.jsonl", rows=24)


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, result = tmp_path_factory.mktemp("templates"), {}
    for name, text in TEMPLATES.items():
        (folder / f"{name}.jinja").write_text(text)
        result[name] = name if text == "plain" else str(folder / f"{name}.jinja")
    return result


def allowed(family: str, method: str) -> set[str]:
    """An adapter or a grid that leaves experts as they are is true of a mixture, and said."""
    return {"coverage"} if family == "mixtral" and method != "full" else set()


@pytest.mark.parametrize(
    ("family", "method", "template", "packing", "batch", "accumulation"),
    CASES,
    ids=["-".join(map(str, case)) for case in CASES],
)
def test_a_clean_run_raises_no_alarm(
    bases, data, templates, tmp_path, family, method, template, packing, batch, accumulation
):
    settings: dict[str, Any] = {"format": "nf4" if family == "gpt2" else "int4-g32"} if method == "qat" else {}
    config = TuneConfig.from_flat(
        {
            "model": bases[family], "data": data, "output": tmp_path / "run", "method": method, "max_length": 200,
            "packing": packing, "batch_size": batch, "accumulation": accumulation, "dtype": "float32",
            "chat_template": templates[template], **settings,
        }
    )  # fmt: skip
    found = examine(config)
    alarms = [one for one in found.findings if one.level != "fine" and one.name not in allowed(family, method)]
    assert not alarms
    made = {"loss mask", "stop tokens", "BOS", "padding", "template", "accumulation", "movement", "updates", "memory"}
    made |= {"time", "coverage", "truncation", "rows", "duplicates", "valid rows", "disk"} | ({"packing"} & {packing})
    assert made <= {one.name for one in found.findings}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_bfloat16_products_raise_no_alarm(bases, data, tmp_path, method):
    config = TuneConfig.from_flat(
        {"model": bases["llama"], "data": data, "method": method, "dtype": "bfloat16", "output": tmp_path / "run"}
    )
    assert not [one for one in examine(config).findings if one.level != "fine"]


def test_a_padding_token_that_is_the_end_token_is_fine_and_said(data, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = "<|im_end|>"
    base = tiny_folder(tmp_path, "llama", tokenizer=tokenizer)
    found = examine(TuneConfig.from_flat({"model": base, "data": data, "output": tmp_path / "run"}))
    stops = next(one for one in found.findings if one.name == "stop tokens")
    assert stops.level == "fine"
    assert "padding token too" in stops.message
