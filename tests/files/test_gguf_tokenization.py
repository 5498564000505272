"""Tokenizers out of GGUF files: the ids and texts of the tokenizer that went in, on texts of many scripts."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from strop.errors import FormatError
from strop.files.gguf.pretokenizers import PRE_TOKENIZERS
from strop.files.gguf.tokenization import tokenizer_of
from strop.files.gguf.vocabulary import vocabulary
from strop.models import load
from strop.models.opening import open_tokenizer
from tests.tiny import tiny_tokenizer

_WORDS = ["the quick brown fox", " jumps over 12345 lazy dogs", "don't I'LL", "\n\n", "  two  spaces", "\tx = 3.14;"]
_SCRIPTS = ["äöüßé ÄÖÜ", "абв ЖЯ", "漢字 日本", "한국어", "العربية", "हिन्दी", "🙂🚀", "½²", "“quotes”…"]


def texts(count: int = 120) -> list[str]:
    rng = random.Random(0)
    made = ["", " ", "<s> </s>", "<unk>", "<|im_start|>user\nhi<|im_end|>\n", "a" * 70]
    while len(made) < count:
        parts = [rng.choice(_WORDS + _SCRIPTS) for _ in range(rng.randint(1, 4))]
        parts.append("".join(chr(rng.randrange(32, 0x2FF)) for _ in range(rng.randint(0, 8))))
        made.append("".join(rng.sample(parts, len(parts))))
    return made


def sentencepiece_like(*, prefix: bool = True) -> PreTrainedTokenizerFast:
    """A BPE of pieces with bytes to fall back on, as Llama 2 has it."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    trained.train_from_iterator([*_WORDS, *_SCRIPTS[:3]] * 3, trainer)
    import json

    fields = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in fields["merges"]]
    whole = Tokenizer(
        models.BPE(vocab=fields["vocab"], merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps = [normalizers.Prepend("\u2581")] if prefix else []
    whole.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    whole.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=whole,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def unigram() -> PreTrainedTokenizerFast:
    whole = Tokenizer(models.Unigram())
    whole.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    whole.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    whole.train_from_iterator([*_WORDS, *_SCRIPTS[:3]] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=whole,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def again(tokenizer: PreTrainedTokenizerFast, *, rows: int | None = None) -> PreTrainedTokenizerFast:
    keys = vocabulary(tokenizer, rows=rows or len(tokenizer), stops=[tokenizer.eos_token_id]).metadata()
    made = tokenizer_of(keys, where="file.gguf")
    assert made is not None
    return made


def assert_same(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> None:
    for text in texts():
        ids = one(text)["input_ids"]
        assert other(text)["input_ids"] == ids, repr(text)
        assert other.decode(ids, skip_special_tokens=True) == one.decode(ids, skip_special_tokens=True), repr(text)


MAKERS = {
    "byte-level": tiny_tokenizer,
    "sentencepiece": sentencepiece_like,
    "sentencepiece without a space": lambda: sentencepiece_like(prefix=False),
    "unigram": unigram,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_tokenizer_comes_back_with_its_ids_and_its_texts(kind: str) -> None:
    source = MAKERS[kind]()
    made = again(source, rows=len(source) + 7)
    assert_same(source, made)
    assert made.get_vocab() == source.get_vocab()
    assert made.chat_template == source.chat_template
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        assert getattr(made, name) == getattr(source, name), name


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_pre_tokenizer_that_is_known_cuts_as_the_one_that_was_named(name: str) -> None:
    from strop.files.gguf.pretokenizers import ignores_merges, pre_tokenizer

    source = tiny_tokenizer()
    source.backend_tokenizer.pre_tokenizer = pre_tokenizer(name)
    source.backend_tokenizer.model.ignore_merges = ignores_merges(name)
    assert_same(source, again(source))


@pytest.mark.parametrize(("before", "behind"), [(True, False), (False, False), (True, True), (False, True)])
def test_what_stands_before_and_behind_a_text_follows_the_flags(before: bool, behind: bool) -> None:
    source = tiny_tokenizer()
    keys = vocabulary(source, rows=len(source), stops=[2]).metadata()
    keys |= {"tokenizer.ggml.add_bos_token": before, "tokenizer.ggml.add_eos_token": behind}
    made = tokenizer_of(keys, where="file.gguf")
    assert made is not None
    plain = source("hello", add_special_tokens=False)["input_ids"]
    assert made("hello")["input_ids"] == [1] * before + plain + [2] * behind
    assert made("hello", add_special_tokens=False)["input_ids"] == plain


def test_llama_models_begin_with_a_token_where_nothing_is_said() -> None:
    source = sentencepiece_like()
    keys = vocabulary(source, rows=len(source), stops=[2]).metadata()
    del keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"]
    made = tokenizer_of(keys, where="file.gguf")
    assert made is not None
    assert made("hi")["input_ids"] == [source.bos_token_id, *source("hi", add_special_tokens=False)["input_ids"]]


def test_a_file_without_a_tokenizer_has_none() -> None:
    assert tokenizer_of({}, where="file.gguf") is None
    assert tokenizer_of({"tokenizer.ggml.model": "none"}, where="file.gguf") is None


BROKEN = {
    "no tokens": ({"tokens": []}, r"tokens is no list of str"),
    "tokens that are numbers": ({"tokens": [1, 2]}, r"tokens is no list of str"),
    "too few kinds": ({"token_type": [1]}, r"token_type has 1 items, and there are 304 tokens"),
    "kinds that are texts": ({"token_type": ["x"] * 304}, r"token_type is no list of int"),
    "nothing but padding": ({"token_type": [5] * 304}, "every one of its 304 tokens is marked as unused"),
    "no merges": ({"merges": None}, r"merges is no list of str"),
    "merges of three": ({"merges": ["a b c"]}, r"merges holds 'a b c', which is no pair"),
    "merges of what is no token": ({"merges": ["zzz qqq"]}, r"merges holds 'zzz qqq'"),
    "another vocabulary": ({"model": "wpm"}, r"model is 'wpm'"),
    "another pre-tokenizer": ({"pre": "qwen22"}, r"'qwen22' \(did you mean 'qwen2'\?\)"),
    "a begin that is no token": ({"bos_token_id": -1}, r"bos_token_id is -1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_keys_that_make_no_tokenizer_are_refused_by_name(case: str) -> None:
    changes, words = BROKEN[case]
    source = tiny_tokenizer()
    keys = vocabulary(source, rows=len(source), stops=[2]).metadata()
    keys |= {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    with pytest.raises(FormatError, match=words) as caught:
        tokenizer_of({name: value for name, value in keys.items() if value is not None}, where="file.gguf")
    assert str(caught.value).startswith("file.gguf: ")


def test_real_tokenizers_come_back(material) -> None:
    gpt2 = material / "tokenizers" / "gpt2"
    sources = [
        GPT2Tokenizer(vocab=str(gpt2 / "vocab.json"), merges=str(gpt2 / "merges.txt")),
        open_tokenizer(material / "models" / "stories260K"),
        load("demo").tokenizer,
    ]
    for source in sources:
        assert_same(source, again(source))
