"""A tokenizer as GGUF holds it: tokens, their kinds, scores or merges, special ids, flags, the chat template.

    byte-level BPE           tokenizer.ggml.model "gpt2"    tokens, merges, the pre-tokenizer's name
    SentencePiece BPE        "llama"                        tokens, scores (bytes as <0x0A>)
    SentencePiece unigram    "t5"                           tokens, scores, the map of normalized characters

All is read off the fast tokenizer that transformers opens, as that is the one that the model was trained with. Where
merges are listed and no scores (a SentencePiece BPE in tokenizer.json), a token's score is the rank of its first merge,
negative: llama.cpp merges the highest score first, and tokenizers the lowest rank. Tokens are padded to the rows of the
embedding with ones that no text reaches. What llama.cpp does otherwise is refused, or noted where only some texts show
it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

from tokenizers import Tokenizer

from strop.errors import FormatError, ModelError
from strop.files.gguf.pretokenizers import pre_tokenizer_name
from strop.files.gguf.rope import Value

_SPACE: Final = "\u2581"
_STOPS: Final = ("eos", "eot", "eom")
"""Under which names llama.cpp looks for tokens that end an answer."""


class TokenType(IntEnum):
    """GGUF's kinds of tokens."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: llama.cpp's name of the algorithm.
        tokens: their texts, one for each row of the embedding.
        types: their kinds.
        keys: all other keys, without `tokenizer.ggml.` but for the chat template's.
        notes: texts that llama.cpp turns into other ids.
    """

    model: str
    tokens: list[str]
    types: list[int]
    keys: dict[str, Value]
    notes: list[str] = field(default_factory=list)

    def metadata(self) -> dict[str, Value]:
        """The keys of the file."""
        own = {"model": self.model, "tokens": self.tokens, "token_type": self.types} | self.keys
        return {key if "." in key else f"tokenizer.ggml.{key}": value for key, value in own.items()}


def vocabulary(tokenizer: Any, *, rows: int, stops: Sequence[int]) -> Vocabulary:
    """The vocabulary of a transformers tokenizer.

    Args:
        tokenizer: a fast tokenizer.
        rows: of the model's embedding; tokens are padded to as many.
        stops: ids that end an answer, the most important first.

    Raises:
        FormatError: llama.cpp has no such tokenizer; the message says what of it, and what it has.
        ModelError: more tokens than rows, or two tokens of one text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise FormatError(
            f"{type(tokenizer).__name__}: is no fast tokenizer, and only those of the tokenizers library can be read "
            "(tokenizer.json); save it with transformers as one first"
        )
    fields = json.loads(backend.to_str())
    model = fields["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else "Unigram")
    texts, types = _tokens(backend, fields, rows)
    notes: list[str] = []
    if kind == "Unigram":
        name, keys = "t5", _unigram(fields, texts, types)
    elif kind != "BPE":
        raise FormatError(f"a tokenizer of the kind {kind} is not written as GGUF; BPE and Unigram are")
    elif model.get("byte_fallback"):
        name, keys = "llama", _sentencepiece(fields, texts, types, tokenizer, notes)
    else:
        name, keys = "gpt2", _byte_level(backend, fields, notes)
    _check_affixes(tokenizer, keys, notes)
    keys |= _special(tokenizer, stops, notes)
    if stripping := [entry["content"] for entry in fields["added_tokens"] if entry["lstrip"] or entry["rstrip"]]:
        notes.append(
            f"{', '.join(stripping[:4])} take the spaces beside them along, which GGUF cannot say: only texts with "
            "spaces there get other ids"
        )
    if tokenizer.chat_template:
        keys["tokenizer.chat_template"] = _template(tokenizer.chat_template)
    return Vocabulary(name, texts, types, keys, notes)


def _tokens(backend: Tokenizer, fields: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Text and kind of each token, padded to `rows`."""
    known = backend.get_vocab(with_added_tokens=True)
    highest = max(known.values(), default=-1)
    if highest >= rows:
        raise ModelError(
            f"the tokenizer has a token of id {highest}, the embedding {rows} rows; open a tokenizer and a model that "
            "belong together"
        )
    texts = [f"[PAD{place}]" for place in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    unknown = fields["model"].get("unk_token")
    byte_fallback = fields["model"].get("byte_fallback")
    for text, place in known.items():
        texts[place], types[place] = text, int(TokenType.NORMAL)
        if byte_fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[place] = int(TokenType.BYTE)
    for entry in fields["added_tokens"]:
        types[entry["id"]] = int(TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED)
        texts[entry["id"]] = entry["content"]
    if isinstance(fields["model"].get("unk_id"), int):
        types[fields["model"]["unk_id"]] = int(TokenType.UNKNOWN)
    elif unknown in known and byte_fallback:
        types[known[unknown]] = int(TokenType.UNKNOWN)
    if len(set(texts)) != len(texts):
        twice = next(text for text in texts if texts.count(text) > 1)
        raise ModelError(f"the tokenizer has two tokens of the text {twice!r}, which llama.cpp cannot tell apart")
    return texts, types


def _byte_level(backend: Tokenizer, fields: Mapping[str, Any], notes: list[str]) -> dict[str, Value]:
    model = fields["model"]
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise FormatError(f"the tokenizer's BPE has {key} {model[key]!r}, which llama.cpp does not")
    steps = _steps(fields["pre_tokenizer"], "pretokenizers")
    if not any(step["type"] == "ByteLevel" for step in steps):
        kinds = ", ".join(step["type"] for step in steps) or "none"
        raise FormatError(
            "the tokenizer's BPE works neither on bytes (ByteLevel) nor with bytes to fall back on, which are the two that "
            f"llama.cpp has; its pre-tokenizer: {kinds}"
        )
    if any(step["type"] == "ByteLevel" and step.get("add_prefix_space") for step in steps):
        raise FormatError("the tokenizer puts a space before each text (add_prefix_space), which llama.cpp does not")
    for step in _steps(fields["normalizer"], "normalizers"):
        if step["type"] not in ("NFC", "NFKC"):
            raise FormatError(f"the tokenizer normalizes text ({step['type']}) before cutting it; llama.cpp does not")
        notes.append(
            f"the tokenizer brings text into the form {step['type']} first, and llama.cpp does not: text in another "
            "form (letters and accents apart) gets other ids"
        )
    name = pre_tokenizer_name(backend, ignore_merges=bool(model.get("ignore_merges")))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {"pre": name, "merges": merges}


def _sentencepiece(
    fields: Mapping[str, Any], texts: Sequence[str], types: Sequence[int], tokenizer: Any, notes: list[str]
) -> dict[str, Value]:
    prefix = _space_prefix(fields)
    if prefix == "first":
        if tokenizer.chat_template:
            notes.append(
                "the tokenizer puts a space before the text but not after a special token, and llama.cpp knows only "
                "both or neither: neither was chosen, as chats begin with a special token; plain text loses the space"
            )
        else:
            notes.append(
                "the tokenizer puts a space before the text but not after a special token, and llama.cpp after both: "
                "texts with special tokens inside get other ids"
            )
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(fields["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    last = -float(len(ranks) + 1)
    scores = [
        -1000.0 if kind in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED) else -float(ranks[text] + 1)
        if text in ranks
        else 0.0 if kind in (TokenType.BYTE, TokenType.UNKNOWN) else last
        for text, kind in zip(texts, types, strict=True)
    ]  # fmt: skip
    always = prefix == "always" or (prefix == "first" and not tokenizer.chat_template)
    return {"pre": "default", "scores": scores, "add_space_prefix": always}


def _unigram(fields: Mapping[str, Any], texts: Sequence[str], types: Sequence[int]) -> dict[str, Value]:
    scores = [-1000.0] * len(texts)
    for place, (_, score) in enumerate(fields["model"]["vocab"]):
        scores[place] = float(score)
    keys: dict[str, Value] = {"pre": "default", "scores": scores, "remove_extra_whitespaces": False}
    for step in _steps(fields["normalizer"], "normalizers"):
        if step["type"] == "Precompiled":
            import base64

            keys["precompiled_charsmap"] = base64.b64decode(step["precompiled_charsmap"])
        elif step["type"] == "Replace" and step["pattern"] == {"Regex": " {2,}"}:
            keys["remove_extra_whitespaces"] = True
        elif step["type"] == "Strip":
            continue  # spaces at the ends are what merging them removes too
        elif not (step["type"] in ("Prepend", "Replace") and step.get("prepend", step.get("content")) == _SPACE):
            raise FormatError(f"the tokenizer normalizes text by {step['type']}, which llama.cpp's unigram does not")
    keys["add_space_prefix"] = _space_prefix(fields) != "never"
    return keys


def _space_prefix(fields: Mapping[str, Any]) -> str:
    """Where a SentencePiece tokenizer puts a space that is not there: "always" before a text, "first", "never".

    Raises:
        FormatError: it does something that llama.cpp's does not.
    """
    prefix, spaces = "never", False
    for step in _steps(fields["normalizer"], "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == _SPACE:
            prefix = "always"
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == _SPACE:
            spaces = True
        elif fields["model"].get("type") != "Unigram":
            raise FormatError(
                f"the tokenizer normalizes text by {step['type']}, which llama.cpp's SentencePiece does not"
            )
    for step in _steps(fields["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace":
            if step.get("split", True) and fields["model"].get("type") != "Unigram":
                raise FormatError("the tokenizer cuts text at spaces (Metaspace, split), which llama.cpp's does not")
            spaces, prefix = True, step.get("prepend_scheme", "always")
        elif not (step["type"] == "Split" and step["pattern"] == {"String": " "} and spaces):  # nothing left to cut
            raise FormatError(f"the tokenizer cuts text by {step['type']}, which llama.cpp's SentencePiece does not")
    if not spaces:
        raise FormatError(f"the tokenizer does not write spaces as {_SPACE}, and llama.cpp's SentencePiece does")
    return prefix


def _check_affixes(tokenizer: Any, keys: dict[str, Value], notes: list[str]) -> None:
    """Set the flags by what the tokenizer puts before and behind a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    starts = [at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare]
    start = starts[0] if starts else 0
    before, behind = whole[:start], whole[start + len(bare) :]
    keys["add_bos_token"] = before == [tokenizer.bos_token_id]
    keys["add_eos_token"] = behind == [tokenizer.eos_token_id]
    for said, there, flag in (("before", before, "add_bos_token"), ("behind", behind, "add_eos_token")):
        if there and not keys[flag]:
            notes.append(f"the tokenizer puts ids {there} {said} a text, which GGUF cannot say; llama.cpp adds none")


def _special(tokenizer: Any, stops: Sequence[int], notes: list[str]) -> dict[str, Value]:
    keys: dict[str, Value] = {}
    for name in ("bos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            keys["unknown_token_id" if name == "unk" else "padding_token_id" if name == "pad" else "bos_token_id"] = (
                number
            )
    ends = list(dict.fromkeys(stops))
    for name, number in zip(_STOPS, ends, strict=False):
        keys[f"{name}_token_id"] = number
    if len(ends) > len(_STOPS):
        left = [tokenizer.convert_ids_to_tokens(number) for number in ends[len(_STOPS) :]]
        notes.append(f"GGUF holds {len(_STOPS)} tokens that end an answer; left out: {', '.join(map(str, left))}")
    return keys


def _template(template: Any) -> str:
    if isinstance(template, str):
        return template
    return template["default"] if "default" in template else next(iter(template.values()))


def _steps(field: Any, inside: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences opened."""
    if field is None:
        return []
    if field["type"] == "Sequence":
        return [step for part in field[inside] for step in _steps(part, inside)]
    return [field]
