"""A tiny base and chats to tune it on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_chat_file, tiny_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 model with a chat template."""
    return tiny_folder(tmp_path_factory.mktemp("base"), "llama", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_file(tmp_path_factory.mktemp("data") / "chats.jsonl", rows=16)
