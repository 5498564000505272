"""What every test folder shares: no network, one thread, and the real material where it is there."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# Set before any test imports torch or transformers: no test may reach a hub; tiny models are quickest on one thread.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A shell that starts the tests in the background makes them ignore Ctrl-C; its tests need it as a user has it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def material() -> Path:
    """The folder of real models, data and configurations; the test is skipped where `STROP_MATERIAL` names none."""
    folder = os.environ.get("STROP_MATERIAL")
    if not folder:
        pytest.skip("STROP_MATERIAL is not set: the real models and data are not on this machine")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"STROP_MATERIAL is {folder!r}, which is not a folder")
    return path
