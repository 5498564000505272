"""Short runs of `tune` in a folder, for the tests of recipes: a reporter that remembers, and the tensors written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from strop.files.shards import iter_tensors
from strop.recipes.tune import Run, tune

METHODS = {"full": {}, "lora": {}, "qlora": {}, "qat": {"format": "int3-g32"}}


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


class Notes:
    """A reporter that remembers what it was told, and calls `at_step` after each step."""

    def __init__(self, at_step: Any = None) -> None:
        self.notes: list[str] = []
        self.steps: list[int] = []
        self._at_step = at_step

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start(self, title: str, total: float | None, unit: str) -> None:
        pass

    def advance(self, done: float, **fields: float | int | str) -> None:
        self.steps.append(int(done))
        if self._at_step is not None:
            self._at_step(int(done))

    def finish(self) -> None:
        pass

    def said(self, part: str) -> bool:
        return any(part in note for note in self.notes)


def short(base: Path, data: Path, output: Path, **settings: Any) -> Run:
    defaults = {"dtype": "float32", "batch_size": 4}
    length = {} if settings.keys() & {"epochs", "minutes"} else {"max_steps": 3}
    return tune(base, data, output=output, **(defaults | length | settings))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / "adapter_model.safetensors").is_file():
        return dict(iter_tensors(folder, stem="adapter_model"))
    return dict(iter_tensors(folder))


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
