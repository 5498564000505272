"""What the receipts of compared models say: the format, the bits, and what they cost on rows of their own.

A receipt is data that came with a folder: what does not fit is told, never trusted, and never stops a comparison.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from strop.errors import FileFormatError, MissingInputError
from strop.evaluation.comparison import Comparison, ModelResult, significant
from strop.files.folders import read_json
from strop.files.gguf import is_gguf
from strop.files.receipts import RECEIPT
from strop.models.sources import find_folder, is_adapter
from strop.recipes.rows import Rows


class _HeldOut(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)
    rows: int
    kl: float
    kl_interval: tuple[float | None, float | None]
    top1_agreement: float


class _Calibration(BaseModel):
    model_config = ConfigDict(extra="ignore")
    data: str


class _Settings(BaseModel):
    model_config = ConfigDict(extra="ignore")
    method: str
    calibration: _Calibration | None = None


class _Receipt(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)
    requested: str
    bits_per_weight: float
    fallbacks: list[str]
    settings: _Settings
    held_out: _HeldOut | None

    @field_validator("held_out", mode="before")
    @classmethod
    def _none_measured(cls, value: object) -> object:
        return None if value == {} else value


@dataclass(frozen=True)
class _Said:
    summary: dict[str, Any] | None
    notes: tuple[str, ...]


def with_receipts(comparison: Comparison, paths: list[str], data: Rows) -> Comparison:
    """The comparison, each model with what its receipt says, and notes for the reader.

    Args:
        comparison: The models compared.
        paths: Where they are, in the same order.
        data: The rows that they were compared on.
    """
    said = [_of(model, path, data) for model, path in zip(comparison.models, paths, strict=True)]
    models = tuple(replace(model, receipt=one.summary) for model, one in zip(comparison.models, said, strict=True))
    notes = dict.fromkeys((*comparison.notes, *(note for one in said for note in one.notes)))
    return replace(comparison, models=models, notes=tuple(notes))


def _of(model: ModelResult, path: str, data: Rows) -> _Said:
    if is_gguf(path):
        return _Said(None, ())
    folder = find_folder(path)
    if is_adapter(folder):
        return _Said(None, ())
    try:
        receipt = _Receipt.model_validate(read_json(folder / RECEIPT))
    except MissingInputError:
        if read_json(folder / "config.json").get("quantization_config") is None:
            return _Said(None, ())
        return _Said(
            None, (f"{model.name} is quantized and has no {RECEIPT}: what rounding cost it is not on record.",)
        )
    except (FileFormatError, ValidationError) as error:
        reason = "; ".join(_problems(error)) if isinstance(error, ValidationError) else str(error)
        return _Said(None, (f"{model.name}: its {RECEIPT} cannot be read ({reason}).",))
    held = receipt.held_out
    summary = {
        "requested": receipt.requested,
        "method": receipt.settings.method,
        "bits_per_weight": receipt.bits_per_weight,
        "fallbacks": len(receipt.fallbacks),
        "kl": held and held.kl,
        "kl_interval": held and list(held.kl_interval),
        "rows": held and held.rows,
    }
    notes = [_sentence(model.name, receipt)]
    calibrated = receipt.settings.calibration
    if calibrated is not None and _same(calibrated.data, data):
        notes.append(
            f"{model.name} was calibrated on rows of {Path(calibrated.data).name}, which judge here: that flatters it; "
            "compare on rows that chose nothing."
        )
    return _Said(summary, tuple(notes))


def _sentence(name: str, receipt: _Receipt) -> str:
    held = receipt.held_out
    text = (
        f"{name}, by its receipt: {receipt.requested} by {receipt.settings.method}, "
        f"{receipt.bits_per_weight:.3f} bits per weight"
    )
    if receipt.fallbacks:
        text += f", {len(receipt.fallbacks)} layers kept in their own dtype"
    if held is None:
        return f"{text}; not measured on held-out rows."
    low, high = held.kl_interval
    ends = "" if low is None or high is None else f" ({significant(low, 3)} to {significant(high, 3)})"
    return f"{text}; KL {significant(held.kl, 3)} nats{ends} from its source on {held.rows:,} held-out rows of its own."


def _problems(error: ValidationError) -> list[str]:
    return [f"{'.'.join(map(str, one['loc']))}: {one['msg'].lower()}" for one in error.errors()[:3]]


def _same(name: str, data: Rows) -> bool:
    if not isinstance(data, str | os.PathLike):
        return False
    return Path(name).resolve() == Path(data).resolve()
