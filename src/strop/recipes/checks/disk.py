"""The disk that a run will fill, against what is free where it is written."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import torch

from strop.data.store import store_bytes
from strop.layers.base import linear_shape
from strop.planner.disk import fullest_bytes
from strop.recipes.checks.finding import Finding
from strop.recipes.checks.words import size
from strop.recipes.session import Session
from strop.training.teacher_cache import CachedTeacher

_TIGHT = 1.25


def exported_bytes(session: Session) -> int:
    """Bytes of one export: the adapter in fp32, or the whole model as it is stored."""
    trained = session.trained
    if session.config.method.name in ("lora", "qlora"):
        return 4 * trained.parameters
    element = torch.finfo(session.base.stored_dtype).bits // 8
    whole = element * trained.total_parameters
    if session.config.method.name in ("qat", "qat-lora") and trained.scheme is not None:
        shapes = [linear_shape(session.model.get_submodule(name)) for name in trained.layers]
        whole -= round(sum((8 * element - trained.scheme.bits_per_weight(s)) * math.prod(s) / 8 for s in shapes))
    return whole


def cached_bytes(session: Session) -> int:
    """Bytes of the rendered rows in RUN/cache, which stand there until the run is finished."""
    sets = [session.train_set, *([session.valid_set] if session.valid_set is not None else [])]
    return sum(store_bytes(one.samples) for one in sets)


def check_disk(session: Session, run_dir: Path) -> Finding:
    """Compare what best, last, the checkpoints, one more of each while it is written, and the rendered rows need with
    what is free.
    """
    folder = run_dir.absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    there = sum(file.stat().st_size for file in run_dir.rglob("*") if file.is_file()) if run_dir.is_dir() else 0
    needed = fullest_bytes(exported_bytes(session), session.trained.parameters) + cached_bytes(session)
    if isinstance(session.objective.teacher, CachedTeacher):
        needed += session.objective.teacher.bytes
    needed = max(0, needed - there)
    figures = {"needed_bytes": needed, "free_bytes": free}
    said = f"the run writes up to {size(needed)}; {size(free)} are free"
    if needed > free:
        return Finding(
            "refuse", "disk", said, f"free {size(needed - free)} more, or choose an output on another disk", figures
        )
    if needed * _TIGHT > free:
        return Finding("warn", "disk", said, "free some space: others write to this disk as well", figures)
    return Finding("fine", "disk", said, "", figures)
