"""A transformers tokenizer from the keys of a GGUF file, the way back from `vocabulary`.

    tokenizer.ggml.model "gpt2"   byte-level BPE of `tokens` and `merges`, cut where the pre-tokenizer `pre` cuts
    "llama"                       SentencePiece BPE: merges follow from `tokens` and `scores`, bytes as <0x0A>
    "t5"                          SentencePiece unigram of `tokens` and `scores`

Which tokens are control tokens and which are padding says `token_type`; what is put before and behind a text,
`add_bos_token` and `add_eos_token`, with llama.cpp's defaults where they are missing. The chat template comes along.

The result is proved before it is returned: turned into keys again by `vocabulary`, it must give the same tokens, kinds
and merges. A pre-tokenizer or a kind of vocabulary that strop does not know is refused by name, since another one
would change token ids in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from strop.errors import FormatError, StropError, nearest
from strop.files.gguf.pretokenizers import PRE_TOKENIZERS, ignores_merges, pre_tokenizer
from strop.files.gguf.vocabulary import TokenType, vocabulary

_SPACE: Final = "\u2581"
_SPECIAL: Final = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_ALIKE: Final[Mapping[str, tuple[str, ...]]] = {
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "gpt-2": ("phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0", "mellum", "exaone4"),
    "qwen2": ("deepseek-r1-qwen", "kormo", "megrez"),
    "gpt-4o": ("llama4", "kanana2"),
}
_OTHER_NAMES: Final = {other: name for name, others in _ALIKE.items() for other in others}
"""Names under which llama.cpp (src/llama-vocab.cpp) cuts text as under one that is known here."""


def tokenizer_of(metadata: Mapping[str, object], *, where: str) -> PreTrainedTokenizerFast | None:
    """The tokenizer that a file's keys describe; None where they describe none.

    Args:
        metadata: the file's keys.
        where: the file, for messages.

    Raises:
        FormatError: a kind of vocabulary or a pre-tokenizer that strop does not know, or keys that contradict another.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model in (None, "none", "no_vocab"):
        return None
    keys = {key.removeprefix("tokenizer.ggml."): metadata[key] for key in metadata if key.startswith("tokenizer.ggml.")}
    makers = {"gpt2": _byte_level, "llama": _sentencepiece, "t5": _unigram}
    if model not in makers:
        raise FormatError(
            f"{where}: tokenizer.ggml.model is {model!r}{nearest(str(model), makers)}; those that strop opens: "
            f"{', '.join(makers)}. Save the original tokenizer beside the file's weights instead"
        )
    texts: list[str] = _items(keys, "tokens", str, where)
    count = len(texts)
    normal = [int(TokenType.NORMAL)] * count
    types: list[int] = _items(keys, "token_type", int, where, count) if "token_type" in keys else normal
    if all(kind == TokenType.UNUSED for kind in types):
        raise FormatError(f"{where}: every one of its {count:,} tokens is marked as unused")
    made = _whole(makers[str(model)](keys, texts, types, where), str(model), keys, texts, types, where)
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        made.chat_template = template
    _prove(made, keys, texts, types, where)
    return made


def _byte_level(keys: Mapping[str, Any], texts: Sequence[str], types: Sequence[int], where: str) -> Tokenizer:
    pre = str(keys.get("pre", "default (none is named, as in files from before 2024)"))
    name = _OTHER_NAMES.get(pre, pre)
    if name not in PRE_TOKENIZERS:
        raise FormatError(
            f"{where}: its text is cut by the pre-tokenizer {pre!r}{nearest(pre, PRE_TOKENIZERS)}, which strop does "
            f"not know, and another one would change token ids in silence; known are {', '.join(PRE_TOKENIZERS)}. "
            "Open the folder that the file was made from"
        )
    vocab = _plain(texts, types)
    merges: list[tuple[str, str]] = []
    for merge in _items(keys, "merges", str, where):
        left, space, right = merge.partition(" ")
        if not space or " " in right or not {left, right, left + right} <= vocab.keys():
            raise FormatError(f"{where}: tokenizer.ggml.merges holds {merge[:40]!r}, which is no pair of its tokens")
        merges.append((left, right))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignores_merges(name)))
    backend.pre_tokenizer = pre_tokenizer(name)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(keys: Mapping[str, Any], texts: Sequence[str], types: Sequence[int], where: str) -> Tokenizer:
    scores: list[float] = _items(keys, "scores", float, where, len(texts))
    mergeable = {
        text: score
        for text, score, kind in zip(texts, scores, types, strict=True)
        if kind in (TokenType.NORMAL, TokenType.USER_DEFINED)
    }
    pairs: list[tuple[float, int, int, str, str]] = []
    places = {text: place for place, text in enumerate(texts)}
    for text, score in mergeable.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in mergeable and right in mergeable:
                pairs.append((-score, places[left], places[right], left, right))
    merges = [(left, right) for _, _, _, left, right in sorted(pairs)]
    unknown = next((text for text, kind in zip(texts, types, strict=True) if kind == TokenType.UNKNOWN), None)
    backend = Tokenizer(
        models.BPE(
            vocab=_plain(texts, types),
            merges=merges,
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
            dropout=None,
        )
    )
    _write_spaces(backend, prefix=bool(keys.get("add_space_prefix", True)))
    return backend


def _unigram(keys: Mapping[str, Any], texts: Sequence[str], types: Sequence[int], where: str) -> Tokenizer:
    scores: list[float] = _items(keys, "scores", float, where, len(texts))
    unknown = next((place for place, kind in enumerate(types) if kind == TokenType.UNKNOWN), None)
    held = max(place for place, kind in enumerate(types) if kind != TokenType.UNUSED) + 1
    pieces = list(zip(texts, scores, strict=True))[:held]
    backend = Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=False))
    steps: list[Any] = []
    if charsmap := keys.get("precompiled_charsmap"):
        steps.append(normalizers.Precompiled(bytes(charsmap)))
    if keys.get("remove_extra_whitespaces"):
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    scheme = "always" if keys.get("add_space_prefix", False) else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return backend


def _write_spaces(backend: Tokenizer, *, prefix: bool) -> None:
    """Write spaces as SentencePiece's BPE does, and read them back."""
    steps = [*([normalizers.Prepend(_SPACE)] if prefix else []), normalizers.Replace(" ", _SPACE)]
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )


def _plain(texts: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    """The tokens of the vocabulary proper: without those that only fill the embedding up."""
    return {
        text: place for place, (text, kind) in enumerate(zip(texts, types, strict=True)) if kind != TokenType.UNUSED
    }


def _whole(
    backend: Tokenizer, model: str, keys: Mapping[str, Any], texts: Sequence[str], types: Sequence[int], where: str
) -> PreTrainedTokenizerFast:
    """The tokenizer with its special tokens and what it puts around a text."""
    backend.add_tokens(
        [
            AddedToken(text, special=kind == TokenType.CONTROL, normalized=False)
            for text, kind in zip(texts, types, strict=True)
            if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
        ]
    )
    special: dict[str, str] = {}
    for name, key in _SPECIAL.items():
        place = keys.get(f"{key}_token_id")
        if place is not None and (type(place) is not int or not 0 <= place < len(texts)):
            raise FormatError(f"{where}: tokenizer.ggml.{key}_token_id is {place!r}; there are {len(texts)} tokens")
        if place is not None:
            special[name] = texts[place]
    starts = model == "llama" or ignores_merges(_OTHER_NAMES.get(str(keys.get("pre")), str(keys.get("pre"))))
    before = special.get("bos_token") if keys.get("add_bos_token", starts) else None
    behind = special.get("eos_token") if keys.get("add_eos_token", model == "t5") else None
    if before is not None or behind is not None:
        around = [*([before] if before else []), "$A", *([behind] if behind else [])]
        second = [*([f"{before}:1"] if before else []), "$B:1", *([f"{behind}:1"] if behind else [])]
        named = [(text, texts.index(text)) for text in dict.fromkeys([before, behind]) if text]
        backend.post_processor = processors.TemplateProcessing(around, [*around, *second], named)
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def _prove(made: Any, keys: Mapping[str, Any], texts: Sequence[str], types: Sequence[int], where: str) -> None:
    """Refuse a tokenizer that would be written as other tokens, kinds or merges than it was read from."""
    stops = [place for name in ("eos", "eot", "eom") if (place := keys.get(f"{name}_token_id")) is not None]
    try:
        again = vocabulary(made, rows=len(texts), stops=stops)
    except StropError as error:
        raise FormatError(f"{where}: its tokenizer cannot be opened: {error}") from error
    held = [place for place, kind in enumerate(types) if kind != TokenType.UNUSED]
    wrong = [texts[place] for place in held if again.tokens[place] != texts[place]]
    merges = keys.get("merges")
    if wrong or (merges is not None and again.keys.get("merges", merges) != merges):
        what = f"{len(wrong)} tokens ({', '.join(wrong[:5])})" if wrong else "its merges"
        raise FormatError(f"{where}: its tokenizer would be opened with other tokens than it holds: {what} differ")


def _items(keys: Mapping[str, Any], key: str, kind: type, where: str, count: int | None = None) -> list[Any]:
    """A list of one kind of items, of which there are `count` where that is given, and one at least where not."""
    values = keys.get(key)
    if not isinstance(values, list) or not values or any(type(value) is not kind for value in values):
        raise FormatError(f"{where}: tokenizer.ggml.{key} is no list of {kind.__name__} values, which it must be")
    if count is not None and len(values) != count:
        raise FormatError(f"{where}: tokenizer.ggml.{key} has {len(values):,} items, and there are {count:,} tokens")
    return values
