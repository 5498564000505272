"""Documents to rows of tokens: chat is never cut, prose fills what is left of each row.

A row holds `length` token ids (int16) and as many loss weights (float16, the weight of predicting that very token): 1
for prose and answers, `PROMPT_WEIGHT` for questions, 0 for padding. Documents in one row see each other: what
precedes `<|bos|>` is a distraction that the model learns to ignore.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from strop.demo.text import Document

PROMPT_WEIGHT = 0.1  # questions are half random strings: little can be learnt from predicting them
BATCH = 2_000

Tokens = NDArray[np.int16]
Weights = NDArray[np.float16]


def encode(tokenizer: Tokenizer, documents: Iterable[Document]) -> Iterator[tuple[bool, list[int], list[float]]]:
    """Each document as (is prose, token ids, loss weights)."""
    vocabulary = tokenizer.get_vocab()
    bos, end, user, assistant = (vocabulary[f"<|{name}|>"] for name in ("bos", "end", "user", "assistant"))
    waiting: list[Document] = []

    def flush() -> Iterator[tuple[bool, list[int], list[float]]]:
        encoded = iter(tokenizer.encode_batch([text for document in waiting for _, text in document]))
        for document in waiting:
            ids, weights = [bos], [0.0]
            for role, _ in document:
                piece = next(encoded).ids
                if role == "user":
                    ids += [user, *piece, assistant]
                    weights += [0.0] + [PROMPT_WEIGHT] * len(piece) + [0.0]
                else:
                    ids += [*piece, end]
                    weights += [1.0] * (len(piece) + 1)
            yield document[0][0] == "text", ids, weights
        waiting.clear()

    for document in documents:
        waiting.append(document)
        if len(waiting) == BATCH:
            yield from flush()
    yield from flush()


def pack(tokenizer: Tokenizer, documents: Iterable[Document], *, length: int) -> tuple[Tokens, Weights]:
    """Rows of `length` tokens, [rows, length], and their loss weights.

    Chat documents longer than a row are left out. Prose that is left over when the chat ends makes rows of its own.
    """
    pad = tokenizer.get_vocab()["<|pad|>"]
    chats: list[tuple[list[int], list[float]]] = []
    prose_ids: list[int] = []
    prose_weights: list[float] = []
    for is_prose, ids, weights in encode(tokenizer, documents):
        if is_prose:
            prose_ids += ids
            prose_weights += weights
        elif len(ids) <= length:
            chats.append((ids, weights))
    rows: list[tuple[list[int], list[float]]] = []
    row_ids: list[int] = []
    row_weights: list[float] = []
    used = 0

    def close() -> None:
        nonlocal used, row_ids, row_weights
        left = length - len(row_ids)
        filler = prose_ids[used : used + left]
        row_ids += filler
        row_weights += prose_weights[used : used + left]
        used += len(filler)
        row_ids += [pad] * (length - len(row_ids))
        row_weights += [0.0] * (length - len(row_weights))
        rows.append((row_ids, row_weights))
        row_ids, row_weights = [], []

    for ids, weights in chats:
        if len(row_ids) + len(ids) > length:
            close()
        row_ids += ids
        row_weights += weights
    close()
    while used + length <= len(prose_ids):
        close()
    return np.array([ids for ids, _ in rows], dtype=np.int16), np.array(
        [weights for _, weights in rows], dtype=np.float16
    )
