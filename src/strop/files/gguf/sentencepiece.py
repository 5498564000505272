"""`tokenizer.model`, the file of SentencePiece, read without that library: pieces, scores, kinds, and what it does.

A protocol buffer (sentencepiece_model.proto): fields as (number << 3 | wire type), varints, lengths before bytes.

    1 pieces, each: 1 piece (text), 2 score (float32), 3 kind (1 normal, 2 unknown, 3 control, 4 user defined,
      5 unused, 6 byte)                                                     the kinds are those of GGUF
    2 trainer:      3 algorithm (1 unigram, 2 bpe), 35 byte fallback, 40 to 43 ids of unknown, begin, end, padding
    3 normalizer:   2 map of characters, 3 space before the text, 4 spaces merged, 5 spaces written as a sign

Nothing in the file is trusted: every length is held against the bytes that are there.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from strop.errors import FileFormatError

MAX_BYTES: Final = 64 << 20
_MAX_PIECES: Final = 1 << 20


@dataclass(frozen=True)
class SentencePieceModel:
    """What a `tokenizer.model` says.

    Attributes:
        algorithm: "bpe" or "unigram".
        texts: the pieces.
        scores: of each.
        kinds: of each, as GGUF numbers them.
        byte_fallback: whether unknown characters become bytes.
        special: name ("unk", "bos", "eos", "pad") to id, those that there are.
        characters: the map of normalized characters; empty for none.
        space_before: whether a space is put before the text.
        merges_spaces: whether several spaces become one.
    """

    algorithm: str
    texts: list[str]
    scores: list[float]
    kinds: list[int]
    byte_fallback: bool
    special: dict[str, int]
    characters: bytes
    space_before: bool
    merges_spaces: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a `tokenizer.model`.

    Raises:
        FileFormatError: it is none, or of an algorithm that GGUF does not hold (words, characters).
    """
    if path.stat().st_size > MAX_BYTES:
        raise FileFormatError(f"{path}: {path.stat().st_size:,} bytes; a SentencePiece model has at most {MAX_BYTES:,}")
    raw = path.read_bytes()
    texts: list[str] = []
    scores: list[float] = []
    kinds: list[int] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value in _fields(raw):
            if number == 1 and isinstance(value, bytes):
                piece = dict(_fields(value))
                text = piece.get(1, b"")
                texts.append(text.decode("utf-8") if isinstance(text, bytes) else "")
                score = piece.get(2, b"\0\0\0\0")
                scores.append(struct.unpack("<f", score)[0] if isinstance(score, bytes) else 0.0)
                kinds.append(_whole(piece, 3, 1))
            elif number == 2 and isinstance(value, bytes):
                trainer = dict(_fields(value))
            elif number == 3 and isinstance(value, bytes):
                normalizer = dict(_fields(value))
            if len(texts) > _MAX_PIECES:
                raise ValueError(f"more than {_MAX_PIECES:,} pieces")
    except (ValueError, struct.error) as error:
        raise FileFormatError(f"{path}: is no SentencePiece model ({error})") from None
    algorithm = {1: "unigram", 2: "bpe"}.get(_whole(trainer, 3, 1))
    if not texts or algorithm is None or not set(kinds) <= set(range(1, 7)):
        raise FileFormatError(f"{path}: is no SentencePiece model of pieces (unigram or BPE), the two that GGUF holds")
    ids = {name: _whole(trainer, field, default) for name, field, default in _SPECIAL}
    characters = normalizer.get(2, b"")
    return SentencePieceModel(
        algorithm,
        texts,
        scores,
        kinds,
        bool(_whole(trainer, 35, 0)),
        {name: number for name, number in ids.items() if 0 <= number < len(texts)},
        characters if isinstance(characters, bytes) else b"",
        bool(_whole(normalizer, 3, 1)),
        bool(_whole(normalizer, 4, 1)),
    )


_SPECIAL: Final = (("unk", 40, 0), ("bos", 41, 1), ("eos", 42, 2), ("pad", 43, -1))


def _whole(fields: dict[int, int | bytes], number: int, default: int) -> int:
    value = fields.get(number, default)
    if not isinstance(value, int):
        return default
    return value - (1 << 64) if value >= 1 << 63 else value


def _fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values: varints as whole numbers, all else as bytes."""
    place = 0
    while place < len(raw):
        tag, place = _varint(raw, place)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, place = _varint(raw, place)
            yield number, value
            continue
        if wire == 2:
            size, place = _varint(raw, place)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"a field of the unknown kind {wire}")
        if place + size > len(raw):
            raise ValueError(f"a field of {size:,} bytes, of which {len(raw) - place:,} are there")
        yield number, raw[place : place + size]
        place += size


def _varint(raw: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(raw):
            raise ValueError("it ends within a number")
        byte = raw[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("a number of more than 64 bits")
