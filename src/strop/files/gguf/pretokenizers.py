"""Which of llama.cpp's pre-tokenizers cuts text as a tokenizer does.

A byte-level BPE merges within words, and what a word is, a regular expression says. GGUF holds a name of it
(`tokenizer.ggml.pre`), the expressions are in llama.cpp. `pre_tokenizer_name` finds the name by what a tokenizer does:
it must cut `probe_texts()` (letters, marks, digits, signs, spaces of many scripts, contractions, line ends) exactly
where the expression of that name does. A tokenizer that cuts otherwise is refused, since a wrong name changes the ids
of some texts in silence.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tokenizers import Regex, Tokenizer, pre_tokenizers

from strop.errors import FormatError

_WORDS: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDS: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(ending: str, digits: str) -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{start}{_UPPER}*{_LOWER}+{ending}|{start}{_UPPER}+{_LOWER}*{ending}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDS}"
    )


def _plain(digits: str) -> str:
    return rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|{_SIGNS}|{_ENDS}"


@dataclass(frozen=True)
class _Known:
    """Expressions that are applied one after the other, and whether a whole word that is a token is never merged."""

    expressions: tuple[str, ...]
    ignore_merges: bool = False


_KNOWN: Mapping[str, _Known] = {
    "gpt-2": _Known((_WORDS,)),
    "smollm": _Known((r"\p{N}", _WORDS)),
    "llama-bpe": _Known((_plain(r"\p{N}{1,3}"),), ignore_merges=True),
    "smaug-bpe": _Known((_plain(r"\p{N}{1,3}"),)),
    "qwen2": _Known((_plain(r"\p{N}"),)),
    "qwen35": _Known(
        (
            rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_ENDS}",
        )
    ),
    "tekken": _Known((_cased("", r"\p{N}"),), ignore_merges=True),
    "gpt-4o": _Known((_cased(rf"{_SHORT}?", r"\p{N}{1,3}"),)),
    "deepseek-v3": _Known(
        (
            r"\p{N}{1,3}",
            r"[一-龥぀-ゟ゠-ヿ]+",
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_ENDS}",
        )
    ),
}
"""By llama.cpp's names (src/llama-vocab.cpp); the expressions are those of the models' own tokenizer.json."""


def pre_tokenizer_name(tokenizer: Tokenizer, *, ignore_merges: bool) -> str:
    """llama.cpp's name of a byte-level tokenizer's pre-tokenizer.

    Args:
        tokenizer: the backend of a fast tokenizer.
        ignore_merges: whether a word that is a token stays whole although no merges lead to it.

    Raises:
        FormatError: none cuts texts as it does.
    """
    own = tokenizer.pre_tokenizer
    if own is None:
        raise FormatError(f"the tokenizer has no pre-tokenizer; {_advice()}")
    texts = probe_texts()
    cuts = [_cuts(own, text) for text in texts]
    differing = {
        name: [text for cut, text in zip(cuts, texts, strict=True) if cut != _cuts(_built(name), text)]
        for name in _KNOWN
    }
    for name, differ in differing.items():
        if not differ and _KNOWN[name].ignore_merges == ignore_merges:
            return name
    nearest = min(_KNOWN, key=lambda name: len(differing[name]))
    where = (
        f"cuts {differing[nearest][0]!r} elsewhere"
        if differing[nearest]
        else f"cuts alike and has ignore_merges {not ignore_merges}, the tokenizer {ignore_merges}"
    )
    raise FormatError(
        f"the tokenizer cuts text as no pre-tokenizer of llama.cpp does that strop knows; the nearest, {nearest}, {where}. "
        f"{_advice()}"
    )


def _advice() -> str:
    return (
        f"Known are {', '.join(_KNOWN)}. Exporting under a wrong name would change token ids in silence, so nothing "
        "was written"
    )


def _cuts(pre_tokenizer: Any, text: str) -> list[tuple[int, int]]:
    return [span for _, span in pre_tokenizer.pre_tokenize_str(text)]


@functools.cache
def _built(name: str) -> pre_tokenizers.PreTokenizer:
    steps = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in _KNOWN[name].expressions]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_ALPHABETS: Final = (
    *("abcdefgh", "ABCDEFGH", "äöüßéñçøåæ", "ÄÖÜÉÑǅ", "абвгдЖЯ", "αβγΩ", "漢字日本", "ひらカナ", "한국어", "العربية"),
    *("עברית", "हिन्दीि", "ไทยเก้า", "0123456789", "٣४௫", "½²Ⅷ①", " ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000"),
    *("\u2028", "'", "’", '"', ".,;:!?", "()[]{}<>/", "-_~`", "@#$%^&*+=|\\", "€£¥©™", "“”‘’…", "。、！？「」"),
    *("🙂🚀🦙", "👩\u200d💻", "\u0301\u0308", "\u200b"),
)
_PIECES: Final = (
    *("'s", "'T", "'re", "'VE", "'ll", "'D", " I'm", "don't", "\n\n", " \n ", "   x", "1234567", " 12", "3.14", "//"),
    "x=1;",
)


@functools.cache
def probe_texts() -> tuple[str, ...]:
    """Short texts, always the same, in which every kind of character meets every other."""
    rng = random.Random(0)
    texts = []
    for _ in range(600):
        parts = []
        for _ in range(rng.randint(2, 9)):
            if rng.random() < 0.2:
                parts.append(rng.choice(_PIECES))
            else:
                alphabet = rng.choice(_ALPHABETS)
                parts.append("".join(rng.choice(alphabet) for _ in range(rng.randint(1, 5))))
        texts.append("".join(parts))
    return tuple(texts)
