"""A training state on disk: whole or not there, checked before it is believed, never a pickle.

    RUN/checkpoints/step-000120/
        weights.safetensors     the trained parameters (fp32 masters: adapters, all weights, or QAT's latent weights)
        optimizer.safetensors   AdamW's moments and step counters, `<parameter>.<quantity>`
        random.safetensors      torch's generator states, uint8, by device
        state.json              step, position in the data, totals, best score, settings, versions
        manifest.json           bytes and SHA-256 of the four above

A checkpoint is written to a temporary sibling, flushed and renamed (`atomic_folder`). Reading starts at the newest and
takes the first whose manifest holds; what is damaged is skipped and named. The model that people use is not here but in
RUN/best and RUN/last. `RunLock` keeps two processes from training into one folder.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from strop.errors import DiskFullError, StropError, TrainingError, UsageError
from strop.files.folders import atomic_folder, check_manifest, read_json, write_json, write_manifest
from strop.files.shards import Part, read_file, write_file

FORMAT: Final = 1
KEPT: Final = 2
_SMALL_FILES: Final = 32 * 1024  # state.json, manifest.json, and blocks that are not full
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAME: Final = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """Everything that decides how training goes on.

    Attributes:
        step: Optimizer steps completed.
        weights: Trained parameters by name.
        optimizer: The optimizer's tensors by name.
        random: Generator states by device, uint8.
        state: JSON values: position in the data, totals, settings.
    """

    step: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    random: Mapping[str, Tensor]
    state: Mapping[str, Any]


def save_checkpoint(root: Path, checkpoint: Checkpoint, *, keep: int = KEPT, spare: int | None = None) -> Path:
    """Write a checkpoint below `root` and remove all but the newest `keep`; returns its folder.

    Older ones are removed only after the new one stands, and with it one more that is valid. Where the disk is too full
    nothing is left of the new one, and the older ones are not touched.

    Args:
        root: The folder of a run's checkpoints.
        checkpoint: What is written.
        keep: How many stay.
        spare: The step of one that stays however old it is.

    Raises:
        DiskFullError: the disk has no room for it, or a limit on the size of files forbids it.
    """
    path = root / f"step-{checkpoint.step:06d}"
    needed = _bytes_of(checkpoint)
    _check_room(path, needed)
    try:
        with atomic_folder(path, overwrite=True) as folder:
            for name in ("weights", "optimizer", "random"):
                tensors = {key: value.detach().cpu().contiguous() for key, value in getattr(checkpoint, name).items()}
                write_file(folder / f"{name}.safetensors", [Part.of(tensors)])
            write_json(folder / "state.json", {"format": FORMAT, "step": checkpoint.step, **checkpoint.state})
            write_manifest(folder)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise _no_room(path, needed, str(error.strerror)) from error
        raise
    for step, old in _folders(root)[keep:]:
        if step != spare:
            shutil.rmtree(old, ignore_errors=True)
    return path


def _bytes_of(checkpoint: Checkpoint) -> int:
    """The bytes of a checkpoint's tensors, and of its other files at the most of an ordinary run."""
    tensors = (value for name in ("weights", "optimizer", "random") for value in getattr(checkpoint, name).values())
    names = sum(128 + len(key) for name in ("weights", "optimizer") for key in getattr(checkpoint, name))
    return sum(value.numel() * value.element_size() for value in tensors) + names + _SMALL_FILES


def _check_room(path: Path, needed: int) -> None:
    """Compare what a checkpoint needs with what is free before a byte is written."""
    if _free_bytes(path) < needed:
        raise _no_room(path, needed, "the disk is too full")


def _free_bytes(path: Path) -> int:
    """Bytes that this user may still write where `path` is to stand."""
    there = next(parent for parent in path.absolute().parents if parent.exists())
    return shutil.disk_usage(there).free


def _no_room(path: Path, needed: int, why: str) -> DiskFullError:
    return DiskFullError(
        f"{path}: the checkpoint was not written: {why}; it needs {needed:,} bytes and {_free_bytes(path):,} are free. "
        "Earlier checkpoints are untouched; make room, then go on from the newest with --resume."
    )


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint after checking its manifest.

    Raises:
        MissingInputError: a file is missing.
        FileFormatError: bytes differ from what was written, or are not what the format demands.
        TrainingError: it was written by a newer version.
    """
    check_manifest(folder)
    state = read_json(folder / "state.json")
    if state.get("format") != FORMAT or not isinstance(state.get("step"), int):
        raise TrainingError(
            f"{folder / 'state.json'}: format {state.get('format')!r}, this version reads {FORMAT}; "
            "resume with the version of strop that wrote it"
        )
    parts = {name: read_file(folder / f"{name}.safetensors") for name in ("weights", "optimizer", "random")}
    return Checkpoint(state["step"], parts["weights"], parts["optimizer"], parts["random"], state)


def newest_checkpoint(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint below `root` that is whole, and a line for each damaged one that was passed over."""
    skipped: list[str] = []
    for _, folder in _folders(root):
        try:
            return load_checkpoint(folder), skipped
        except (StropError, OSError) as error:
            skipped.append(f"{folder.name} is damaged and was skipped: {str(error).splitlines()[0]}")
    return None, skipped


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's default generators that training draws from, copied, by device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_generator_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put the states of `generator_states` back."""
    torch.set_rng_state(states["cpu"].cpu())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"].cpu())


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each setting that differs between a checkpoint and a run that would go on from it."""
    lines = []
    for key in sorted({*saved, *now}):
        before, after = saved.get(key), now.get(key)
        if before != after:
            lines.append(f"{key} was {_shown(before)} and is {_shown(after)}")
    return lines


class RunLock:
    """Context manager that holds a run's folder for one process.

    A file lock of the operating system: it goes with the process, so a killed run leaves nothing behind to clean up.

    Raises:
        UsageError: another process trains into the folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / ".lock"
        self._handle: int | None = None

    def __enter__(self) -> RunLock:
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(handle)
        except OSError:
            os.close(handle)
            raise UsageError(
                f"{self._path.parent}: another process is training into this folder; wait for it, or choose another "
                "output"
            ) from None
        self._handle = handle
        return self

    def __exit__(self, *error: object) -> None:
        if self._handle is not None:
            os.close(self._handle)  # the lock goes with it; the empty file stays, since another may wait on it
            self._handle = None


def _lock(handle: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _folders(root: Path) -> list[tuple[int, Path]]:
    """Checkpoint folders below `root`, the newest first."""
    if not root.is_dir():
        return []
    found = [
        (int(match[1]), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return sorted(found, reverse=True)


def _shown(value: object) -> str:
    text = "not set" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
