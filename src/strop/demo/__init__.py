"""The bundled model and its downstream task, with the programs that made them.

`model_path()` is a folder that transformers opens; `strop.demo.task` writes the task's data; `strop.demo.pretrain`
makes the model again. Nothing heavy is imported here.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["model_path"]


def model_path() -> Path:
    """The folder of the bundled model: configuration, bf16 weights, tokenizer with its chat template."""
    return Path(__file__).parent / "model"
