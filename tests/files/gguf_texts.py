"""Texts of every kind of character, for comparing tokenizers, and vocabularies alone in llama.cpp."""

from __future__ import annotations

import ctypes
import random
import unicodedata
from pathlib import Path
from typing import Any

from strop.files.gguf.vocabulary import Vocabulary
from strop.files.gguf.writer import write_gguf

_PIECES = (
    *("'s", "'T", "'re", "'VE", "'ll", "'D", " I'm", "don't", "\n\n", " \n ", "   x", "1234567", " 12", "3.14", "//"),
    *("hello", " world", "Once", " upon", " time", ", ", ". ", "http://a.b/c?d=e", "\r\n", "{}", "🙂", "👩\u200d💻"),
    *("ﬁ", "Å", "ẛ̣", "\t\t"),
)


def _blocks() -> list[list[str]]:
    """Assigned characters by blocks of 256 code points, without surrogates and private ones."""
    blocks: dict[int, list[str]] = {}
    for point in range(1, 0x1FB00):
        if unicodedata.category(chr(point)) not in ("Cn", "Cs", "Co"):
            blocks.setdefault(point >> 8, []).append(chr(point))
    return list(blocks.values())


def unicode_texts(count: int, *, seed: int = 0) -> list[str]:
    """Short texts: words, digits and signs beside characters of any block."""
    rng = random.Random(seed)
    blocks = _blocks()
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 6)):
            kind = rng.random()
            if kind < 0.45:
                parts.append(rng.choice(_PIECES))
            else:
                block = blocks[0] if kind < 0.65 else rng.choice(blocks)
                parts.append("".join(rng.choice(block) for _ in range(rng.randint(1, 6))))
            if rng.random() < 0.3:
                parts.append(" ")
        texts.append("".join(parts))
    return texts


class LlamaVocabulary:
    """A vocabulary written to a file without tensors and opened by llama.cpp (`vocab_only`)."""

    def __init__(self, words: Vocabulary, path: Path) -> None:
        import llama_cpp.llama_cpp as lib

        metadata = {
            "general.architecture": "llama",
            "llama.context_length": 64,
            "llama.embedding_length": 64,
            "llama.block_count": 1,
            "llama.feed_forward_length": 64,
            "llama.attention.head_count": 1,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "llama.rope.dimension_count": 64,
            "llama.vocab_size": len(words.tokens),
        }
        with path.open("wb") as file:
            write_gguf(file, metadata | words.metadata(), [])
        self._lib: Any = lib
        lib.llama_log_set(_silent(lib), ctypes.c_void_p(0))
        params = lib.llama_model_default_params()
        params.vocab_only = True
        self._model = lib.llama_model_load_from_file(str(path).encode(), params)
        assert self._model, f"llama.cpp does not open {path}"
        self._vocab = lib.llama_model_get_vocab(self._model)

    def ids(self, text: str, *, special: bool = True) -> list[int]:
        raw = text.encode()
        room = len(raw) + 16
        found = (ctypes.c_int32 * room)()
        count = self._lib.llama_tokenize(self._vocab, raw, len(raw), found, room, special, True)
        assert count >= 0
        return list(found[:count])

    def stops(self, token: int) -> bool:
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def close(self) -> None:
        self._lib.llama_model_free(self._model)


_kept: list[Any] = []  # a callback must live as long as the library


def _silent(lib: Any) -> Any:
    if not _kept:
        _kept.append(lib.llama_log_callback(lambda level, text, user: None))
    return _kept[0]
