"""What models are asked to see how near they are to each other, and how 16-bit weights answer in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from strop.config import Rounded, load_config
from strop.data.mixing import open_mixture
from strop.data.records import Message, Record
from strop.data.templates import prompt_ids
from strop.errors import StropError
from strop.layers.quantized import QUANTIZED

PROMPTS: Final = (
    "What can you do for me?",
    "Write one sentence about the weather.",
    "wake me at half past six on weekdays",
    "Name three colours and say which you like best.",
    "How much is 12 times 7?",
    "Translate to French: good morning",
    "List the files in this folder.",
    "Tell me a short story about a dog and a lamp.",
)
"""What is asked where neither `data` nor the run name rows."""


def rows_of_run(run: Path, most: int) -> list[Record]:
    """Rows that a run was validated on, if its settings and its data are still there; `most` of them."""
    for folder in (run, run.parent):
        if (folder / "config.yaml").is_file():
            try:
                splits = open_mixture(load_config(folder / "config.yaml").data)
            except StropError:
                return []
            return list((splits.valid or splits.test or splits.train)[:most])
    return []


def rounded_method(folder: Path) -> Rounded | None:
    """How the model in a run's folder trained through its rounding; None where it did not, or nothing records it."""
    for home in (folder, folder.parent):
        if (home / "config.yaml").is_file():
            try:
                method = load_config(home / "config.yaml").method
            except StropError:
                return None
            return method if isinstance(method, Rounded) else None
    return None


def asked_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a question as a conversation's first turn, or as plain text where there is no chat template."""
    if tokenizer.chat_template:
        return prompt_ids([Message("user", text)], tokenizer)
    return list(tokenizer(text)["input_ids"])


@contextmanager
def computing_in_fp32(model: nn.Module) -> Iterator[None]:
    """Let a model of 16-bit weights compute in fp32, each layer's weights being widened for its own call alone."""
    narrow: dict[nn.Parameter, Tensor] = {}

    def widen(module: nn.Module, _: Any) -> None:
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dtype in (torch.bfloat16, torch.float16) and parameter not in narrow:
                narrow[parameter] = parameter.data
                parameter.data = parameter.data.float()

    def restore(module: nn.Module, *_: Any) -> None:
        for parameter in module._parameters.values():
            if parameter is not None and parameter in narrow:
                parameter.data = narrow.pop(parameter)

    hooks = []
    for module in model.modules():
        if module._parameters and not isinstance(module, QUANTIZED):  # that computes in the dtype of its input
            hooks.append(module.register_forward_pre_hook(widen))
            hooks.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, data in narrow.items():
            parameter.data = data
