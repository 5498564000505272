"""A folder's weights made into the tensors of a GGUF file, each when its turn comes, with what it lost.

    dense weight              -> its layout there -> encoded in the type chosen for it
    codes on the same grid    -> the same codes, moved row by row: nothing is lost
    codes on another grid     -> decoded, then encoded: a second rounding, which is said

The loss of a tensor is sum (source - stored)^2 / sum source^2, the source being what the folder holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from strop.files.gguf.architecture_table import Layout
from strop.files.gguf.architectures import Architecture, Piece, Planned
from strop.files.gguf.blocks import decode, encode
from strop.files.gguf.mixtures import Chosen, Mixture
from strop.files.gguf.transcoding import transcode
from strop.files.gguf.writer import Bytes, TensorToWrite
from strop.recipes.export_source import Weights

PIECE_VALUES: Final = 1 << 18
"""Values whose loss is weighed at a time."""

_FLOATS: Final = ("f32", "f16", "bf16")


HOW: Final = ("kept", "moved", "decoded", "rounded", "rounded again")
"""What becomes of values: kept, codes taken over as they were, codes decoded to floats, rounded, rounded once more."""


@dataclass(frozen=True)
class Made:
    """A piece of a tensor: its bytes, what they stand for, and which of `HOW` became of it."""

    raw: Bytes
    wanted: Tensor
    how: str = HOW[0]


@dataclass
class TensorRecord:
    """What became of one tensor.

    Attributes:
        name: in the file.
        type: its type there.
        shape: the row last.
        sources: the checkpoint's tensors that it holds.
        lines: its layers by the checkpoint's names, one for each expert.
        how: the worst of `HOW` that became of a piece.
        reason: why the type is not the one that was asked for, or None.
        nbytes: bytes in the file.
        error: sum (source - stored)^2.
        power: sum source^2.
        sha256: of its bytes.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    lines: tuple[str, ...] = ()
    how: str = HOW[0]
    reason: str | None = None
    nbytes: int = 0
    error: float = 0.0
    power: float = 0.0
    sha256: str = ""

    @property
    def loss(self) -> float:
        """Relative squared error."""
        return self.error / self.power if self.power else 0.0

    def watching(self, pieces: Iterator[Made]) -> Iterator[Bytes]:
        """Pass the bytes of pieces on, and take down their size, digest and loss, and the worst that became of one."""
        self.how, self.nbytes, self.error, self.power = HOW[0], 0, 0.0, 0.0
        digest = hashlib.sha256()
        for made in pieces:
            digest.update(np.ascontiguousarray(made.raw).reshape(-1).data)
            self.nbytes += made.raw.nbytes
            self.how = max(self.how, made.how, key=HOW.index)
            if self.type != "f32":
                self._weigh(made.raw.reshape(made.wanted.shape[0], -1), made.wanted, exactly=made.how == "moved")
            yield made.raw
        if self.how == "rounded" and not self.error:
            self.how = HOW[0]  # every value was one of the type's
        self.sha256 = digest.hexdigest()

    def _weigh(self, raw: Bytes, wanted: Tensor, *, exactly: bool) -> None:
        """Add the loss of rows [out, bytes] that stand for `wanted` [out, in], some at a time."""
        step = max(1, PIECE_VALUES // wanted[0].numel())
        for start in range(0, len(raw), step):
            exact = wanted[start : start + step].float()
            if not exactly:
                stored = decode(raw[start : start + step], self.type, tuple(exact.shape), where=self.name)
                self.error += float((stored - exact).square_().sum(dtype=torch.float64))
            self.power += float(exact.square().sum(dtype=torch.float64))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "type": self.type,
            "shape": list(self.shape),
            "sources": list(self.sources)
            if len(self.sources) <= 4
            else [*self.sources[:2], f"... {len(self.sources)}"],
            "how": self.how,
            "reason": self.reason,
            "bytes": self.nbytes,
            "relative_error": self.loss,
            "sha256": self.sha256,
        }


@dataclass(frozen=True)
class Tensors:
    """The tensors of a file and what became of them; records are filled while the file is written."""

    to_write: list[TensorToWrite]
    records: dict[str, TensorRecord]


def gguf_tensors(
    source: Weights,
    architecture: Architecture,
    mixture: Mixture,
    *,
    tied: bool,
    importance: Mapping[str, Tensor] | None = None,
) -> Tensors:
    """Plan every tensor of a file.

    Args:
        source: the folder.
        architecture: its architecture.
        mixture: which types.
        tied: whether the head is the embedding.
        importance: mean squared input of every column, by the checkpoint's layer names; None without.

    Raises:
        ModelError: as `Architecture.plan`.
    """
    made: list[TensorToWrite] = []
    records: dict[str, TensorRecord] = {}
    for name, tensor in architecture.extra_tensors(source.config).items():
        record = TensorRecord(name, "f32", tuple(tensor.shape), ())
        records[name] = record
        made.append(TensorToWrite(name, "f32", record.shape, partial(_extra, tensor, record)))
    for planned in architecture.plan(source.names, tied=tied):
        shape = _shape(source, planned)
        chosen = mixture.choose(planned.name, shape)
        names = tuple(dict.fromkeys(piece.source for piece in planned.pieces))
        lines = tuple(piece.line for piece in planned.pieces)
        record = TensorRecord(planned.name, chosen.type, shape, names, lines, reason=chosen.reason)
        records[planned.name] = record
        pieces = partial(_pieces, source, architecture, planned, chosen, record, importance or {})
        made.append(TensorToWrite(planned.name, chosen.type, shape, partial(_made, record, pieces)))
    return Tensors(made, records)


def _shape(source: Weights, planned: Planned) -> tuple[int, ...]:
    piece = planned.pieces[0]
    shape = source.shape(piece.source)
    if piece.expert is not None:
        shape = shape[1:]
    shape = (shape[0] // piece.parts, *shape[1:])
    if piece.layout is Layout.TRANSPOSED and len(shape) == 2 and not source.is_quantized(piece.source):
        shape = (shape[1], shape[0])
    return (len(planned.pieces), *shape) if planned.stacked else shape


def _extra(tensor: Tensor, record: TensorRecord) -> Iterator[Bytes]:
    yield from record.watching(iter([Made(encode(tensor, "f32", where=record.name), tensor)]))


def _made(record: TensorRecord, pieces: Callable[[], Iterator[Made]]) -> Iterator[Bytes]:
    """The bytes of a tensor, piece by piece; its record is filled as they pass."""
    yield from record.watching(pieces())


def _pieces(
    source: Weights,
    architecture: Architecture,
    planned: Planned,
    chosen: Chosen,
    record: TensorRecord,
    importance: Mapping[str, Tensor],
) -> Iterator[Made]:
    fused: tuple[str, Tensor] | None = None
    for piece in planned.pieces:
        columns = importance.get(piece.line)
        if source.is_quantized(piece.source):
            yield _of_codes(source, architecture, piece, chosen, record, columns)
            continue
        if piece.expert is not None:
            if fused is None or fused[0] != piece.source:
                fused = (piece.source, source.dense(piece.source))
            parts: Iterator[Tensor] = iter([architecture.laid_out(piece.of(fused[1]), piece.layout)])
        elif piece.layout is Layout.SAME and len(record.shape) == 2:
            parts = source.rows(piece.source)
        else:
            parts = iter([architecture.laid_out(source.dense(piece.source), piece.layout)])
        how = "kept" if chosen.type == "f32" else "rounded"
        for part in parts:
            yield Made(encode(part, chosen.type, columns, where=planned.name), part, how)


def _of_codes(
    source: Weights,
    architecture: Architecture,
    piece: Piece,
    chosen: Chosen,
    record: TensorRecord,
    importance: Tensor | None,
) -> Made:
    """A quantized weight: its codes where the grid is the type's, else what they stand for, encoded."""
    quantized = source.quantized(piece.source)
    weight = quantized.dequantize()
    order = architecture.row_order(piece.layout, weight.shape[0])
    moved = transcode(quantized)
    same = moved is not None and moved[0] == chosen.type
    if moved is not None and same and decode(moved[1], chosen.type, quantized.shape, where=record.name).equal(weight):
        raw = moved[1].reshape(weight.shape[0], -1)
        return Made(raw, weight, "moved") if order is None else Made(raw[order.numpy()], weight[order], "moved")
    if order is not None:
        weight = weight[order]
    how = "decoded" if chosen.type in _FLOATS else "rounded again"
    return Made(encode(weight, chosen.type, importance, where=record.name), weight, how)
